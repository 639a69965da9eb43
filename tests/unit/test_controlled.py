"""What a vDPA network device is told through its control vring, when, and what if it refuses."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import cast

import pytest
import trio

from tests.unit.control_device import ControlSide
from tests.unit.fakes import device_info, eventfd, memfd
from tests.unit.test_vdpa_faults import ALL, Kernel
from vhostbridge.backends.errors import BridgeError, TransportLost, Unsupported
from vhostbridge.backends.fds import OwnedFd
from vhostbridge.backends.guest import MemoryRegion, VringSetup
from vhostbridge.backends.lifecycle import State
from vhostbridge.backends.vdpa.chardev import BackendFeature, Chardev
from vhostbridge.backends.vdpa.device import VdpaDevice
from vhostbridge.backends.vdpa.opening import _capabilities
from vhostbridge.bridge import command_ring
from vhostbridge.bridge.command_ring import CommandRing
from vhostbridge.bridge.controlled import ControlledDevice, with_control

VERSION_1, CTRL_VQ, CTRL_RX, MQ, MAC_ADDR = 1 << 32, 1 << 17, 1 << 18, 1 << 22, 1 << 23
ANNOUNCE = 1 << 21
OFFER = VERSION_1 | CTRL_VQ | CTRL_RX | MQ | MAC_ADDR | ANNOUNCE
MAC = bytes.fromhex("525400123456")
SIZE = 0x20_0000
PROMISC = bytes((0, 0, 1))
ISOLATING = ALL | BackendFeature.IOTLB_ASID


def pairs(count: int) -> bytes:
    return bytes((4, 0, count, 0))


class NetKernel(Kernel):
    """A network device with four pairs; its control vring is in a group of its own, or not."""

    def __init__(self, features: BackendFeature, *, groups: bool = True) -> None:
        super().__init__(features)
        self.log: list[str] = []
        self.groups = groups
        self.negotiated = 0
        self.spaces: dict[int, dict[int, int]] = {0: {}, 1: {}}

    def _step(self, name: str) -> None:
        super()._step(name)
        self.log.append(name)

    def set_features(self, features: int) -> None:
        self._step("SET_FEATURES")
        self.negotiated = features & ~(1 << 33)

    def set_vring_enable(self, index: int, enabled: bool) -> None:
        self._step(f"{'enable' if enabled else 'disable'} {index}")

    def set_vring_kick(self, index: int, fd: OwnedFd | None) -> None:
        super().set_vring_kick(index, fd)
        self.log[-1] = f"{'kick' if fd is not None else 'no kick'} {index}"

    def vring_group(self, index: int) -> int:
        return int(self.groups and index in (2, 8))

    def address_space_count(self) -> int:
        return 2

    def set_group_asid(self, group: int, asid: int) -> None:
        self._step(f"group {group} to {asid}")

    def iotlb_batch_begin(self, asid: int = 0) -> None:
        pass

    iotlb_batch_end = iotlb_batch_begin

    def iotlb_map(self, iova: int, size: int, address: int, asid: int = 0) -> None:
        assert iova not in self.spaces[asid]
        self.spaces[asid][iova] = size

    def iotlb_unmap(self, iova: int, size: int, asid: int = 0) -> None:
        self.spaces[asid].pop(iova, None)

    def set_status(self, status: int) -> None:
        super().set_status(status)
        self.log[-1] = f"status {status}"


class Controlled(ControlledDevice):
    """Notes commands among the ioctls, and answers them as it is told."""

    def __init__(self, kernel: NetKernel, nursery: trio.Nursery, mac: bytes | None) -> None:
        info = device_info(features=OFFER, device_id=1, vring_limit=9, queue_num=4)
        capabilities = _capabilities(kernel.backend_features())
        super().__init__(VdpaDevice(cast(Chardev, kernel), info, capabilities), nursery, mac)
        self.kernel = kernel
        self.refused: set[bytes] = set()
        self.silent = False
        self.told: list[bytes] = []

    def _own_ring(self, relays: bool) -> CommandRing:
        ring = super()._own_ring(relays)
        ring.send = self.answer  # type: ignore[method-assign]
        return ring

    def answer(self, command: bytes, room: int = 1) -> bytes:
        self.kernel.log.append(command.hex())
        self.told.append(command)
        if self.silent:
            raise TransportLost("no answer")
        return bytes((command in self.refused,))


class Bench:
    def __init__(self, kernel: NetKernel, nursery: trio.Nursery, mac: bytes | None) -> None:
        self.kernel = kernel
        self.owned: list[OwnedFd] = []
        self.regions = [MemoryRegion(0, SIZE, self.own(memfd(SIZE)), 0, (0, 0, 0))]
        self.device = Controlled(kernel, nursery, mac)

    def own(self, fd: OwnedFd) -> OwnedFd:
        self.owned.append(fd)
        return fd

    def ring(self, index: int, *, enabled: bool = True) -> VringSetup:
        at = 0x10000 * index
        kick, call = self.own(eventfd()), self.own(eventfd())
        return VringSetup(index, 64, at, at + 0x1000, at + 0x2000, 0, kick, call, None, enabled)

    def rings(self, count: int, enabled: int = 99) -> list[VringSetup]:
        return [self.ring(index, enabled=index < enabled) for index in range(2 * count)]

    def commands(self) -> list[bytes]:
        """Those since it was asked last."""
        told, self.device.told = self.device.told, []
        return told


@asynccontextmanager
async def bench(
    features: BackendFeature = ISOLATING, *, mac: bytes | None = None, groups: bool = True
) -> AsyncIterator[Bench]:
    async with trio.open_nursery() as nursery:
        made = Bench(NetKernel(features, groups=groups), nursery, mac)
        try:
            await made.device.set_memory(made.regions)
            made.kernel.log.clear()
            yield made
        finally:
            await made.device.aclose()
            for fd in made.owned:
                fd.close()


async def test_commands_come_after_driver_ok_and_before_data_vrings() -> None:
    async with bench(mac=MAC) as b:
        await b.device.run(VERSION_1 | MQ, b.rings(2))
        log = b.kernel.log
        start = log.index("status 15")
        assert log[start - 2 : start] == ["enable 8", "GET_STATUS"]
        assert log[start + 1 :] == [
            "0101" + MAC.hex(), pairs(2).hex(), PROMISC.hex(), *[f"enable {n}" for n in range(4)]
        ]  # fmt: skip
        assert b.kernel.negotiated == VERSION_1 | MQ | CTRL_VQ | CTRL_RX | MAC_ADDR
        assert b.device.features == VERSION_1 | MQ


async def test_without_late_enabling_data_vrings_are_kicked_late() -> None:
    async with bench(ISOLATING & ~BackendFeature.ENABLE_AFTER_DRIVER_OK) as b:
        await b.device.run(VERSION_1 | MQ, b.rings(1))
        log = b.kernel.log
        start = log.index("status 15")
        assert log[log.index("no kick 0") : start] == [
            "no kick 0", "no kick 1", "enable 0", "enable 1", "enable 8", "GET_STATUS"
        ]  # fmt: skip
        assert log[start + 1 :] == [pairs(1).hex(), PROMISC.hex(), "kick 0", "kick 1"]


@pytest.mark.parametrize("groups", [True, False])
async def test_place_of_the_control_vring(groups: bool) -> None:
    async with bench(groups=groups) as b:
        await b.device.run(VERSION_1 | MQ, b.rings(1))
        assert ("group 1 to 1" in b.kernel.log) == groups
        assert [len(space) for space in b.kernel.spaces.values()] == ([1, 1] if groups else [2, 0])
        report = b.device.control_report()
        assert report["lies"] == f"{'apart from' if groups else 'beside'} guest memory"
        await b.device.reset()
        assert [len(space) for space in b.kernel.spaces.values()] == [1, 0]


async def test_no_address_space_without_negotiating_them() -> None:
    async with bench(ALL) as b:
        await b.device.run(VERSION_1 | MQ, b.rings(1))
        assert b.device.control_report()["lies"] == "beside guest memory"


async def test_guest_memory_keeps_off_a_control_vring_beside_it() -> None:
    async with bench(groups=False) as b:
        await b.device.run(VERSION_1 | MQ, b.rings(1))
        (own,) = set(b.kernel.spaces[0]) - {0}
        over = MemoryRegion(own - 0x1000, SIZE, b.own(memfd(SIZE)), 0, (0, 1, 0))
        with pytest.raises(Unsupported, match="where the control vring of fake:0 lies"):
            await b.device.set_memory([*b.regions, over])
        await b.device.suspend()
        await b.device.reset()
        await b.device.set_memory([*b.regions, over])
        await b.device.run(VERSION_1 | MQ, b.rings(1))
        assert len(b.kernel.spaces[0]) == 3


async def test_front_end_with_the_control_vring_keeps_it() -> None:
    async with bench(mac=MAC) as b:
        await b.device.run(VERSION_1 | CTRL_VQ, [*b.rings(1), b.ring(2)])
        assert b.kernel.negotiated == VERSION_1 | CTRL_VQ
        assert b.commands() == []
        assert b.device.control_report()["driver"] == "guest"


async def test_control_vring_that_is_negotiated_and_kept_back_is_driven() -> None:
    """cloud-hypervisor lets the guest's features through, and handles the control vring itself."""
    async with bench() as b:
        await b.device.run(VERSION_1 | CTRL_VQ | MQ, b.rings(2))
        assert b.kernel.negotiated == VERSION_1 | CTRL_VQ | MQ | CTRL_RX
        assert b.device.features == VERSION_1 | CTRL_VQ | MQ
        assert b.commands() == [pairs(2), PROMISC]
        assert b.device.control_report()["driver"] == "bridge"
        for index in (2, 3):
            await b.device.set_enabled(index, False)
        assert b.commands() == [pairs(1)]


