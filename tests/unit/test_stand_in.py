"""Front-ends whose device is not there: what they are answered, and how another one goes on."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import pytest
import trio
from trio.testing import MockClock

from tests.unit.fakes import LOG_ALL, RING_PACKED, FakeDevice, region, u64
from tests.unit.frontend import (
    DEVICE_GETS,
    FEATURES,
    MEMORY,
    OFFER,
    PF,
    USER,
    FrontEnd,
    connected,
    names,
)
from vhostbridge.backends.errors import PeerError, Unsupported
from vhostbridge.backends.fds import OwnedFd
from vhostbridge.backends.lifecycle import State
from vhostbridge.backends.state import DeviceState
from vhostbridge.backends.vhostuser.messages import Request as R
from vhostbridge.bridge.shadow import ShadowDevice

DIED = "its process died"
CONFIG = struct.pack("=III", 0, 60, 0) + bytes(60)


def publish(memory: OwnedFd, available: int, used: int, heads: list[int], done: list[int]) -> None:
    """Write vring 0's indices and its first entries."""
    at = 0x10000
    avail = struct.pack(f"<HH{len(heads)}H", 0, available, *heads)
    entries = b"".join(struct.pack("<II", head, 0) for head in done)
    os.pwrite(memory.fileno(), avail, at + 0x1000)
    os.pwrite(memory.fileno(), struct.pack("<HH", 0, used) + entries, at + 0x2000)


async def attach(vm: FrontEnd) -> FakeDevice:
    vm.device = FakeDevice()
    async with vm.session.lock:
        await vm.session.attach(vm.device)
    return vm.device


async def test_messages_are_answered_at_once(autojump_clock: MockClock) -> None:
    """None of them waits, and each is in force for the device that comes."""
    async with connected() as vm:
        await vm.start(0, 1, protocol=OFFER)
        before = await vm.ask(R.GET_CONFIG, CONFIG)
        publish(vm.memory, 3, 3, [], [])
        vm.device.fail(DIED)
        began = trio.current_time()
        assert await vm.ask(R.GET_CONFIG, CONFIG) == before
        assert await vm.ask(R.GET_FEATURES)
        assert await vm.ask(R.GET_STATUS)
        assert (await vm.base(0), await vm.base(1)) == (3, 0)
        await vm.ack(R.SET_STATUS, u64(0))
        more = region(MEMORY, MEMORY, USER + MEMORY)
        await vm.ack(R.ADD_MEM_REG, u64(0) + more, vm.memfd())
        for index, base in ((0, 3), (1, 0)):
            await vm.set_call(index)
            await vm.set_ring(index, base)
        await vm.ack(R.SET_STATUS, u64(0xF))
        assert trio.current_time() == began
        assert vm.session.awaiting
        device = await attach(vm)
        assert names(device.calls).count("run") == 1
        assert ("set_memory", (0, MEMORY), (MEMORY, MEMORY)) in device.calls
        assert device.bases == {0: 3, 1: 0}
        assert device.state is State.RUNNING


async def test_vrings_of_the_driver_before_are_forgotten(autojump_clock: MockClock) -> None:
    """Its rings were packed: the next driver's are not."""
    async with connected() as vm:
        await vm.set_up(FEATURES | RING_PACKED, OFFER & ~PF.STATUS)
        for index in (0, 1):
            await vm.set_call(index)
            await vm.set_ring(index, 0x8000)
        await vm.enable(0, 1)
        await vm.settle()
        await vm.session.hold()
        vm.device.fail(DIED)
        assert [await vm.base(index) for index in (0, 1)] == [0x80008000, 0x80008000]
        await vm.session.release()
        await vm.tell(R.SET_FEATURES, u64(FEATURES))
        await vm.set_ring(0)
        await vm.settle()
        assert vm.session.absence.state is not None
        assert [(v.index, v.base) for v in vm.session.absence.state.vrings] == [(0, 0)]


async def test_a_guest_that_was_stopped_meanwhile_stays_so(autojump_clock: MockClock) -> None:
    async with connected() as vm:
        await vm.start(0)
        vm.device.fail(DIED)
        assert await vm.base(0) == 0
        device = await attach(vm)
        assert "run" not in names(device.calls)
        await vm.settle()
        await vm.set_ring(0, 0)
        await vm.settle()
        assert device.take_calls()[-1] == ("run", DEVICE_GETS, (0, 0))


