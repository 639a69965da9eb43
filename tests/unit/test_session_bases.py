"""Where a vring begins: at what its front-end told, or where guest memory shows that it was."""

from __future__ import annotations

import os

import pytest
from trio.testing import MockClock

from tests.unit.fakes import state, u64
from tests.unit.frontend import DEVICE_GETS, OFFER, PF, FrontEnd, connected, ring
from tests.unit.test_session_inflight import Noting, get_buffer
from vhostbridge.backends.vhostuser.messages import Request as R


def set_indices(vm: FrontEnd, index: int, available: int, used: int) -> None:
    at = 0x10000 * (index + 1)
    os.pwrite(vm.memory.fileno(), available.to_bytes(2, "little"), at + 0x1002)
    os.pwrite(vm.memory.fileno(), used.to_bytes(2, "little"), at + 0x2002)


async def test_cloud_hypervisor_leaves_requests_undone_behind_the_base(
    autojump_clock: MockClock,
) -> None:
    """It tells the available index of a vring that ran elsewhere. Receive buffers wait there."""
    async with connected() as vm:
        await vm.set_up(protocol=OFFER & ~PF.STATUS)
        set_indices(vm, 0, available=300, used=172)
        set_indices(vm, 1, available=9, used=9)
        vm.need_reply = True
        for index, base in ((0, 300), (1, 9)):
            await vm.tell(R.SET_VRING_NUM, state(index, 128))
            await vm.tell(R.SET_VRING_ADDR, ring(index))
            await vm.tell(R.SET_VRING_BASE, state(index, base))
            await vm.set_kick(index)
        await vm.enable(0, 1)
        await vm.settle()
        assert vm.device.take_calls()[1:] == [("run", DEVICE_GETS, (0, 172), (1, 9))]


async def test_driver_may_have_gone_on_since_its_front_end_looked(
    autojump_clock: MockClock,
) -> None:
    """The vCPUs run as soon as all messages are acknowledged; the device starts after that."""
    async with connected() as vm:
        await vm.set_up(protocol=OFFER & ~PF.STATUS)
        set_indices(vm, 0, available=2, used=65530)
        await vm.set_ring(0, base=65535)
        await vm.enable(0)
        await vm.settle()
        assert vm.device.take_calls()[-1] == ("run", DEVICE_GETS, (0, 65530))


@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
async def test_only_a_buffer_that_was_used_knows_what_is_in_flight(
    autojump_clock: MockClock, used: bool
) -> None:
    """cloud-hypervisor makes a new one when its guest comes from elsewhere."""
    async with connected(Noting()) as vm:
        await vm.set_up(protocol=OFFER & ~PF.STATUS | PF.INFLIGHT_SHMFD)
        payload, fd = await get_buffer(vm)
        if used:
            os.pwrite(fd.fileno(), b"\1\0", 8)
        await vm.ack(R.SET_INFLIGHT_FD, payload, fd)
        set_indices(vm, 0, available=300, used=290)
        await vm.set_ring(0, base=300)
        await vm.enable(0)
        await vm.settle()
        assert vm.device.take_calls()[-1] == ("run", DEVICE_GETS, (0, 300 if used else 290))


async def test_base_of_a_device_that_was_stopped_is_its_own(autojump_clock: MockClock) -> None:
    """It may hold what it has not used."""
    async with connected() as vm:
        await vm.start(0)
        vm.device.bases[0] = 300
        await vm.enable(0, on=0)
        assert await vm.base(0) == 300
        set_indices(vm, 0, available=300, used=290)
        vm.device.take_calls()
        await vm.set_ring(0, base=300)
        await vm.enable(0)
        await vm.settle()
        assert vm.device.take_calls() == [("run", DEVICE_GETS, (0, 300))]


async def test_vring_of_a_listening_dpdk_goes_on_at_its_used_index(
    autojump_clock: MockClock,
) -> None:
    """It says 0 of every split vring, also of one that ran before the bridge connected anew, and
    before that stops on the new connection what ran on the old one."""
    async with connected() as vm:
        await vm.enable(0, 1, on=0)
        assert [await vm.base(index) for index in (0, 1)] == [0, 0]
        await vm.set_up()
        set_indices(vm, 0, available=2256, used=2000)
        set_indices(vm, 1, available=2000, used=2000)
        for index in (0, 1):
            await vm.set_ring(index, base=0)
        await vm.enable(0, 1)
        await vm.ack(R.SET_STATUS, u64(0xF))
        assert vm.device.take_calls()[-1] == ("run", DEVICE_GETS, (0, 2000), (1, 2000))


async def test_vring_of_dragonball_goes_on_though_it_tells_no_base(
    autojump_clock: MockClock,
) -> None:
    """When a back-end connects anew it leaves that out: it does not know."""
    async with connected() as vm:
        await vm.set_up(protocol=PF.MQ)
        set_indices(vm, 0, available=40, used=30)
        await vm.tell(R.SET_VRING_NUM, state(0, 256))
        await vm.tell(R.SET_VRING_ADDR, ring(0))
        await vm.set_kick(0)
        await vm.set_call(0)
        await vm.enable(0)
        await vm.settle()
        assert vm.device.take_calls()[-1] == ("run", DEVICE_GETS, (0, 30))


async def test_indices_that_no_driver_has_left_are_not_gone_by(autojump_clock: MockClock) -> None:
    async with connected() as vm:
        await vm.set_up()
        set_indices(vm, 0, available=7, used=2000)
        await vm.set_ring(0, base=0)
        await vm.enable(0)
        await vm.settle()
        assert vm.device.take_calls()[-1] == ("run", DEVICE_GETS, (0, 0))
