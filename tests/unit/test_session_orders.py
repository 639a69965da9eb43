"""Sessions with front-ends that send what the real ones do, in the orders of their traces."""

from __future__ import annotations

import os
import struct

import trio
from trio.testing import MockClock

from tests.unit.fakes import (
    LOG_ALL,
    RING_PACKED,
    FakeDevice,
    region,
    signals,
    state,
    u64,
)
from tests.unit.frontend import (
    ALL,
    DEVICE_GETS,
    FEATURES,
    MEMORY,
    OFFER,
    PF,
    TABLE,
    USER,
    FrontEnd,
    connected,
    names,
    ring,
)
from vhostbridge.backends.lifecycle import State
from vhostbridge.backends.vhostuser.messages import Request as R

CONFIG_57 = struct.pack("=III", 0, 57, 0) + bytes(57)


async def qemu_connects(vm: FrontEnd) -> None:
    assert await vm.ask(R.GET_FEATURES) == u64(FEATURES | RING_PACKED | LOG_ALL)
    assert await vm.ask(R.GET_PROTOCOL_FEATURES) == u64(OFFER)
    await vm.send(R.SET_PROTOCOL_FEATURES, u64(OFFER))
    assert await vm.ask(R.GET_QUEUE_NUM) == u64(4)
    assert await vm.ask(R.GET_MAX_MEM_SLOTS) == u64(8)


async def qemu_adds_status(vm: FrontEnd, bits: int) -> None:
    (status,) = struct.unpack("=Q", await vm.ask(R.GET_STATUS))
    await vm.send(R.SET_STATUS, u64(status | bits))


# QEMU


async def test_qemu_block_starts_at_driver_ok(autojump_clock: MockClock) -> None:
    async with connected() as vm:
        await qemu_connects(vm)
        await vm.send(R.SET_OWNER)
        await vm.ask(R.GET_FEATURES)
        errs = [vm.eventfd() for _ in range(2)]
        for index in (0, 1):
            await vm.set_call(index)
            await vm.ack(R.SET_VRING_ERR, u64(index), errs[index])
        want = struct.pack("=III", 0, 57, 0) + bytes(range(57))
        assert await vm.ask(R.GET_CONFIG, CONFIG_57) == want
        await vm.send(R.RESET_DEVICE)
        await vm.send(R.SET_FEATURES, u64(FEATURES))
        await qemu_adds_status(vm, 8)
        await vm.send(R.SET_FEATURES, u64(FEATURES))
        await vm.ack(R.ADD_MEM_REG, bytes(8) + region(0, MEMORY, USER), vm.memfd())
        for index in (0, 1):
            await vm.set_ring(index)
        for index in (0, 1):
            await vm.ack(R.SET_VRING_ENABLE, state(index, 1))
        before = names(vm.device.take_calls())
        assert before == ["read_config", "reset", "set_memory"]
        await qemu_adds_status(vm, 0xF)
        assert await vm.ask(R.GET_STATUS) == u64(0xF)
        assert vm.device.take_calls() == [("run", DEVICE_GETS, (0, 0), (1, 0))]
        assert [v.err is not None for v in vm.device.rings.values()] == [True, True]
        await vm.settle()
        assert vm.device.take_calls() == []


async def test_qemu_block_goes_on_after_stop_without_sending_memory_again(
    autojump_clock: MockClock,
) -> None:
    async with connected() as vm:
        await vm.set_up()
        await vm.send(R.SET_VRING_ERR, u64(0), vm.eventfd())
        await vm.set_call(0)
        await vm.set_ring(0)
        await vm.enable(0)
        await vm.ack(R.SET_STATUS, u64(0xF))
        vm.device.take_calls()
        vm.device.bases[0] = 69
        await vm.ack(R.SET_VRING_ENABLE, state(0, 0))
        assert await vm.base(0) == 69
        await vm.ack(R.SET_STATUS, u64(0))
        await vm.settle()
        assert vm.device.take_calls() == [("set_enabled", 0, False), ("stop_vring", 0)]
        assert vm.device.state is State.SUSPENDED
        await vm.send(R.SET_FEATURES, u64(FEATURES))
        await vm.set_call(0)
        await vm.set_ring(0, base=69)
        await vm.enable(0)
        await vm.ack(R.SET_STATUS, u64(0xF))
        assert vm.device.take_calls() == [("run", DEVICE_GETS, (0, 69))]
        assert vm.device.rings[0].err is not None
        assert (signals(vm.kicks[0]), signals(vm.calls[0])) == (1, 1)


async def test_qemu_net_enables_long_before_features_and_memory(autojump_clock: MockClock) -> None:
    async with connected() as vm:
        await qemu_connects(vm)
        for _ in range(3):
            for index in (0, 1):
                await vm.ack(R.SET_VRING_ENABLE, state(index, 1))
            await vm.settle()
        await vm.send(R.SET_FEATURES, u64(FEATURES))
        await qemu_adds_status(vm, 8)
        await vm.ack(R.SET_MEM_TABLE, TABLE, vm.memfd())
        for index in (0, 1):
            await vm.set_call(index)
            await vm.set_ring(index)
        await vm.send(R.SET_VRING_ENABLE, state(0, 1))
        assert vm.device.take_calls() == [ALL]
        await qemu_adds_status(vm, 0xF)
        await vm.ask(R.GET_STATUS)
        assert vm.device.take_calls() == [("run", DEVICE_GETS, (0, 0), (1, 0))]
        assert all(v.enabled for v in vm.device.rings.values())


