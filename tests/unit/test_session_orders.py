"""Sessions with front-ends that send what the real ones do, in the orders of their traces."""

from __future__ import annotations

import os
import struct

import trio
from trio.testing import MockClock

from tests.unit.fakes import (
    DEVICE_FEATURES,
    LOG_ALL,
    RING_PACKED,
    FakeDevice,
    Frame,
    address,
    device_info,
    region,
    signals,
    state,
    u64,
)
from tests.unit.frontend import (
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
    table,
)
from vhostbridge.backends.errors import Unsupported
from vhostbridge.backends.lifecycle import State
from vhostbridge.backends.vhostuser.messages import Request as R

ALL = ("set_memory", (0, MEMORY))
CTRL_VQ = 1 << 17
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


def set_indices(vm: FrontEnd, index: int, available: int, used: int) -> None:
    at = 0x10000 * (index + 1)
    os.pwrite(vm.memory.fileno(), available.to_bytes(2, "little"), at + 0x1002)
    os.pwrite(vm.memory.fileno(), used.to_bytes(2, "little"), at + 0x2002)


# Front-ends


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


async def test_libblkio_asks_for_a_reply_to_everything(autojump_clock: MockClock) -> None:
    async with connected() as vm:
        here, size = 0x7FD0_AAF8_6000, 0x3B10
        buffers = 0x7FD0_AABB_5000
        await vm.send(R.SET_OWNER)
        await vm.ask(R.GET_FEATURES)
        await vm.send(R.SET_FEATURES, u64(0x1_6000_0044))
        await vm.ask(R.GET_PROTOCOL_FEATURES)
        await vm.send(R.SET_PROTOCOL_FEATURES, u64(0x8209))
        vm.need_reply = True
        assert await vm.ask(R.GET_QUEUE_NUM, flags=0x9) == u64(4)
        assert await vm.ask(R.GET_MAX_MEM_SLOTS, flags=0x9) == u64(8)
        config = struct.pack("=III", 0, 60, 0)
        got = await vm.ask(R.GET_CONFIG, config + bytes(60), flags=0x9)
        assert got == config + bytes(range(60))
        await vm.tell(R.ADD_MEM_REG, bytes(8) + region(here, size, here), vm.memfd(size))
        await vm.tell(R.SET_VRING_NUM, state(0, 256))
        await vm.tell(R.SET_VRING_BASE, state(0, 0))
        await vm.tell(R.SET_VRING_ADDR, address(0, here, here + 0x1208, here + 0x1000))
        await vm.set_kick(0)
        await vm.set_call(0)
        await vm.tell(R.SET_VRING_ENABLE, state(0, 1))
        more = bytes(8) + region(buffers, 0x100000, buffers)
        await vm.tell(R.ADD_MEM_REG, more, vm.memfd(0x100000))
        await vm.settle()
        assert vm.device.take_calls() == [
            ("read_config", 0, 60),
            ("set_memory", (here, size)),
            ("set_memory", (here, size), (buffers, 0x100000)),
            ("run", 0x1_2000_0044, (0, 0)),
        ]
        setup = vm.device.rings[0]
        assert (setup.descriptor_area, setup.driver_area) == (here, here + 0x1000)


async def cloud_hypervisor_starts(vm: FrontEnd, base: int) -> None:
    for index in (0, 1):
        await vm.tell(R.SET_VRING_NUM, state(index, 128))
    for index in (0, 1):
        await vm.tell(R.SET_VRING_ADDR, ring(index))
        await vm.tell(R.SET_VRING_BASE, state(index, base))
        await vm.set_call(index)
        await vm.set_kick(index)
    await vm.enable(0, 1)


async def test_cloud_hypervisor_sends_addresses_before_bases(autojump_clock: MockClock) -> None:
    async with connected() as vm:
        await vm.set_up(protocol=OFFER & ~PF.STATUS)
        vm.need_reply = True
        await cloud_hypervisor_starts(vm, 7)
        reverse = await vm.reverse()
        await vm.settle()
        assert vm.device.take_calls() == [ALL, ("run", DEVICE_GETS, (0, 7), (1, 7))]
        assert vm.device.rings[0].size == 128
        vm.device.change_config()
        assert await reverse.receive() == Frame(2, 0x1, b"")
        reverse.close()


