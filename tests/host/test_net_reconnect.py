"""DPDK virtio-user that listens, over restarts of the bridge: it begins at 0 each time."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.host.test_net import COUNT, wait_for_all
from tests.peers.bridge import Bridge
from tests.peers.process import eventually
from tests.peers.testpmd import Testpmd, frame, write_frames


def program(vdev: str, path: Path, salt: int) -> Testpmd:
    write_frames(path, [frame(i, salt) for i in range(COUNT)])
    return Testpmd(vdev, [path], processor=salt)


def send(*programs: Testpmd) -> None:
    """All that there is in the files, once more."""
    for one in programs:
        one.tell("stop")
        for command in ("port stop 1", "port start 1"):
            one.tell(command)
    for one in programs:
        one.tell("start")


@pytest.mark.parametrize("options", ["", ",packed_vq=1"], ids=["split", "packed"])
@pytest.mark.parametrize("serve", [[], ["--shadow"]], ids=["direct", "shadow"])
def test_frames_arrive_when_the_bridge_connects_anew(
    tmp_path: Path, serve: Sequence[str], options: str
) -> None:
    vm, back = tmp_path / "vm.sock", tmp_path / "vhost.sock"
    with ExitStack() as stack:
        vhost = stack.enter_context(program(f"net_vhost0,iface={back}", tmp_path / "back.pcap", 1))

        def bridged() -> Bridge:
            bridge = Bridge(f"vhost-user:{back}", connect=vm, arguments=serve)
            return stack.enter_context(bridge)

        bridge = bridged()
        front = f"net_virtio_user0,path={vm},server=1{options}"
        user = stack.enter_context(program(front, tmp_path / "front.pcap", 0))
        for _ in range(3):
            eventually(lambda: bridge.status().state == "running", "it runs")  # noqa: B023
            send(vhost, user)
            assert wait_for_all(vhost) == [[frame(i, 0) for i in range(COUNT)]]
            assert wait_for_all(user) == [[frame(i, 1) for i in range(COUNT)]]
            bridge.kill()
            bridge = bridged()
