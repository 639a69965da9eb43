"""The daemon is killed under a verified load; front-ends that come again lose nothing."""

from __future__ import annotations

import hashlib
import os
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from tests.peers.bridge import Bridge
from tests.peers.guest import Guest, vhost_user_blk
from tests.peers.process import eventually, peer
from tests.peers.storage import RevivedStorage, StorageDaemon, make_image
from tests.peers.testpmd import Echo
from tests.vm.guest.keeper import Keeper
from tests.vm.guest.keeper_net import PacketKeeper

ROUNDS = 200 if os.environ.get("VHOST_BRIDGE_SOAK") else 20
SECTOR = 512
WRITE = re.compile(r" Write id=\d+ offset=0x([0-9a-f]+) count=0x200 ")


@pytest.fixture
def counted(tmp_path: Path) -> Iterator[tuple[RevivedStorage, Path]]:
    """A vhost-user-blk back-end whose disk writes down every write, and where."""
    socket, log = tmp_path / "nbd.sock", tmp_path / "nbd.log"
    with peer(
        ["nbdkit", "-f", "-U", str(socket), "--filter=log", "memory", "1G", f"logfile={log}"]
    ):
        eventually(socket.exists, "nbdkit listens")
        layer = f"driver=nbd,node-name=top,server.type=unix,server.path={socket}"
        image = make_image(tmp_path / "unused")
        disk = partial(StorageDaemon, image, tmp_path / "disk.sock", layers=[layer])
        with RevivedStorage(disk) as revived:
            yield revived, log


@pytest.mark.soak
def test_daemon_killed_at_any_moment_loses_no_write_and_repeats_none_that_was_done(
    counted: tuple[RevivedStorage, Path], tmp_path: Path
) -> None:
    """Each write has a sector of its own, so the disk's log says how often it was done."""

    def start(stack: ExitStack) -> list[Bridge]:
        return [stack.enter_context(shadowed(counted[0].socket, tmp_path))]

    kill_and_go_on(start, counted[1], ROUNDS)


