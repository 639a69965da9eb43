"""Sessions with other front-ends than QEMU, in the orders of their source or of their traces."""

from __future__ import annotations

import struct

import pytest
import trio
from trio.testing import MockClock

from tests.unit.fakes import (
    DEVICE_FEATURES,
    FakeDevice,
    Frame,
    Stateful,
    address,
    device_info,
    region,
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
    FrontEnd,
    connected,
    names,
    ring,
    table,
)
from tests.unit.test_session_device_state import offer_state, save
from vhostbridge.backends.lifecycle import State
from vhostbridge.backends.vhostuser.messages import Request as R

CTRL_VQ = 1 << 17


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


async def test_spdk_shares_memory_again_when_it_has_stopped(autojump_clock: MockClock) -> None:
    """It enables vrings first of all, and sends GET_FEATURES to know that memory is there."""
    async with connected() as vm:
        await vm.send(R.SET_OWNER)
        for bases in ((5, 6), (7, 8)):
            await vm.ask(R.GET_FEATURES)
            await vm.send(R.SET_FEATURES, u64(FEATURES))
            await vm.ask(R.GET_PROTOCOL_FEATURES)
            await vm.send(R.SET_PROTOCOL_FEATURES, u64(PF.MQ | PF.CONFIG))
            config = struct.pack("=III", 0, 256, 0)
            got = await vm.ask(R.GET_CONFIG, config + bytes(256))
            assert got == config + bytes(range(64)) + bytes(192)
            await vm.enable(0, 1)
            assert await vm.ask(R.GET_QUEUE_NUM) == u64(4)
            for index in (0, 1):
                await vm.set_call(index)
            await vm.send(R.SET_MEM_TABLE, TABLE, vm.memfd())
            await vm.ask(R.GET_FEATURES)
            for index in (0, 1):
                await vm.set_ring(index)
            await vm.settle()
            assert vm.device.take_calls()[-1] == ("run", DEVICE_GETS, (0, 0), (1, 0))
            vm.device.bases.update(dict(enumerate(bases)))
            assert tuple([await vm.base(index) for index in (0, 1)]) == bases
            await vm.send(R.SET_MEM_TABLE, TABLE, vm.memfd())
            await vm.ask(R.GET_FEATURES)
            await vm.settle()
            assert vm.device.state is State.SUSPENDED


async def crosvm_activates(vm: FrontEnd, *bases: int) -> None:
    await vm.send(R.SET_MEM_TABLE, TABLE, vm.memfd())
    for index, base in enumerate(bases):
        await vm.tell(R.SET_VRING_NUM, state(index, 256))
        await vm.tell(R.SET_VRING_ADDR, ring(index))
        await vm.tell(R.SET_VRING_BASE, state(index, base))
        await vm.set_call(index)
        await vm.set_kick(index)
        await vm.enable(index)


async def runs(vm: FrontEnd) -> None:
    with trio.fail_after(5):
        while vm.device.state is not State.RUNNING or len(vm.device.rings) < 2:  # noqa: ASYNC110
            await trio.sleep(0.001)


async def crosvm_sleeps(vm: FrontEnd) -> list[int]:
    bases = []
    for index in (0, 1):
        await vm.enable(index, on=0)
        bases.append(await vm.base(index))
    return bases


async def test_crosvm_sleeps_wakes_and_restores() -> None:
    """Each vring is disabled and stopped before the next one. Features are sent if they changed."""
    protocol = OFFER & ~PF.STATUS | PF.DEVICE_STATE
    async with connected(Stateful()) as vm:
        await vm.negotiate(protocol=protocol)
        await crosvm_activates(vm, 0, 0)
        await runs(vm)
        vm.device.bases.update({0: 40, 1: 2})
        assert await crosvm_sleeps(vm) == [40, 2]
        data = await save(vm)
        assert await vm.ask(R.CHECK_DEVICE_STATE) == u64(0)
        await crosvm_activates(vm, 40, 2)
        await runs(vm)
        assert vm.device.take_calls()[-1] == ("run", DEVICE_GETS, (0, 40), (1, 2))
        vm.device.bases.update({0: 41, 1: 2})
        assert await crosvm_sleeps(vm) == [41, 2]
        assert vm.device.state is State.SUSPENDED
    async with connected(Stateful()) as vm:
        await vm.negotiate(protocol=protocol)
        assert await offer_state(vm, data) == 0
        await crosvm_activates(vm, 40, 2)
        await runs(vm)
        assert vm.device.take_calls()[-1] == ("run", DEVICE_GETS, (0, 40), (1, 2))


async def test_crosvm_restores_a_device_that_never_ran() -> None:
    protocol = OFFER & ~PF.STATUS | PF.DEVICE_STATE
    async with connected(Stateful()) as vm:
        await vm.send(R.SET_PROTOCOL_FEATURES, u64(protocol))
        data = await save(vm)
        assert await vm.ask(R.CHECK_DEVICE_STATE) == u64(0)
    async with connected(Stateful()) as vm:
        await vm.send(R.SET_PROTOCOL_FEATURES, u64(protocol))
        await vm.send(R.SET_FEATURES, u64(1 << 30))
        assert await offer_state(vm, data) == 0
        await vm.send(R.SET_FEATURES, u64(FEATURES))
        await crosvm_activates(vm, 0, 0)
        await runs(vm)
        assert vm.device.take_calls()[-1] == ("run", DEVICE_GETS, (0, 0), (1, 0))


@pytest.mark.parametrize("features", [FEATURES, FEATURES & ~1], ids=["same", "other"])
async def test_libkrun_begins_anew_without_stopping_vrings(
    autojump_clock: MockClock, features: int
) -> None:
    """A driver that resets the device has the vrings disabled; the next one sets them up."""
    async with connected() as vm:
        await vm.start(0, 1)
        vm.device.bases.update({0: 12, 1: 34})
        await vm.enable(0, 1, on=0)
        await vm.settle()
        assert vm.device.state is State.SUSPENDED
        vm.device.take_calls()
        await vm.send(R.SET_OWNER)
        await vm.send(R.SET_MEM_TABLE, TABLE, vm.memfd())
        await vm.send(R.SET_FEATURES, u64(features))
        for index in (0, 1):
            await vm.set_ring(index, size=64)
            await vm.set_call(index)
            await vm.enable(index)
        await vm.settle()
        run = ("run", features & ~(1 << 30), (0, 0), (1, 0))
        assert vm.device.take_calls()[-1] == run
        assert vm.device.rings[1].size == 64


async def test_stratovirt_stops_and_goes_on_without_bit_30(autojump_clock: MockClock) -> None:
    """Its vring begins at its used index; size and addresses are not told again."""
    async with connected() as vm:
        await vm.send(R.SET_PROTOCOL_FEATURES, u64(PF.MQ | PF.CONFIG))
        await vm.send(R.SET_FEATURES, u64(DEVICE_GETS))
        vm.memory = vm.memfd()
        await vm.send(R.SET_MEM_TABLE, TABLE, vm.memory)
        await vm.set_ring(0)
        await vm.settle()
        assert vm.device.take_calls()[-1] == ("run", DEVICE_GETS, (0, 0))
        vm.device.bases[0] = 12
        assert await vm.base(0) == 12
        await vm.send(R.SET_VRING_BASE, state(0, 12))
        await vm.set_call(0)
        await vm.set_kick(0)
        await vm.settle()
        assert vm.device.take_calls()[-1] == ("run", DEVICE_GETS, (0, 12))
        assert vm.device.rings[0].enabled


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
