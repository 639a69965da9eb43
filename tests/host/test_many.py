"""256 bridges in one daemon: what they cost, and that one that fails does not touch the others."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.peers import blkio
from tests.peers.bridge import Bridge
from tests.peers.process import Process, eventually, peer
from vhostbridge.bridge.control_client import ControlClient
from vhostbridge.bridge.status import BridgeStatus

COUNT = 256
#: Those whose back-end is killed.
DOOMED = 32
SIZE = 4 << 20


def storage(folder: Path, numbers: range) -> Process:
    """One process with an empty disk, and an export, for each number; up once all are there."""
    argv = ["qemu-storage-daemon"]
    for number in numbers:
        image = folder / f"{number}.img"
        with image.open("ab") as file:
            file.truncate(SIZE)
        argv += ["--blockdev", f"driver=file,filename={image},node-name=d{number},locking=off"]
        path = folder / f"back{number}"
        argv += [
            "--export",
            f"type=vhost-user-blk,id=e{number},node-name=d{number},writable=on,"
            f"addr.type=unix,addr.path={path}",
        ]
    process = peer(argv)
    last = folder / f"back{numbers[-1]}"
    eventually(lambda: last.exists() or process.poll() is not None, "the exports are there")
    assert process.poll() is None, process.output
    return process


def front(folder: Path, number: int) -> Path:
    return folder / f"front{number}"


@pytest.fixture
def many(tmp_path: Path) -> Iterator[tuple[Bridge, Process, float]]:
    """The daemon, the process of the last few back-ends, and the seconds that the start took."""
    config = tmp_path / "many.toml"
    config.write_text(
        "".join(
            f'[[bridge]]\nname = "b{n}"\nlisten = "{front(tmp_path, n)}"\n'
            f'backend = "vhost-user:{tmp_path / f"back{n}"}"\n'
            for n in range(COUNT)
        )
    )
    kept, doomed = range(COUNT - DOOMED), range(COUNT - DOOMED, COUNT)
    with storage(tmp_path, kept), storage(tmp_path, doomed) as last:
        began = time.monotonic()
        with Bridge(control=tmp_path / "control", arguments=["--config", config]) as daemon:
            yield daemon, last, time.monotonic() - began


def statuses(daemon: Bridge) -> dict[int, BridgeStatus]:
    with ControlClient(daemon.control) as client:
        return {int(one.name[1:]): one for one in client.status()}


def processor_seconds(pid: int) -> float:
    """User and system time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def misbehave(path: Path) -> None:
    """Front-ends that send what is no message, half of one, and nothing."""
    for data in (os.urandom(64), b"\x01\0\0\0\x01\0\0\0\0\x01", b""):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(20)
            sock.connect(str(path))
            sock.sendall(data)


def test_bridges_are_cheap_and_one_that_fails_does_not_touch_the_others(
    many: tuple[Bridge, Process, float], tmp_path: Path
) -> None:
    daemon, last, start = many
    assert start < 15, f"{start:.1f} s until all listen"
    footprint = daemon.footprint()
    assert footprint.resident_kib < (40 << 10) + 200 * COUNT
    before = processor_seconds(daemon.pid)
    time.sleep(1)
    assert processor_seconds(daemon.pid) - before <= 0.05, "idle bridges use the processor"

    options: dict[str, object] = {"size": SIZE, "state": tmp_path / "state", "seed": 5}
    blkio.run(front(tmp_path, 7), "fill", **options)
    with blkio.start(front(tmp_path, 7), "write-read", depth=8, seconds=600, **options) as client:
        client.wait_for_output(blkio.RUNNING)
        last.kill()
        for number in (1, 2, 3, COUNT - 1):
            misbehave(front(tmp_path, number))
        eventually(
            lambda: sum(one.failures for one in statuses(daemon).values()) == DOOMED,
            "all that lost their back-end have noticed",
        )
        seen = statuses(daemon)
        assert {n for n, one in seen.items() if one.state == "closed"} == set(
            range(COUNT - DOOMED, COUNT)
        )
        assert seen[7].state == "running" and client.poll() is None, client.output
        assert seen[7].pauses == {}
        blkio.run(front(tmp_path, 2), "randread", seconds=1, depth=1)
        with storage(tmp_path, range(COUNT - DOOMED, COUNT)):
            eventually(
                lambda: all(one.state != "closed" for one in statuses(daemon).values()),
                "all are back",
            )
            blkio.run(front(tmp_path, COUNT - 1), "randread", seconds=1, depth=1)
        assert client.poll() is None, client.output
        client.kill()
    blkio.run(front(tmp_path, 7), "verify", **options)