@pytest.mark.soak
def test_buffer_of_a_back_end_that_has_one_is_the_front_ends(
    counted: tuple[RevivedStorage, Path], tmp_path: Path
) -> None:
    """The back-end is another bridge, which knows what is in flight; both are killed at once."""

    def start(stack: ExitStack) -> list[Bridge]:
        inner = stack.enter_context(shadowed(counted[0].socket, tmp_path))
        outer = Bridge(f"vhost-user:{inner.listen}", name="outer", listen=tmp_path / "outer.sock")
        return [stack.enter_context(outer), inner]

    kill_and_go_on(start, counted[1], ROUNDS // 4)


def kill_and_go_on(start: Callable[[ExitStack], list[Bridge]], log: Path, rounds: int) -> None:
    """Kill bridges while `Keeper` writes; no write is lost or repeated."""
    keeper = Keeper(1 << 21)
    doubts = kill_under(keeper, start, rounds, seed=20261125)
    writes = Counter(int(at, 16) // SECTOR for at in WRITE.findall(log.read_text()))
    assert set(writes) == keeper.done
    repeated = {number for number, times in writes.items() if times > 1}
    assert repeated <= set(doubts)
    assert all(writes[number] <= 1 + doubts[number] for number in repeated)
    print(f"{keeper.sent} writes, {len(doubts)} in flight at a kill, {len(repeated)} done again")


@pytest.mark.soak
def test_packed_vrings_of_a_killed_daemon_lose_and_repeat_no_buffer(tmp_path: Path) -> None:
    """One of the two has always requests in flight. Frames that were on their way may be lost, or
    come twice; buffers not."""
    socket = tmp_path / "vhost.sock"

    def start(stack: ExitStack) -> list[Bridge]:
        return [stack.enter_context(shadowed(socket, tmp_path))]

    with Echo(f"net_vhost0,iface={socket}", processor=1):
        kill_among_packets(start, PacketKeeper(100), ROUNDS)


@pytest.mark.soak
def test_back_end_makes_a_buffer_for_packed_vrings_of_any_size(tmp_path: Path) -> None:
    """It has to be told first that they are packed; it is another bridge, and both are killed."""
    socket = tmp_path / "vhost.sock"

    def start(stack: ExitStack) -> list[Bridge]:
        inner = stack.enter_context(shadowed(socket, tmp_path))
        outer = Bridge(f"vhost-user:{inner.listen}", name="outer", listen=tmp_path / "outer.sock")
        return [stack.enter_context(outer), inner]

    with Echo(f"net_vhost0,iface={socket}", processor=1):
        kill_among_packets(start, PacketKeeper(1000), ROUNDS // 4)


def kill_among_packets(
    start: Callable[[ExitStack], list[Bridge]], keeper: PacketKeeper, rounds: int
) -> None:
    """The same while frames come and go: no buffer is lost or repeated."""
    doubts = kill_under(keeper, start, rounds, seed=20261127)
    assert all(times <= 1 + doubts[number] for number, times in keeper.received.items())
    assert len(keeper.received) > keeper.sent / 10


def kill_under(
    keeper: Keeper | PacketKeeper,
    start: Callable[[ExitStack], list[Bridge]],
    rounds: int,
    *,
    seed: int,
) -> Counter[int]:
    """Bridges, the front-end's first, are killed again and again while it works.

    Returns how often each of its numbers was in flight at a kill.
    """
    chance = random.Random(seed)
    for _ in range(rounds):
        with ExitStack() as stack:
            bridges = start(stack)
            keeper.connect(str(bridges[0].listen))
            keeper.work(chance.uniform(0, 0.06))
            for bridge in reversed(bridges[1:]):
                bridge.kill()
                keeper.work(0.001)  # into a bridge whose back-end has gone: it is in flight there
            bridges[0].kill()
            keeper.lose()
    with ExitStack() as stack:
        keeper.connect(str(start(stack)[0].listen))
        keeper.finish()
        keeper.close()
    assert sum(map(bool, keeper.in_doubt)) > rounds / 4
    return Counter(number for flying in keeper.in_doubt for number in flying)


def test_guest_whose_daemon_is_killed_sees_a_pause_only(
    disk: StorageDaemon, tmp_path: Path
) -> None:
    """QEMU keeps what is in flight, and connects again. The guest verifies what it writes; then it
    is stopped and continued, and reset."""
    with ExitStack() as stack:
        bridge = stack.enter_context(shadowed(disk.socket, tmp_path))
        guest = stack.enter_context(Guest(vhost_user_blk(bridge.listen, queues=2, reconnect=True)))
        guest.begin("for i in $(seq 24); do rw /dev/vda 1 $((i % 8 + 8)) || exit 1; done")
        for _ in range(3):
            wait_for_writes(disk.image)
            bridge.kill()
            bridge = stack.enter_context(shadowed(disk.socket, tmp_path))
            bridge.wait_for_output("running vrings")
        guest.qmp.execute("stop")
        time.sleep(0.1)
        guest.qmp.execute("cont")
        digests = guest.end().split()
        assert digests[16:] == [digest_of(disk.image, 1, (i % 8) + 8) for i in range(17, 25)]
        guest.qmp.execute("system_reset")
        guest.wait_ready()
        assert guest.read_write(2, 0) == digest_of(disk.image, 2, 0)


def shadowed(socket: Path, folder: Path) -> Bridge:
    """A bridge that knows what is in flight."""
    return Bridge(f"vhost-user:{socket}", listen=folder / "vm.sock", arguments=["--shadow"])


def wait_for_writes(image: Path) -> None:
    before = image.stat().st_mtime_ns
    eventually(lambda: image.stat().st_mtime_ns != before, "the guest writes")


def digest_of(image: Path, mib: int, skip: int) -> str:
    with image.open("rb") as file:
        file.seek(skip << 20)
        return hashlib.sha256(file.read(mib << 20)).hexdigest()