async def test_announcing_is_left_to_the_front_end() -> None:
    async with bench() as b:
        await b.device.run(VERSION_1 | ANNOUNCE, b.rings(1))
        assert b.kernel.negotiated == VERSION_1 | CTRL_VQ | CTRL_RX
        assert b.commands() == [PROMISC]


async def test_more_pairs_than_negotiated_negotiate_them() -> None:
    async with bench() as b:
        await b.device.run(VERSION_1, b.rings(2))
        assert b.kernel.negotiated & MQ and b.device.features == VERSION_1
        assert b.commands() == [pairs(2), PROMISC]


async def test_pairs_follow_what_is_enabled() -> None:
    async with bench() as b:
        await b.device.run(VERSION_1 | MQ, b.rings(3, enabled=2))
        assert b.commands() == [pairs(1), PROMISC]
        await b.device.set_enabled(2, True)
        assert b.kernel.log[-2:] == ["enable 2", pairs(2).hex()]
        await b.device.set_enabled(3, True)
        b.kernel.log.clear()
        await b.device.set_enabled(2, False)
        assert b.kernel.log == ["disable 2"]
        await b.device.set_enabled(3, False)
        assert b.kernel.log[-2:] == [pairs(1).hex(), "disable 3"]


async def test_resumed_device_remembers_and_restarted_one_is_told_again() -> None:
    async with bench() as b:
        await b.device.run(VERSION_1 | MQ, b.rings(2))
        b.commands()
        await b.device.suspend()
        await b.device.resume()
        assert b.commands() == []
        await b.device.suspend()
        rings = [replace(v, base=None, enabled=v.index < 2) for v in b.device.vrings.values()]
        await b.device.run(VERSION_1 | MQ, rings)
        assert b.commands() == [pairs(1), PROMISC]
        await b.device.run(VERSION_1 | MQ, [replace(v, size=32, base=0) for v in rings])
        assert b.commands() == [pairs(1), PROMISC]


