"""A VMM that uses rust-vmm's vhost-user library, in cloud-hypervisor's order of messages."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from tests.peers.bridge import Bridge
from tests.peers.process import eventually, peer
from tests.peers.storage import RevivedStorage, StorageDaemon, make_image
from tests.peers.vmm import RustVmm

ROUNDS = 200 if os.environ.get("VHOST_BRIDGE_SOAK") else 20
SIZE = 16 << 20
# On the disk, for each request: long enough that there are some whenever the guest is paused.
DELAY = "3ms"

WAYS = {
    "straight": [],
    "shadow": ["--shadow"],
    "all": ["--dirty-log", "all"],
}
ways = pytest.mark.parametrize("arguments", WAYS.values(), ids=WAYS)


def storage(folder: Path, number: int) -> StorageDaemon:
    layer = f"driver=nbd,node-name=top,server.type=unix,server.path={folder / 'nbd.sock'}"
    unused = make_image(folder / "unused")
    return StorageDaemon(unused, folder / f"disk{number}.sock", queues=2, layers=[layer])


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[list[RevivedStorage]]:
    """Two vhost-user-blk back-ends on one slow disk."""
    image, socket = make_image(tmp_path / "image", SIZE), tmp_path / "nbd.sock"
    delays = [f"{kind}delay={DELAY}" for kind in ("r", "w")]
    with ExitStack() as stack:
        stack.enter_context(
            peer(["nbdkit", "-f", "-U", str(socket), "--filter=delay", "file", image, *delays])
        )
        eventually(socket.exists, "nbdkit listens")
        disks = [partial(storage, tmp_path, number) for number in range(2)]
        yield [stack.enter_context(RevivedStorage(one)) for one in disks]


def bridged(disk: RevivedStorage, *arguments: str) -> Bridge:
    socket = disk.socket
    listen = socket.with_name(f"{socket.stem}-vm")
    return Bridge(f"vhost-user:{socket}", listen=listen, arguments=arguments)


def check(vmm: RustVmm) -> None:
    counts = vmm.finish()
    assert counts["writes"] > 100 and counts["verified"] == counts["reads"] > 100, counts


@ways
def test_nothing_happens_while_the_guest_is_paused(
    slow: list[RevivedStorage], tmp_path: Path, arguments: list[str]
) -> None:
    chance = random.Random(20261127)
    with bridged(slow[0], *arguments) as bridge, RustVmm(bridge.listen, queues=2) as vmm:
        for _ in range(10):
            time.sleep(chance.uniform(0, 0.05))
            vmm.tell("pause")
            assert bridge.status().state == "suspended"
            before = (tmp_path / "image").read_bytes()
            time.sleep(0.05)
            assert bridge.status().state == "suspended"
            assert (tmp_path / "image").read_bytes() == before
            vmm.tell("resume")
        check(vmm)


@ways
def test_paused_guest_stays_so_when_its_device_is_moved_or_lost(
    slow: list[RevivedStorage], tmp_path: Path, arguments: list[str]
) -> None:
    with bridged(slow[0], *arguments) as bridge, RustVmm(bridge.listen, queues=2) as vmm:
        time.sleep(0.1)
        vmm.tell("pause")
        before = (tmp_path / "image").read_bytes()
        bridge.command("switch", f"vhost-user:{slow[1].socket}")
        assert bridge.status().state == "suspended"
        slow[1].kill()
        eventually(lambda: bridge.status().failures == 1, "it is lost")
        with storage(tmp_path, 1):
            eventually(lambda: bridge.status().state == "suspended", "another one is there")
            time.sleep(0.1)
            assert bridge.status().state == "suspended"
            assert (tmp_path / "image").read_bytes() == before
            vmm.tell("resume")
            check(vmm)


@pytest.mark.soak
@ways
def test_guest_moves_with_its_requests_in_flight(
    slow: list[RevivedStorage], arguments: list[str]
) -> None:
    """Without GET_VRING_BASE: what is not done when it pauses is found behind the base."""
    with (
        bridged(slow[0], *arguments) as one,
        bridged(slow[1], *arguments) as other,
        RustVmm(one.listen, queues=2) as vmm,
    ):
        for _ in range(ROUNDS // 4):
            vmm.tell(f"migrate {other.listen}")
            vmm.tell(f"migrate {one.listen}")
        check(vmm)


@ways
def test_migration_that_is_cancelled_leaves_the_guest_going_on(
    slow: list[RevivedStorage], arguments: list[str]
) -> None:
    with bridged(slow[0], *arguments) as bridge, RustVmm(bridge.listen, queues=2) as vmm:
        for _ in range(3):
            vmm.tell("cancel")
        eventually(lambda: bridge.status().state == "running", "it runs")
        assert not bridge.status().dirty_log
        check(vmm)


def test_driver_that_begins_anew(slow: list[RevivedStorage]) -> None:
    with bridged(slow[0]) as bridge, RustVmm(bridge.listen, queues=2) as vmm:
        for _ in range(10):
            time.sleep(0.05)
            vmm.tell("reset")
        check(vmm)


@pytest.mark.soak
@pytest.mark.parametrize("end", [Bridge.kill, Bridge.stop])
def test_daemon_ends_and_the_vmm_connects_anew(
    slow: list[RevivedStorage], end: Callable[[Bridge], None]
) -> None:
    """It does so at once, and only once. It has a buffer of the requests in flight, and says of all
    others that they are done."""
    chance = random.Random(20261127)
    with ExitStack() as stack:
        bridge = stack.enter_context(bridged(slow[0], "--shadow"))
        vmm = stack.enter_context(RustVmm(bridge.listen, queues=2))
        for _ in range(ROUNDS // 2):
            bridge.wait_for_output("running vrings")
            time.sleep(chance.uniform(0, 0.1))
            end(bridge)
            bridge = stack.enter_context(bridged(slow[0], "--shadow"))
        counts = vmm.finish()
    assert counts["verified"] == counts["reads"] > 100 and counts["writes"] > 100, counts
    assert counts["reconnected"] == ROUNDS // 2
