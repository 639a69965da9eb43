"""Sessions whose device the operator suspends, loses and loads; and states that wait for one."""

from __future__ import annotations

import os
import struct
from dataclasses import replace

import pytest
import trio
from trio.testing import MockClock

from tests.unit.fakes import RING_PACKED, FakeDevice, device_info, signals, u64
from tests.unit.frontend import DEVICE_GETS, FEATURES, OFFER, PF, FrontEnd, connected, names
from vhostbridge.backends.errors import BridgeError, InvalidTransition, Unsupported
from vhostbridge.backends.lifecycle import State
from vhostbridge.backends.state import DeviceState
from vhostbridge.backends.vhostuser.messages import Request as R
from vhostbridge.bridge.incoming import Incoming, disagreements


async def saved(*bases: int) -> DeviceState:
    """The state of a device that `FrontEnd.start` started, stopped at `bases`."""
    async with connected() as vm:
        await vm.start(*range(len(bases)))
        vm.device.bases.update(enumerate(bases))
        await vm.device.suspend()
        return await vm.device.capture()


def publish(vm: FrontEnd, index: int, *, available: int, used: int) -> None:
    """Write both indices of a vring into guest memory."""
    at = 0x10000 * (index + 1)
    os.pwrite(vm.memory.fileno(), struct.pack("<H", available), at + 0x1000 + 2)
    os.pwrite(vm.memory.fileno(), struct.pack("<H", used), at + 0x2000 + 2)


async def test_a_held_device_is_not_started_by_messages(autojump_clock: MockClock) -> None:
    async with connected() as vm:
        await vm.start(0)
        await vm.session.hold()
        vm.device.take_calls()
        await vm.set_call(0)
        await vm.set_kick(0)
        await vm.settle()
        assert "run" not in names(vm.device.take_calls())
        assert vm.device.state is State.SUSPENDED


async def test_a_held_device_is_not_started_by_driver_ok(autojump_clock: MockClock) -> None:
    async with connected() as vm:
        await vm.start(0, protocol=OFFER)
        vm.device.bases[0] = 8
        await vm.session.hold()
        assert await vm.base(0) == 8
        await vm.ack(R.SET_STATUS, u64(0))
        await vm.set_ring(0, base=8)
        await vm.ack(R.SET_STATUS, u64(0xF))
        await vm.settle()
        assert vm.device.state is State.SUSPENDED
        vm.device.take_calls()
        await vm.session.release()
        assert vm.device.take_calls() == [("run", DEVICE_GETS, (0, 8))]


async def test_release_goes_on_and_signals_each_vring_once(autojump_clock: MockClock) -> None:
    async with connected() as vm:
        await vm.start(0, 1)
        await vm.session.hold()
        for fd in (*vm.kicks.values(), *vm.calls.values()):
            signals(fd)
        await vm.session.release()
        assert vm.device.state is State.RUNNING
        assert [signals(fd) for fd in (*vm.kicks.values(), *vm.calls.values())] == [1, 1, 1, 1]


async def test_release_uses_the_eventfds_that_came_meanwhile(autojump_clock: MockClock) -> None:
    async with connected() as vm:
        await vm.start(0)
        await vm.session.hold()
        await vm.set_call(0)
        await vm.settle()
        await vm.session.release()
        call = vm.device.rings[0].call
        assert call is not None
        signals(vm.calls[0])
        os.eventfd_write(call.fileno(), 1)
        assert signals(vm.calls[0]) == 1


async def test_a_suspend_that_is_refused_holds_nothing(autojump_clock: MockClock) -> None:
    async with connected() as vm:
        await vm.start(0)
        vm.device.refuse["suspend"] = Unsupported("not today")
        with pytest.raises(Unsupported):
            await vm.session.hold()
        assert not vm.session.held
        assert vm.device.state is State.RUNNING


async def test_a_hold_that_fails_lets_only_vrings_go_on_that_ran(autojump_clock: MockClock) -> None:
    """Those of the vring that the front-end had stopped are closed."""
    async with connected(FakeDevice(whole=False)) as vm:
        await vm.start(0, 1)
        assert await vm.base(1) == 0
        vm.device.take_calls()
        vm.device.refuse["read_config"] = Unsupported("not today")
        with pytest.raises(Unsupported, match="not today"):
            await vm.session.hold()
        assert not vm.session.held
        assert vm.device.take_calls()[-1] == ("run", DEVICE_GETS, (0, None))
        assert list(vm.device.rings) == [0]