@pytest.mark.parametrize(("base", "told"), [(3, {"promisc": True}), (0, None)])
async def test_what_was_told_through_a_control_vring_is_told_again(
    autojump_clock: MockClock, base: int, told: dict[str, object] | None
) -> None:
    """But to another driver, whose vrings begin at 0, it is void."""

    class Told(FakeDevice):
        told: Mapping[str, object] | None = None

        def control_state(self) -> dict[str, object] | None:
            return {"promisc": True}

        def load(self, state: DeviceState) -> None:
            self.told = state.control
            super().load(state)

    async with connected(Told()) as vm:
        await vm.start(0)
        publish(vm.memory, 3, 3, [], [])
        vm.device.fail(DIED)
        assert await vm.base(0) == 3
        publish(vm.memory, base, base, [], [])
        await vm.set_ring(0, base)
        await vm.settle()
        vm.device = device = Told()
        await vm.session.attach(device)
        assert device.bases == {0: base}
        assert device.told == told


async def test_front_end_is_cut_off_when_what_is_in_flight_does_not_fit_any_more() -> None:
    """Another vring came meanwhile: where the first one was is lost with what was in flight."""

    class Shadowed(ShadowDevice):
        def __init__(self) -> None:
            self.fake = FakeDevice()
            super().__init__(self.fake, always=True)

        def take_calls(self) -> list[tuple[object, ...]]:
            return self.fake.take_calls()

    first, second = Shadowed(), Shadowed()
    async with connected(cast(FakeDevice, first)) as vm:
        await vm.start(0)
        vm.device.fail(DIED)
        await vm.set_call(1)
        await vm.set_ring(1)
        await vm.enable(1)
        await vm.settle()
        vm.device = cast(FakeDevice, second)
        await vm.session.attach(second)
        assert "vrings with requests in flight can't change" in str(await vm.lost())
    await first.aclose()
    await second.aclose()


async def test_a_reset_meanwhile_begins_anew(autojump_clock: MockClock) -> None:
    """As at system_reset: the next device starts with the guest's new vrings."""
    async with connected() as vm:
        await vm.start(0)
        publish(vm.memory, 9, 9, [], [])
        vm.device.fail(DIED)
        await vm.ack(R.RESET_DEVICE)
        publish(vm.memory, 0, 0, [], [])
        await vm.set_ring(0, 0)
        await vm.enable(0)
        await vm.settle()
        device = await attach(vm)
        assert device.bases == {0: 0}
        assert device.state is State.RUNNING


async def test_configuration_that_was_never_read_is_refused_after_a_while(
    autojump_clock: MockClock,
) -> None:
    async with connected() as vm:
        await vm.start(0)
        vm.device.fail(DIED)
        began = trio.current_time()
        assert len(await vm.ask(R.GET_CONFIG, CONFIG)) == 12
        assert trio.current_time() == began + 5
        await vm.nack(R.SET_CONFIG, CONFIG)
        assert not vm.ended.is_set()


async def test_a_write_of_configuration_waits_for_the_next_device(
    autojump_clock: MockClock,
) -> None:
    async with connected() as vm:
        await vm.start(0)
        vm.device.fail(DIED)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vm.ack, R.SET_CONFIG, CONFIG)
            await trio.sleep(2)
            device = await attach(vm)
        assert "write_config" in names(device.calls)


@pytest.mark.parametrize("changed", [True, False])
async def test_a_device_with_another_configuration_is_announced(
    autojump_clock: MockClock, changed: bool
) -> None:
    async with connected() as vm:
        await vm.start(0)
        reverse = await vm.reverse()
        await vm.ask(R.GET_CONFIG, CONFIG)
        vm.device.fail(DIED)
        await trio.sleep(1)
        vm.device = FakeDevice()
        if changed:
            vm.device.config = b"\xff" * 64
        await vm.session.attach(vm.device)
        with trio.move_on_after(1) as waited:
            assert (await reverse.receive()) is not None
        assert waited.cancelled_caught is not changed
        reverse.close()


async def test_a_front_end_waits_no_longer_than_it_is_allowed(autojump_clock: MockClock) -> None:
    async with connected(backend_timeout=30) as vm:
        await vm.start(0)
        vm.device.fail(DIED)
        await trio.sleep(29)
        assert not vm.ended.is_set()
        assert str(await vm.lost()) == (
            f"the device failed: {DIED}; another one was not there within 30 s"
        )