async def test_refused_mac_and_mode_are_told_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async with bench(mac=MAC) as b:
        b.device.refused = {PROMISC, b"\1\1" + MAC}
        await b.device.run(VERSION_1, b.rings(1))
        assert b.device.state is State.RUNNING
        assert "fake:0: the device refused MAC ADDR_SET" in caplog.text
        assert "fake:0: the device refused RX PROMISC" in caplog.text


async def test_refused_pairs_are_an_error_and_all_is_as_before() -> None:
    async with bench() as b:
        b.device.refused = {pairs(2)}
        with pytest.raises(Unsupported, match="refused to use 2 queue pairs"):
            await b.device.run(VERSION_1 | MQ, b.rings(2))
        assert b.device.state.value == "reset" and not b.kernel.runs
        await b.device.run(VERSION_1 | MQ, b.rings(2, enabled=2))
        with pytest.raises(Unsupported, match="refused to use 2 queue pairs"):
            await b.device.set_enabled(2, True)
        assert b.kernel.log[-3:] == ["enable 2", pairs(2).hex(), "disable 2"]
        assert b.device.state is State.RUNNING and b.kernel.runs
        with pytest.raises(Unsupported):
            await b.device.run(VERSION_1 | MQ, b.rings(2))
        assert b.device.state is State.RUNNING and b.kernel.runs
        assert {v.index for v in b.device.vrings.values() if v.enabled} == {0, 1}
        changed = [replace(v, size=32) for v in b.rings(2)]
        with pytest.raises(Unsupported):
            await b.device.run(VERSION_1 | MQ, changed)
        assert b.device.state is State.RUNNING and b.kernel.runs
        assert b.commands()[-2:] == [pairs(1), PROMISC]
        assert b.device.control_report()["pairs"] == "1"