async def test_a_suspend_that_nobody_waits_for_any_more_holds_nothing(
    autojump_clock: MockClock,
) -> None:
    """Else the device, should it fail, would be taken to be where it was held last: long ago."""
    operator = trio.CancelScope()

    class Slow(FakeDevice):
        async def full_config(self) -> bytes:
            if self.bases[0] == 9:
                operator.cancel()
            return await super().full_config()

    async with connected(Slow()) as vm:
        await vm.start(0)
        await vm.session.hold()
        await vm.session.release()
        vm.device.bases[0] = 9
        publish(vm, 0, available=9, used=9)
        with operator:
            await vm.session.hold()
        assert vm.device.state is State.RUNNING and not vm.session.held
        vm.device.fail("its process died")
        await trio.sleep(1)
        vm.device = FakeDevice()
        await vm.session.attach(vm.device)
        assert vm.device.bases == {0: 9}


async def test_a_resume_that_is_refused_stays_held(autojump_clock: MockClock) -> None:
    async with connected() as vm:
        await vm.start(0)
        await vm.session.hold()
        vm.device.refuse["run"] = Unsupported("not today")
        with pytest.raises(Unsupported):
            await vm.session.release()
        assert vm.session.held
        await vm.session.release()
        assert vm.device.state is State.RUNNING


async def test_a_held_device_that_fails_is_replaced_where_it_stopped(
    autojump_clock: MockClock,
) -> None:
    async with connected() as vm:
        await vm.start(0, 1)
        vm.device.bases.update({0: 5, 1: 6})
        await vm.session.hold()
        vm.device.fail("its process died")
        await trio.sleep(1)
        assert not vm.ended.is_set()
        second = FakeDevice()
        await vm.session.attach(second)
        await vm.session.release()
        assert second.take_calls()[-1] == ("run", DEVICE_GETS, (0, None), (1, None))
        assert second.bases == {0: 5, 1: 6}
        assert second.state is State.RUNNING
        vm.device = second


async def test_the_replacement_of_a_stateful_device_has_to_be_loaded(
    autojump_clock: MockClock,
) -> None:
    class Stateful(FakeDevice):
        internal_owner = "virtiofsd"

    async with connected(Stateful()) as vm:
        await vm.start(0)
        await vm.session.hold()
        vm.device.fail("its process died")
        second = Stateful()
        await vm.session.attach(second)
        vm.device = second
        assert second.state is State.RESET
        second.load(replace(await saved(7), internal_owner="virtiofsd"))
        await vm.session.release()
        assert second.take_calls()[-1] == ("run", DEVICE_GETS, (0, None))
        assert second.bases == {0: 7}


async def test_a_device_that_fails_while_it_runs_is_replaced_where_memory_says(
    autojump_clock: MockClock,
) -> None:
    async with connected() as vm:
        await vm.start(0, 1)
        vm.device.bases.update({0: 9, 1: 9})
        publish(vm, 0, available=5, used=5)
        publish(vm, 1, available=6, used=6)
        vm.device.fail("its process died")
        await trio.sleep(3)
        assert vm.session.awaiting
        second = vm.device = FakeDevice()
        await vm.session.attach(second)
        assert second.state is State.RUNNING
        assert second.bases == {0: 5, 1: 6}
        assert signals(vm.kicks[0]) >= 1


async def test_a_replacement_that_does_not_run_is_replaced_too(autojump_clock: MockClock) -> None:
    async with connected() as vm:
        await vm.start(0)
        publish(vm, 0, available=5, used=5)
        vm.device.fail("its process died")
        assert vm.session.awaiting
        second = FakeDevice()
        second.refuse["run"] = Unsupported("not today")
        await vm.session.attach(second)
        assert second.failed.is_set()
        await trio.sleep(1)
        assert vm.session.awaiting and not vm.ended.is_set()
        third = vm.device = FakeDevice()
        await vm.session.attach(third)
        assert third.state is State.RUNNING
        assert third.bases == {0: 5}


async def test_a_device_that_fails_with_requests_in_flight_is_lost(
    autojump_clock: MockClock,
) -> None:
    async with connected() as vm:
        await vm.start(0)
        publish(vm, 0, available=5, used=4)
        vm.device.fail("its process died")
        assert "its process died" in str(await vm.lost())