async def test_qemu_net_stops_without_disabling(autojump_clock: MockClock) -> None:
    async with connected() as vm:
        await vm.start(0, 1, protocol=OFFER)
        vm.device.bases.update({0: 256, 1: 11})
        assert [await vm.base(index) for index in (0, 1)] == [256, 11]
        await vm.ack(R.SET_STATUS, u64(0))
        await vm.settle()
        assert vm.device.take_calls() == [("stop_vring", 0), ("stop_vring", 1)]
        for index, base in ((0, 256), (1, 11)):
            await vm.set_ring(index, base=base)
        await vm.ack(R.SET_STATUS, u64(0xF))
        assert vm.device.take_calls() == [("run", DEVICE_GETS, (0, 256), (1, 11))]


async def test_status_without_driver_ok_starts_in_silence(autojump_clock: MockClock) -> None:
    async with connected() as vm:
        await vm.set_up()
        await vm.ack(R.SET_STATUS, u64(8))
        await vm.set_ring(0)
        await vm.enable(0)
        await vm.settle()
        assert vm.device.take_calls() == [ALL, ("run", DEVICE_GETS, (0, 0))]


async def test_a_kick_starts_without_waiting_for_silence(autojump_clock: MockClock) -> None:
    async with connected() as vm:
        await vm.set_up(protocol=OFFER & ~PF.STATUS)
        await vm.set_call(0)
        await vm.set_ring(0)
        before = trio.current_time()
        await vm.enable(0)
        os.eventfd_write(vm.kicks[0].fileno(), 1)
        await trio.lowlevel.wait_readable(vm.calls[0].fileno())
        assert trio.current_time() == before
        assert vm.device.take_calls()[-1] == ("run", DEVICE_GETS, (0, 0))


async def test_without_bit_30_rings_need_no_enable(autojump_clock: MockClock) -> None:
    async with connected() as vm:
        await vm.send(R.SET_FEATURES, u64(DEVICE_GETS))
        await vm.send(R.SET_MEM_TABLE, TABLE, vm.memfd())
        await vm.set_ring(0)
        await vm.settle()
        assert vm.device.take_calls() == [ALL, ("run", DEVICE_GETS, (0, 0))]
        assert vm.device.rings[0].enabled


async def test_with_bit_30_rings_wait_for_enable(autojump_clock: MockClock) -> None:
    async with connected() as vm:
        await vm.set_up()
        await vm.set_ring(0)
        await vm.settle()
        assert vm.device.take_calls() == [ALL]


async def test_packed_rings_start_with_wrap_counters_set(autojump_clock: MockClock) -> None:
    async with connected() as vm:
        await vm.set_up(features=FEATURES | RING_PACKED)
        await vm.tell(R.SET_VRING_NUM, state(0, 100))
        await vm.tell(R.SET_VRING_ADDR, ring(0))
        await vm.set_kick(0)
        await vm.enable(0)
        await vm.settle()
        run = ("run", DEVICE_GETS | RING_PACKED, (0, 0x80008000))
        assert vm.device.take_calls()[-1] == run


# Stopping


async def test_one_vring_stops_and_the_others_go_on(autojump_clock: MockClock) -> None:
    async with connected() as vm:
        await vm.start(0, 1, 2)
        vm.device.bases[1] = 9
        assert await vm.base(1) == 9
        await vm.settle()
        resumed = ("run", DEVICE_GETS, (0, None), (2, None))
        assert vm.device.take_calls() == [("stop_vring", 1), resumed]
        await vm.set_ring(1, base=9)
        await vm.settle()
        everything = ("run", DEVICE_GETS, (0, None), (1, 9), (2, None))
        assert vm.device.take_calls() == [everything]


async def test_one_vring_stops_alone_where_the_device_can(autojump_clock: MockClock) -> None:
    async with connected(FakeDevice(whole=False)) as vm:
        await vm.start(0, 1)
        await vm.base(1)
        await vm.settle()
        assert vm.device.take_calls() == [("stop_vring", 1)]
        assert vm.device.state is State.RUNNING


async def test_status_0_stops_everything_and_bases_are_kept(autojump_clock: MockClock) -> None:
    async with connected() as vm:
        await vm.start(0, 1, protocol=OFFER)
        vm.device.bases.update({0: 3, 1: 4})
        await vm.ack(R.SET_STATUS, u64(0))
        assert vm.device.take_calls() == [("stop_vring", 0), ("stop_vring", 1)]
        assert [await vm.base(index) for index in (0, 1, 0)] == [3, 4, 3]
        await vm.settle()
        assert vm.device.take_calls() == []
        assert vm.device.state is State.SUSPENDED


async def test_reset_device_loses_positions_and_enables_but_not_calls(
    autojump_clock: MockClock,
) -> None:
    async with connected() as vm:
        await vm.start(0, protocol=OFFER)
        vm.device.bases[0] = 77
        await vm.ack(R.RESET_DEVICE)
        assert await vm.ask(R.GET_STATUS) == u64(0)
        await vm.settle()
        assert vm.device.take_calls() == [("suspend",), ("reset",)]
        await vm.set_kick(0)
        await vm.settle()
        assert vm.device.take_calls() == []
        await vm.enable(0)
        await vm.settle()
        assert vm.device.take_calls() == [("run", DEVICE_GETS, (0, 0))]
        assert vm.device.rings[0].call is not None


async def test_a_front_end_that_leaves_has_the_device_suspended_and_reset(
    autojump_clock: MockClock,
) -> None:
    async with connected() as vm:
        await vm.start(0)
    assert vm.outcome is None
    assert vm.device.take_calls() == [("suspend",), ("reset",), ("set_memory",)]