async def test_device_that_stops_answering_is_failed() -> None:
    async with bench() as b:
        await b.device.run(VERSION_1 | MQ, b.rings(2, enabled=2))
        b.device.silent = True
        with pytest.raises(TransportLost):
            await b.device.set_enabled(2, True)
        assert b.device.state is State.FAILED and b.device.failure == "no answer"


async def test_one_ioctl_fails_with_a_control_vring() -> None:
    for step in range(60):
        async with bench() as b:
            await b.device.run(VERSION_1 | MQ, b.rings(2, enabled=2))
            b.kernel.arm(step)
            try:
                await b.device.run(VERSION_1 | MQ, b.rings(2))
                told = pairs(2)
            except BridgeError:
                told = pairs(1)
            b.kernel.arm(-1)
            if b.device.state is State.FAILED:
                assert b.device.failure
                continue
            assert b.device.state is State.RUNNING and b.kernel.runs, step
            assert [c for c in b.commands() if c[0] == 4][-1] == told, step
    assert told == pairs(2)


@pytest.mark.parametrize("missing", [CTRL_VQ, MAC_ADDR])
async def test_mac_for_a_device_that_takes_none(missing: int) -> None:
    kernel = NetKernel(ALL)
    info = device_info(features=OFFER & ~missing, device_id=1)
    inner = VdpaDevice(cast(Chardev, kernel), info, _capabilities(ALL))
    with pytest.raises(Unsupported, match="can't be given a MAC address"):
        async with with_control(inner, MAC):
            pass
    await inner.aclose()


async def test_whole_way_through_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with a device that takes its commands from the vring itself."""
    kernel, told = NetKernel(ISOLATING), list[bytes]()
    info = device_info(features=OFFER, device_id=1, vring_limit=9, queue_num=4)
    inner = VdpaDevice(cast(Chardev, kernel), info, _capabilities(ISOLATING))
    say = ControlledDevice._introduce

    def introduce(
        self: ControlledDevice, ring: CommandRing, features: int, vrings: Sequence[VringSetup]
    ) -> None:
        setup = ring.renew(features)
        with ControlSide(ring, setup, lambda command, room: b"\0", packed=False) as side:
            say(self, ring, features, vrings)
        told.extend(side.commands)

    monkeypatch.setattr(ControlledDevice, "_introduce", introduce)
    assert command_ring.PATIENCE == 5
    async with bench() as b, with_control(inner, MAC) as device:
        await device.set_memory(b.regions)
        await device.run(VERSION_1 | MQ, b.rings(3))
    assert told == [b"\1\1" + MAC, pairs(3), PROMISC]
