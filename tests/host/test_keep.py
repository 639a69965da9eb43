"""Front-ends that are killed while their device is kept for the next one, which goes on."""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.peers import blkio
from tests.peers.bridge import COMMAND, Bridge
from tests.peers.process import Process
from tests.peers.storage import StorageDaemon, make_image
from tests.vm.guest.survivor import BLOCK, Driver, content

ROUNDS = 200 if os.environ.get("VHOST_BRIDGE_SOAK") else 20
KEEP = ["--on-disconnect", "keep"]


class CountingDisk(StorageDaemon):
    """Writes down every write: the log of QEMU's `blklogwrites`."""

    def __init__(self, image: Path, socket: Path, log: Path) -> None:
        log.touch()
        self.log = log
        layers = (
            f"driver=blklogwrites,node-name=top,file=disk,log.driver=file,log.filename={log}",
        )
        super().__init__(image, socket, layers=layers)

    def writes(self) -> Iterator[tuple[int, bytes]]:
        """Each write: its byte offset and its data."""
        with self.log.open("rb") as log:
            # The header is brought up to date now and then only: entries are there up to the end.
            end, at, sector = os.fstat(log.fileno()).st_size, 512, 512
            while at < end:
                log.seek(at)
                place, length, flags, _ = struct.unpack("<QQQQ", log.read(32))
                log.seek(at + sector)
                data = log.read(length * sector) if not flags & 4 else b""
                at += sector + len(data)
                if data:
                    yield place * sector, data


@pytest.fixture
def counted(tmp_path: Path) -> Iterator[CountingDisk]:
    image = make_image(tmp_path / "image")
    with CountingDisk(image, tmp_path / "disk.sock", tmp_path / "writes.log") as disk:
        yield disk


@pytest.fixture
def keeping(counted: CountingDisk, tmp_path: Path) -> Iterator[Bridge]:
    with Bridge(
        f"vhost-user:{counted.socket}", listen=tmp_path / "vm.sock", arguments=KEEP
    ) as bridge:
        yield bridge


@pytest.fixture
def memory() -> Iterator[Path]:
    """Guest memory that outlives its front-end."""
    path = Path(f"/dev/shm/vhost-bridge-{os.getpid()}-{random.getrandbits(32):x}")
    yield path
    path.unlink(missing_ok=True)


def survivor(bridge: Bridge, memory: Path, seed: int, seconds: str = "") -> Process:
    module = [sys.executable, "-m", "tests.vm.guest.survivor"]
    return Process([*module, bridge.listen, memory, str(seed), *seconds.split()], name="survivor")


@pytest.mark.soak
def test_front_end_killed_at_any_moment_goes_on(
    counted: CountingDisk, keeping: Bridge, memory: Path
) -> None:
    """Its memory survives; the next one goes on in it, and each request was done once."""
    chance = random.Random(20261127)
    for number in range(ROUNDS):
        with survivor(keeping, memory, number) as front_end:
            # Some die before that, in their set-up.
            if chance.random() < 0.8:
                front_end.wait_for_output("running")
            time.sleep(chance.uniform(0, 0.15))
            assert front_end.poll() is None, front_end.output
            front_end.kill()
    with survivor(keeping, memory, ROUNDS, "0.2") as last:
        assert last.wait() == 0, last.output
        assert "verified" in last.output
    assert keeping.output.count("the front-end goes on where the device was kept") > ROUNDS / 2
    assert "given up" not in keeping.output
    check_writes(counted, Driver(str(memory)))


def check_writes(disk: CountingDisk, driver: Driver) -> None:
    """Each write that was done reached the disk once, and nothing else did."""
    seen = Counter[tuple[int, int]]()
    for offset, data in disk.writes():
        block, generation = struct.unpack("<QQ", data[:16])
        assert offset == block * BLOCK
        assert data == content(block, generation)
        seen[block, generation] += 1
    wanted = {(b, g): 1 for b in range(256) for g in range(1, driver.done(b) + 1)}
    assert seen == wanted
    assert len(wanted) > 10 * ROUNDS


def test_kept_state_waits_can_be_saved_and_dropped(
    counted: CountingDisk, keeping: Bridge, memory: Path, tmp_path: Path
) -> None:
    """`status` shows it, `save` writes it, `reset` gives it up."""
    with survivor(keeping, memory, 1) as front_end:
        front_end.wait_for_output("running")
        time.sleep(0.1)
        front_end.kill()
    keeping.wait_for_output("kept suspended for the next front-end")
    status = keeping.status()
    assert (status.state, status.incoming, status.kept) == ("suspended", True, True)
    assert status.vrings[0].base == Driver(str(memory)).used_index
    assert "a kept state waits for a front-end" in keeping.command("status").stdout
    saved = tmp_path / "saved"
    keeping.command("save", saved)
    shown = json.loads(subprocess.check_output([COMMAND, "state", "show", "-j", saved], timeout=60))
    assert shown["vrings"][0]["base"] == status.vrings[0].base
    assert keeping.operate("Reset") == "reset"
    assert not keeping.status().incoming


def test_front_ends_that_begin_anew_find_a_reset_device(
    counted: CountingDisk, keeping: Bridge, tmp_path: Path
) -> None:
    """libblkio's clients are new ones each time: what was kept of the one before is given up."""
    options: dict[str, object] = {"size": 4 << 20, "state": tmp_path / "state", "seed": 8}
    chance = random.Random(4)
    blkio.run(keeping.listen, "fill", **options)
    for _ in range(4):
        with blkio.start(keeping.listen, "write-read", depth=8, seconds=30, **options) as client:
            client.wait_for_output(blkio.RUNNING)
            time.sleep(chance.uniform(0, 0.1))
            client.kill()
    blkio.run(keeping.listen, "verify", **options)
    assert keeping.output.count("the kept state is given up") == 5
    blkio.verify_file(counted.image, **options)


def test_kept_state_outlives_its_back_end(
    disk: StorageDaemon, memory: Path, tmp_path: Path
) -> None:
    """The back-end dies while the state waits; another one takes it, and the front-end goes on."""
    with Bridge(f"vhost-user:{disk.socket}", listen=tmp_path / "s", arguments=KEEP) as bridge:
        with survivor(bridge, memory, 1) as front_end:
            front_end.wait_for_output("running")
            time.sleep(0.1)
            front_end.kill()
        bridge.wait_for_output("kept suspended")
        disk.kill()
        bridge.wait_for_output("waiting for the back-end")
        with StorageDaemon(disk.image, disk.socket, queues=4):
            with survivor(bridge, memory, 2, "0.1") as last:
                assert last.wait() == 0, last.output
            assert "the front-end goes on where the device was kept" in bridge.output