async def test_by_default_it_waits_for_ever(autojump_clock: MockClock) -> None:
    async with connected() as vm:
        await vm.start(0)
        vm.device.fail(DIED)
        await trio.sleep(80_000)
        assert not vm.ended.is_set()
        assert (await attach(vm)).state is State.RUNNING


@pytest.mark.parametrize(
    ("heads", "done", "base"),
    [
        pytest.param([0, 1, 2], [], 0, id="nothing since"),
        pytest.param([5, 6, 7], [6, 5], 2, id="the next two"),
        pytest.param([5, 6, 7], [7, 5], None, id="one that was overtaken"),
    ],
)
async def test_what_a_hung_device_did_since_counts_if_it_is_certain(
    autojump_clock: MockClock, heads: list[int], done: list[int], base: int | None
) -> None:
    async with connected() as vm:
        await vm.start(0)
        vm.device.hangs = True
        vm.device.fail("it does not answer")
        await trio.sleep(1)
        publish(vm.memory, len(heads), len(done), heads, done)
        device = FakeDevice()
        await vm.session.attach(device)
        if base is None:
            assert "it hung" in str(await vm.lost())
        else:
            vm.device = device
            assert device.bases == {0: base}


async def test_protocol_features_are_offered_as_before(autojump_clock: MockClock) -> None:
    async with connected() as vm:
        await vm.start(0)
        before = await vm.ask(R.GET_PROTOCOL_FEATURES)
        vm.device.fail(DIED)
        assert await vm.ask(R.GET_PROTOCOL_FEATURES) == before
        assert PF.STATUS in PF(int.from_bytes(before, "little"))


async def test_front_end_waits_on_when_a_device_does_not_take_its_log(
    autojump_clock: MockClock,
) -> None:
    """It must not be left with one that nobody opens again, because it never failed."""
    async with connected() as vm:
        await vm.start(0)
        await vm.ask(R.SET_LOG_BASE, struct.pack("=QQ", 64, 0), vm.memfd())
        await vm.tell(R.SET_FEATURES, u64(FEATURES | LOG_ALL))
        await vm.settle()
        vm.device.fail(DIED)
        await trio.sleep(1)
        first = FakeDevice()
        first.refuse["log_writes"] = PeerError("no log today")
        await vm.session.attach(first)
        assert first.failure == "no log today"
        await trio.sleep(1)
        device = await attach(vm)
        assert device.state is State.RUNNING and device.logging == (64, {})


async def test_device_with_less_of_the_protocol_does_not_take_the_place(
    autojump_clock: MockClock,
) -> None:
    """The front-end's buffer for requests in flight would be of no use to it, for one."""
    first = FakeDevice()
    first.info = replace(first.info, forwards_mtu=True)
    async with connected(first) as vm:
        await vm.start(0, protocol=OFFER & ~PF.STATUS | PF.NET_MTU)
        vm.device.fail(DIED)
        await trio.sleep(1)
        second = FakeDevice()
        with pytest.raises(Unsupported, match=r"uses NET_MTU, which can't be had with fake:0"):
            await vm.session.attach(second)
        assert second.take_calls() == [] and vm.session.awaiting
        vm.device = FakeDevice(first.info)
        await vm.session.attach(vm.device)
        assert vm.device.state is State.RUNNING


async def test_driver_sees_of_the_next_device_what_it_has_read_before(
    autojump_clock: MockClock,
) -> None:
    """It was moved here from a device with less, and may have to go back there."""
    devices = [ShadowDevice(FakeDevice()) for _ in range(2)]
    devices[0].shown = {4: b"\xee"}
    async with connected(cast(FakeDevice, devices[0])) as vm:
        await vm.set_up(protocol=OFFER & ~PF.STATUS)
        await vm.set_ring(0)
        await vm.enable(0)
        await vm.settle()
        reverse = await vm.reverse()
        before = await vm.ask(R.GET_CONFIG, CONFIG)
        assert before[12 + 4] == 0xEE
        devices[0].fail(DIED)
        await trio.sleep(1)
        await vm.session.attach(devices[1])
        assert await vm.ask(R.GET_CONFIG, CONFIG) == before
        with trio.move_on_after(1) as waited:
            await reverse.receive()
        assert waited.cancelled_caught
        reverse.close()
        vm.device.fail("not it")
    for device in devices:
        await device.aclose()