async def test_a_replacement_that_lacks_a_feature_is_not_taken(autojump_clock: MockClock) -> None:
    async with connected() as vm:
        await vm.start(0)
        vm.device.fail("its process died")
        with pytest.raises(BridgeError, match="was not offering"):
            await vm.session.attach(FakeDevice(device_info(features=1 << 32)))
        assert vm.session.awaiting


async def test_a_packed_ring_of_a_device_that_fails_is_lost(autojump_clock: MockClock) -> None:
    async with connected() as vm:
        await vm.set_up(features=FEATURES | RING_PACKED, protocol=OFFER & ~PF.STATUS)
        await vm.set_ring(0, base=0x80008000)
        await vm.enable(0)
        await vm.settle()
        vm.device.fail("its process died")
        assert "its process died" in str(await vm.lost())


# States that wait


async def loaded(vm: FrontEnd, *bases: int) -> None:
    before = await saved(*bases)
    vm.device.load(before)
    vm.session.incoming = Incoming(before)


async def test_a_front_end_goes_on_from_the_waiting_state(autojump_clock: MockClock) -> None:
    async with connected() as vm:
        await loaded(vm, 41, 42)
        await vm.set_up(protocol=OFFER & ~PF.STATUS)
        for index, base in enumerate((41, 42)):
            await vm.set_ring(index, base=base)
        await vm.enable(0, 1)
        await vm.settle()
        assert vm.device.take_calls()[-1] == ("run", DEVICE_GETS, (0, 41), (1, 42))
        assert vm.session.incoming is None


async def test_bases_that_disagree_are_refused_with_both_values(autojump_clock: MockClock) -> None:
    async with connected() as vm:
        await loaded(vm, 0x41)
        await vm.set_up(protocol=OFFER & ~PF.STATUS)
        await vm.set_ring(0, base=0x40)
        await vm.enable(0)
        assert "vring 0 has base 0x40 where the state has 0x41" in str(await vm.lost())
        vm.device.fail("of no more use")


async def test_features_that_disagree_are_refused_by_name(autojump_clock: MockClock) -> None:
    async with connected() as vm:
        await loaded(vm, 1)
        await vm.set_up(features=(1 << 32) | (1 << 30), protocol=OFFER & ~PF.STATUS)
        await vm.set_ring(0, base=1)
        await vm.enable(0)
        text = str(await vm.lost())
        assert "only the state has" in text
        assert "INDIRECT_DESC" in text
        vm.device.fail("of no more use")


async def test_a_reset_before_the_start_keeps_the_waiting_state(autojump_clock: MockClock) -> None:
    async with connected() as vm:
        await loaded(vm, 3)
        await vm.set_up()
        await vm.ack(R.RESET_DEVICE)
        await vm.ack(R.SET_STATUS, u64(0))
        await vm.set_ring(0, base=3)
        await vm.enable(0)
        await vm.ack(R.SET_STATUS, u64(0xF))
        assert vm.device.take_calls()[-1] == ("run", DEVICE_GETS, (0, 3))


async def test_a_front_end_that_only_looks_leaves_the_waiting_state(
    autojump_clock: MockClock,
) -> None:
    async with connected() as vm:
        await loaded(vm, 3)
        await vm.negotiate()
        await vm.ask(R.GET_FEATURES)
        vm.peer.close()
        await vm.ended.wait()
        assert vm.session.incoming is not None
        assert vm.device.state is State.SUSPENDED
        await vm.device.reset()


async def test_a_state_names_every_difference_to_the_front_end(
    autojump_clock: MockClock,
) -> None:
    before = await saved(3, 4)
    vring = before.vrings[0]
    other = replace(before, features=1, vrings=(replace(vring, size=64, device_area=0),))
    async with connected() as vm:
        vm.device.load(before)
        reasons = disagreements(other, vm.device.features, vm.device.vrings)
        await vm.device.reset()
    assert len(reasons) == 3
    assert "size 0x100 where the state has 0x40" not in reasons[0]
    assert "size 0x100 where the state has 0x40, device area" in reasons[1]
    assert reasons[2] == "the front-end runs vring 1, which the state lacks"


async def test_a_running_device_is_not_loaded(autojump_clock: MockClock) -> None:
    async with connected() as vm:
        await vm.start(0)
        with pytest.raises(InvalidTransition, match="cannot load a device that is running"):
            vm.device.load(await saved(1))