async def test_queues_of_a_network_device_are_told_as_the_front_end_counts_them(
    autojump_clock: MockClock,
) -> None:
    """QEMU, which speaks STATUS, counts pairs. cloud-hypervisor and OpenVMM compare the answer
    with the number of their vrings; crosvm has as many as it is."""
    for control, vrings in ((False, 4), (True, 5)):
        features = DEVICE_FEATURES & ~CTRL_VQ | (CTRL_VQ if control else 0)
        info = device_info(device_id=1, queue_num=2, vring_limit=9, features=features)
        for protocol, queues in ((OFFER, 2), (OFFER & ~PF.STATUS, vrings)):
            async with connected(FakeDevice(info)) as vm:
                await vm.send(R.SET_PROTOCOL_FEATURES, u64(protocol))
                assert await vm.ask(R.GET_QUEUE_NUM) == u64(queues)


async def test_cloud_hypervisor_pauses_by_disabling(autojump_clock: MockClock) -> None:
    async with connected() as vm:
        await vm.start(0, 1)
        vm.need_reply = True
        await vm.enable(0, 1, on=0)
        assert vm.device.take_calls()[:2] == [("set_enabled", 0, False), ("suspend",)]
        await vm.settle()
        assert vm.device.state is State.SUSPENDED
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
        assert vm.device.state is State.RUNNING and vm.session.vrings[1].enabled


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


async def test_cloud_hypervisor_resets_ring_by_ring(autojump_clock: MockClock) -> None:
    async with connected() as vm:
        await vm.start(0, 1)
        vm.device.bases.update({0: 5, 1: 6})
        for index in (0, 1):
            await vm.enable(index, on=0)
            assert await vm.base(index) == 5 + index
        await vm.settle()
        assert "run" not in names(vm.device.take_calls())
        await cloud_hypervisor_starts(vm, 0)
        await vm.settle()
        assert vm.device.take_calls() == [("run", DEVICE_GETS, (0, 0), (1, 0))]


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


async def test_indices_that_no_driver_has_left_are_not_gone_by(autojump_clock: MockClock) -> None:
    async with connected() as vm:
        await vm.set_up()
        set_indices(vm, 0, available=7, used=2000)
        await vm.set_ring(0, base=0)
        await vm.enable(0)
        await vm.settle()
        assert vm.device.take_calls()[-1] == ("run", DEVICE_GETS, (0, 0))


async def test_dpdk_virtio_user_order(autojump_clock: MockClock) -> None:
    async with connected() as vm:
        await vm.send(R.SET_OWNER)
        await vm.ask(R.GET_FEATURES)
        await vm.ask(R.GET_PROTOCOL_FEATURES)
        await vm.send(R.SET_PROTOCOL_FEATURES, u64(0x10009))
        for index in (0, 1):
            await vm.set_call(index)
        await vm.send(R.SET_FEATURES, u64(0x1_5000_8000))
        await vm.ack(R.SET_STATUS, u64(0xB))
        assert await vm.ask(R.GET_STATUS) == u64(0xB)
        user = 0x1_0033_8000
        await vm.ack(R.SET_MEM_TABLE, table(region(user, MEMORY, user)), vm.memfd())
        for index in (0, 1):
            await vm.send(R.SET_VRING_NUM, state(index, 256))
            await vm.send(R.SET_VRING_BASE, state(index, 0))
            await vm.send(R.SET_VRING_ADDR, ring(index, user))
            await vm.set_kick(index)
        await vm.enable(0, 1)
        await vm.ack(R.SET_STATUS, u64(0xF))
        memory = ("set_memory", (user, MEMORY))
        assert vm.device.take_calls() == [memory, ("run", 0x1_1000_8000, (0, 0), (1, 0))]
        vm.device.bases.update({0: 0x6400, 1: 0x6400})
        await vm.enable(0, 1, on=0)
        for index in (0, 1):
            reply = await vm.ask(R.GET_VRING_BASE, state(index, 0x6400))
            assert reply == state(index, 0x6400)


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
