"""A device that stands still for its front-end: every vring is disabled, or its memory is away."""

from __future__ import annotations

import pytest
from trio.testing import MockClock

from tests.unit.fakes import FakeDevice, OnVdpa, Stateful, region, state
from tests.unit.frontend import DEVICE_GETS, MEMORY, USER, FrontEnd, connected
from tests.unit.store import Store
from tests.unit.test_succession import begins, clean, end, leave, take_over
from vhostbridge.backends.errors import Unsupported
from vhostbridge.backends.lifecycle import State
from vhostbridge.backends.vhostuser.messages import Request as R

REGION = bytes(8) + region(0, MEMORY, USER)


def stands_still(device: FakeDevice) -> bool:
    return device.state is State.SUSPENDED


def runs(device: FakeDevice) -> bool:
    return device.state is State.RUNNING


async def test_cloud_hypervisor_pauses_by_disabling(autojump_clock: MockClock) -> None:
    async with connected() as vm:
        await vm.start(0, 1)
        vm.need_reply = True
        await vm.enable(0, 1, on=0)
        assert vm.device.take_calls()[:2] == [("set_enabled", 0, False), ("suspend",)]
        await vm.settle()
        assert stands_still(vm.device)
        await vm.enable(0, 1)
        await vm.settle()
        assert vm.device.take_calls()[-1] == ("run", DEVICE_GETS, (0, None), (1, None))


async def test_pause_that_fails_leaves_the_device_running(autojump_clock: MockClock) -> None:
    async with connected() as vm:
        await vm.start(0, 1)
        vm.device.refuse["suspend"] = Unsupported("no")
        await vm.ack(R.SET_VRING_ENABLE, state(0, 0))
        await vm.nack(R.SET_VRING_ENABLE, state(1, 0))
        await vm.settle()
        assert runs(vm.device) and vm.session.vrings[1].enabled


async def test_device_that_is_released_meanwhile_stays_paused(autojump_clock: MockClock) -> None:
    """The operator had suspended it before the front-end did."""
    async with connected() as vm:
        await vm.start(0, 1)
        async with vm.session.lock:
            await vm.session.hold()
        vm.need_reply = True
        await vm.enable(0, 1, on=0)
        async with vm.session.lock:
            await vm.session.release()
        await vm.settle()
        assert stands_still(vm.device)
        await vm.enable(0, 1)
        await vm.settle()
        assert runs(vm.device)


async def test_device_that_comes_meanwhile_stays_paused(autojump_clock: MockClock) -> None:
    """The one that was paused is gone, and another one takes its place."""
    other = FakeDevice()
    async with connected() as vm:
        await vm.start(0, 1)
        vm.device.fail("gone")
        await vm.settle()
        vm.need_reply = True
        await vm.enable(0, 1, on=0)
        async with vm.session.lock:
            await vm.session.attach(other)
        vm.device = other
        await vm.settle()
        assert stands_still(other)
        await vm.enable(0, 1)
        await vm.settle()
        assert runs(other)
        assert [ring.enabled for ring in other.rings.values()] == [True, True]


async def test_back_end_with_state_of_its_own_is_lost_with_it(autojump_clock: MockClock) -> None:
    """Paused or not: nobody else has that state."""
    async with connected(Stateful()) as vm:
        await vm.start(0, 1)
        await vm.enable(0, 1, on=0)
        await vm.settle()
        vm.device.fail("gone")
        assert "gone" in str(await vm.lost())


async def test_device_that_waits_for_its_state_can_be_paused(autojump_clock: MockClock) -> None:
    """The operator holds it: its back-end was replaced, and `load` comes next."""
    other = Stateful()
    async with connected(Stateful()) as vm:
        await vm.start(0, 1)
        async with vm.session.lock:
            await vm.session.hold()
        vm.device.fail("gone")
        await vm.settle()
        async with vm.session.lock:
            await vm.session.attach(other)
        vm.device = other
        await vm.ack(R.SET_VRING_ENABLE, state(0, 0))
        await vm.ack(R.SET_VRING_ENABLE, state(1, 0))
        assert vm.session.paused


async def test_vring_that_stops_after_a_pause_is_no_pause(autojump_clock: MockClock) -> None:
    async with connected() as vm:
        await vm.start(0, 1)
        await vm.enable(0, 1, on=0)
        await vm.enable(0)
        await vm.settle()
        assert runs(vm.device)
        await vm.base(0)
        assert not vm.session.paused


async def test_libkrun_begins_anew_with_fewer_vrings(autojump_clock: MockClock) -> None:
    """The firmware's driver has one; nobody stops those of the driver before it."""
    async with connected() as vm:
        await vm.start(0, 1)
        await vm.enable(0, 1, on=0)
        await vm.settle()
        vm.device.take_calls()
        await vm.set_ring(0, size=64)
        await vm.set_call(0)
        await vm.enable(0)
        await vm.settle()
        assert vm.device.take_calls()[-2:] == [("stop_vring", 1), ("run", DEVICE_GETS, (0, 0))]
        assert runs(vm.device)


# Between REM_MEM_REG and ADD_MEM_REG of a region that grows.
async def take_memory_away(vm: FrontEnd) -> None:
    vm.need_reply = True
    await vm.ack(R.REM_MEM_REG, REGION)
    await vm.settle()
    assert stands_still(vm.device)


async def test_device_that_is_released_without_its_memory_waits(autojump_clock: MockClock) -> None:
    async with connected() as vm:
        await vm.start(0, 1)
        await take_memory_away(vm)
        async with vm.session.lock:
            await vm.session.hold()
            await vm.session.release()
        assert stands_still(vm.device)
        await vm.ack(R.ADD_MEM_REG, REGION, vm.memory)
        await vm.settle()
        assert runs(vm.device)


async def test_device_that_is_moved_without_its_memory_waits(autojump_clock: MockClock) -> None:
    other = FakeDevice()
    async with connected() as vm:
        await vm.start(0, 1)
        await take_memory_away(vm)
        async with vm.session.lock:
            other.load(await vm.device.capture())
            await vm.session.move_to(other)
        assert stands_still(other)
        vm.device = other
        await vm.ack(R.ADD_MEM_REG, REGION, vm.memory)
        await vm.settle()
        assert runs(other)


@pytest.mark.parametrize("back", [False, True], ids=["away", "back"])
async def test_front_end_without_memory_goes_to_the_next_process(*, back: bool) -> None:
    """No clock that jumps: a state is packed in a thread, within a time."""
    store, other = Store(), OnVdpa()
    async with connected(OnVdpa()) as vm:
        await vm.start(0)
        await take_memory_away(vm)
        if back:
            await vm.ack(R.ADD_MEM_REG, REGION, vm.memory)
        await leave(vm, store)
        session = await take_over(begins(store), other)
        assert runs(other) is back
        await end(session)
        await clean(vm.device)
