"""DPDK virtio-user, the bridge and DPDK vhost: numbered frames, none lost, repeated or altered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.peers.bridge import Bridge
from tests.peers.process import eventually
from tests.peers.testpmd import Echo, Testpmd, frame, read_frames, write_frames
from tests.unit.fakes import memfd
from tests.vm.guest.frontend import ALL, LOG_SHMFD
from tests.vm.guest.keeper_net import PacketKeeper
from vhostbridge.backends.virtio import TransportFeature

COUNT = 2000


@contextmanager
def both(
    folder: Path, queues: int, options: str = "", serve: Sequence[str] = ()
) -> Iterator[tuple[Testpmd, Testpmd, Bridge]]:
    """The front-end, the back-end and the bridge; each side has COUNT frames a queue to send."""
    files: dict[str, list[Path]] = {"front": [], "back": []}
    for salt, side in enumerate(files):
        for queue in range(queues):
            path = folder / f"{side}{queue}.pcap"
            write_frames(path, [frame(i, salt * 100 + queue) for i in range(COUNT)])
            files[side].append(path)
    back = f"net_vhost0,iface={folder / 'vhost.sock'},queues={queues}"
    front = f"net_virtio_user0,path={folder / 'vm.sock'},queues={queues}{options}"
    with (
        Testpmd(back, files["back"], processor=1) as vhost,
        Bridge(
            f"vhost-user:{folder / 'vhost.sock'}", listen=folder / "vm.sock", arguments=serve
        ) as bridge,
        Testpmd(front, files["front"], processor=0) as user,
    ):
        yield user, vhost, bridge


def sent(queues: int, salt: int) -> list[list[bytes]]:
    return [[frame(i, salt * 100 + queue) for i in range(COUNT)] for queue in range(queues)]


def wait_for_all(program: Testpmd) -> list[list[bytes]]:
    """Every queue's frames, once there are as many as were sent."""
    eventually(
        lambda: all(len(read_frames(path)) >= COUNT for path in program.outgoing),
        f"{program.name} gets {COUNT} frames a queue",
        timeout=60,
    )
    return [read_frames(path) for path in program.outgoing]


@pytest.mark.parametrize(
    ("queues", "options"),
    [(1, ""), (4, ""), (2, ",packed_vq=1"), (1, ",packed_vq=1"), (1, ",in_order=0,mrg_rxbuf=0")],
    ids=["one pair", "four pairs", "two packed pairs", "packed", "plain"],
)
@pytest.mark.parametrize("serve", [[], ["--shadow"]], ids=["direct", "shadow"])
def test_frames_of_both_sides_arrive(
    tmp_path: Path, queues: int, options: str, serve: list[str]
) -> None:
    with both(tmp_path, queues, options, serve) as (user, vhost, bridge):
        vhost.tell("start")
        user.tell("start")
        assert wait_for_all(vhost) == sent(queues, salt=0)
        assert wait_for_all(user) == sent(queues, salt=1)
        packed = bool(bridge.status().features & TransportFeature.RING_PACKED.mask)
        assert packed == ("packed_vq=1" in options)


def test_packed_vrings_go_on_in_shadow_vrings_and_straight_again(tmp_path: Path) -> None:
    """From where DPDK says that they are, which tells only half of it."""
    keeper, socket = PacketKeeper(), tmp_path / "vhost.sock"
    with (
        Echo(f"net_vhost0,iface={socket}", processor=1),
        Bridge(
            f"vhost-user:{socket}", listen=tmp_path / "vm.sock", arguments=["--dirty-log", "shadow"]
        ) as bridge,
        memfd(1 << 20) as log,
    ):
        keeper.connect(str(bridge.listen), ALL | LOG_SHMFD)
        assert keeper.frontend is not None
        keeper.frontend.log_to(log.fileno(), 1 << 20)
        for on in (True, False) * 5:
            keeper.work(0.05)
            keeper.frontend.log_writes(on)
        keeper.finish()
        keeper.close()
    assert set(keeper.received.values()) == {1}


def test_frames_arrive_over_a_stop_of_the_port(tmp_path: Path) -> None:
    with both(tmp_path, 2) as (user, vhost, _):
        user.tell("port stop 0")
        user.tell("port start 0")
        vhost.tell("start")
        user.tell("start")
        assert wait_for_all(vhost) == sent(2, salt=0)
        assert wait_for_all(user) == sent(2, salt=1)


@pytest.mark.parametrize("serve", [[], ["--shadow"]], ids=["direct", "shadow"])
def test_frames_arrive_over_suspends(tmp_path: Path, serve: list[str]) -> None:
    with both(tmp_path, 2, serve=serve) as (user, vhost, bridge):
        vhost.tell("start")
        user.tell("start")
        for _ in range(10):
            assert bridge.operate("Suspend") == "suspended"
            assert bridge.operate("Resume") == "running"
        assert wait_for_all(vhost) == sent(2, salt=0)
        assert wait_for_all(user) == sent(2, salt=1)
