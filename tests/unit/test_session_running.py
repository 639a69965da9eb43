"""Sessions of running devices: what changes under way, and devices that fail."""

from __future__ import annotations

import os
import struct
from contextlib import ExitStack
from typing import cast
from unittest.mock import Mock

import pytest
import trio
from trio.testing import MockClock

from tests.unit.fakes import (
    FakeDevice,
    Frame,
    address,
    device_info,
    eventfd,
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
    connected,
    ring,
    shared_files,
    table,
)
from vhostbridge.backends.errors import KernelRefused, TransportLost, Unsupported
from vhostbridge.backends.lifecycle import State
from vhostbridge.backends.vhostuser.messages import Request as R
from vhostbridge.backends.virtio import TransportFeature
from vhostbridge.bridge.shadow import with_shadow
from vhostbridge.bridge.tracking import Tracking

# While it runs


@pytest.mark.parametrize("message", [R.SET_VRING_CALL, R.SET_VRING_KICK, R.SET_VRING_ERR])
async def test_an_eventfd_changes_while_running(autojump_clock: MockClock, message: R) -> None:
    async with connected() as vm:
        await vm.start(0)
        await vm.ack(message, u64(0), vm.eventfd())
        await vm.ack(message, u64(0x100))
        await vm.settle()
        name = message.name.lower().replace("vring_", "")
        assert vm.device.take_calls() == [(name, 0, True), (name, 0, False)]


EVENT_IDX = TransportFeature.EVENT_IDX.mask


async def test_a_new_call_is_signalled_once(autojump_clock: MockClock) -> None:
    async with connected() as vm:
        await vm.start(0)
        vm.need_reply = True
        await vm.set_call(0)
        assert signals(vm.calls[0]) == 1


async def test_a_new_ring_address_pauses_the_device(autojump_clock: MockClock) -> None:
    async with connected() as vm:
        await vm.start(0, 1)
        moved = address(0, USER, USER + 0x2000, USER + 0x1000)
        await vm.ack(R.SET_VRING_ADDR, moved)
        await vm.settle()
        run = ("run", DEVICE_GETS, (0, None), (1, None))
        assert vm.device.take_calls() == [("suspend",), run]
        assert vm.device.rings[0].descriptor_area == 0


async def test_the_same_ring_address_changes_nothing(autojump_clock: MockClock) -> None:
    async with connected() as vm:
        await vm.start(0)
        await vm.ack(R.SET_VRING_ADDR, ring(0))
        await vm.ack(R.SET_VRING_NUM, state(0, 256))
        await vm.ack(R.SET_FEATURES, u64(FEATURES))
        await vm.settle()
        assert vm.device.take_calls() == []


async def test_a_device_that_cannot_pause_keeps_its_ring_address(
    autojump_clock: MockClock,
) -> None:
    async with connected() as vm:
        await vm.start(0, 1)
        vm.device.refuse["suspend"] = Unsupported("no suspend")
        moved = address(0, USER, USER + 0x2000, USER + 0x1000)
        await vm.nack(R.SET_VRING_ADDR, moved)
        await vm.base(1)
        await vm.settle()
        assert vm.device.rings[0].descriptor_area == 0x10000


async def test_a_memory_table_is_replaced_while_running(autojump_clock: MockClock) -> None:
    async with connected() as vm:
        await vm.start(0)
        before = shared_files()
        two = table(region(0, MEMORY, USER), region(MEMORY, MEMORY, USER + MEMORY))
        with vm.memfd() as low, vm.memfd() as high:
            await vm.ack(R.SET_MEM_TABLE, two, low, high)
        assert shared_files() == before + 1
        with vm.memfd() as low:
            await vm.ack(R.SET_MEM_TABLE, TABLE, low)
        assert shared_files() == before
        await vm.settle()
        both = ("set_memory", (0, MEMORY), (MEMORY, MEMORY))
        run = ("run", DEVICE_GETS, (0, None))
        assert vm.device.take_calls() == [("suspend",), both, ALL, run]


async def test_a_vring_whose_memory_goes_stands_still_until_it_is_back(
    autojump_clock: MockClock,
) -> None:
    """A region that grows or shrinks is removed and added, in two messages or by a new table."""
    async with connected() as vm:
        memory = vm.memfd()
        await vm.start(0)
        await vm.ack(R.REM_MEM_REG, bytes(8) + region(0, MEMORY, USER))
        await vm.settle()
        none = ("set_memory",)
        assert vm.device.take_calls() == [("suspend",), none]
        low = bytes(8) + region(0, 0x1000, USER)
        await vm.ack(R.ADD_MEM_REG, low, memory)
        await vm.settle()
        assert vm.device.take_calls() == [("set_memory", (0, 0x1000))]
        high = bytes(8) + region(0x2000, MEMORY - 0x2000, USER + 0x2000, 0x2000)
        await vm.ack(R.ADD_MEM_REG, high, memory)
        await vm.settle()
        parts = ("set_memory", (0, 0x1000), (0x2000, MEMORY - 0x2000))
        assert vm.device.take_calls() == [parts, ("run", DEVICE_GETS, (0, None))]
        # What has no vring in it comes and goes without a pause.
        await vm.ack(R.REM_MEM_REG, low)
        await vm.settle()
        assert vm.device.take_calls() == [("set_memory", (0x2000, MEMORY - 0x2000))]


async def test_a_vring_whose_memory_is_gone_can_be_stopped(autojump_clock: MockClock) -> None:
    async with connected() as vm:
        await vm.start(0)
        vm.device.bases[0] = 7
        await vm.ack(R.REM_MEM_REG, bytes(8) + region(0, MEMORY, USER))
        await vm.settle()
        assert await vm.base(0) == 7


async def test_slots_are_added_and_removed_while_running(autojump_clock: MockClock) -> None:
    async with connected() as vm:
        await vm.start(0)
        more = bytes(8) + region(MEMORY, 0x1000, USER + MEMORY)
        before = shared_files()
        for _ in range(2):
            with vm.memfd(0x1000) as fd:
                await vm.ack(R.ADD_MEM_REG, more, fd)
            assert shared_files() == before + 1
            with vm.memfd(0x1000) as fd:
                await vm.ack(R.REM_MEM_REG, more, fd)
            assert shared_files() == before
        both = ("set_memory", (0, MEMORY), (MEMORY, 0x1000))
        assert vm.device.take_calls() == [both, ALL, both, ALL]


async def test_memory_that_the_device_refuses_leaves_the_old_in_force(
    autojump_clock: MockClock,
) -> None:
    async with connected() as vm:
        await vm.start(0)
        more = bytes(8) + region(MEMORY, 0x1000, USER + MEMORY)
        vm.device.refuse["set_memory"] = KernelRefused("IOTLB UPDATE", 14)
        await vm.nack(R.ADD_MEM_REG, more, vm.memfd(0x1000))
        await vm.nack(R.REM_MEM_REG, more)
        await vm.ack(R.ADD_MEM_REG, more, vm.memfd(0x1000))


async def test_an_mtu_and_a_rarp_reach_a_device_that_takes_them(
    autojump_clock: MockClock,
) -> None:
    class Net(FakeDevice):
        async def set_mtu(self, mtu: int) -> None:
            await self._called("set_mtu", mtu)

        async def send_rarp(self, mac: int) -> None:
            await self._called("send_rarp", mac)

    async with connected(Net(device_info(forwards_mtu=True, forwards_rarp=True))) as vm:
        assert await vm.ask(R.GET_PROTOCOL_FEATURES) == u64(OFFER | PF.NET_MTU | PF.RARP)
        await vm.negotiate(protocol=OFFER | PF.NET_MTU | PF.RARP)
        await vm.ack(R.NET_SET_MTU, u64(1400))
        await vm.ack(R.SEND_RARP, u64(0x5452))
        assert vm.device.take_calls() == [("set_mtu", 1400), ("send_rarp", 0x5452)]


# Configuration changes


async def test_a_config_change_waits_while_suspended(autojump_clock: MockClock) -> None:
    async with connected() as vm:
        await vm.start(0)
        reverse = await vm.reverse()
        await vm.base(0)
        vm.device.change_config()
        with trio.move_on_after(5) as waiting:
            await reverse.receive()
        assert waiting.cancelled_caught
        await vm.set_ring(0)
        assert await reverse.receive() == Frame(2, 0x1, b"")
        reverse.close()


async def test_a_config_change_is_for_those_who_negotiated_config(
    autojump_clock: MockClock,
) -> None:
    async with connected() as vm:
        await vm.start(0, protocol=OFFER & ~PF.STATUS & ~PF.CONFIG)
        reverse = await vm.reverse()
        vm.device.change_config()
        with trio.move_on_after(5) as waiting:
            await reverse.receive()
        assert waiting.cancelled_caught
        reverse.close()


async def test_a_newer_reverse_channel_replaces_the_older(autojump_clock: MockClock) -> None:
    async with connected() as vm:
        await vm.start(0)
        older, newer = await vm.reverse(), await vm.reverse()
        await vm.settle()
        assert await older.receive() is None
        vm.device.change_config()
        assert await newer.receive() == Frame(2, 0x1, b"")
        older.close()
        newer.close()


async def test_a_reverse_channel_that_closed_costs_nothing(autojump_clock: MockClock) -> None:
    async with connected() as vm:
        await vm.start(0)
        (await vm.reverse()).close()
        for _ in range(2):
            vm.device.change_config()
            await vm.settle()


# Devices that fail


class Stateful(FakeDevice):
    """Nothing but itself knows where it was."""

    internal_owner = "virtiofsd"


async def test_a_device_that_fails_ends_the_session(autojump_clock: MockClock) -> None:
    async with connected(Stateful()) as vm:
        await vm.start(0)
        vm.device.fail("its process died")
        vm.device.fail("its process died")
        assert str(await vm.lost()) == "the device failed: its process died"
        assert vm.device.take_calls() == []


async def test_a_device_that_fails_in_a_message_is_not_just_refused(
    autojump_clock: MockClock,
) -> None:
    async with connected(Stateful()) as vm:
        await vm.start(0)
        vm.device.refuse["write_config"] = TransportLost("the back-end went away")
        vm.device.fail("the back-end went away")
        await vm.send(R.SET_CONFIG, struct.pack("=III", 0, 4, 0) + b"data", flags=0x9)
        assert "the back-end went away" in str(await vm.lost())


async def test_a_device_that_cannot_start_refuses_driver_ok(autojump_clock: MockClock) -> None:
    async with connected() as vm:
        await vm.set_up()
        await vm.set_ring(0)
        await vm.ack(R.SET_STATUS, u64(0xB))
        vm.device.refuse["run"] = Unsupported("no such ring")
        await vm.nack(R.SET_STATUS, u64(0xF))
        assert await vm.ask(R.GET_STATUS) == u64(0xB)
        await vm.ack(R.SET_STATUS, u64(0xF))
        assert vm.device.state is State.RUNNING


async def test_a_device_that_cannot_start_in_silence_ends_the_session(
    autojump_clock: MockClock,
) -> None:
    async with connected() as vm:
        await vm.set_up()
        await vm.set_ring(0)
        vm.device.refuse["run"] = Unsupported("no such ring")
        await vm.enable(0)
        assert str(await vm.lost()) == "no such ring"


async def test_a_device_that_cannot_be_reset_has_failed(autojump_clock: MockClock) -> None:
    async with connected() as vm:
        await vm.start(0)
        vm.device.refuse["reset"] = KernelRefused("SET_STATUS 0", 5)
    assert vm.device.state is State.FAILED
    assert "SET_STATUS 0" in vm.device.failure


@pytest.mark.parametrize("when", ["before", "as it leaves"])
async def test_shadow_vrings_of_a_device_that_failed_let_go_of_the_front_ends_eventfds(
    when: str,
) -> None:
    """A file that comes meanwhile has their numbers, and the vrings would read from it."""
    inner = FakeDevice()
    async with with_shadow(inner, Tracking.AUTO, always=True) as device:
        async with connected(cast(FakeDevice, device)) as vm:
            await vm.set_up(protocol=OFFER & ~PF.STATUS)
            await vm.set_ring(0)
            await vm.enable(0)
            await vm.settle()
            assert device.shadowed
            kick = vm.kicks[0].dup()
            if when == "before":
                # Nobody knows where such a device was, so that no other one takes its place.
                vm.session.absence.notice = Mock()  # type: ignore[method-assign]
                inner.fail("its process died")
            inner.refuse["suspend"] = Unsupported("requests did not finish")
        assert device.state is State.FAILED
        with ExitStack() as files:
            others = [files.enter_context(eventfd()) for _ in range(32)]
            for fd in others:
                os.eventfd_write(fd.fileno(), 1)
            with kick:
                os.eventfd_write(kick.fileno(), 1)
                await trio.sleep(0.1)
            assert [signals(fd) for fd in others] == [1] * 32


async def test_driver_is_asked_for_kicks_before_a_device_starts(autojump_clock: MockClock) -> None:
    """The one before may have polled, as DPDK's does, and the next need not look at that."""
    async with connected() as vm:
        await vm.set_up(FEATURES & ~EVENT_IDX, OFFER & ~PF.STATUS)
        used = 0x10000 + 0x2000
        os.pwrite(vm.memory.fileno(), b"\1", used)
        await vm.set_ring(0)
        await vm.enable(0)
        await vm.settle()
        assert vm.device.state is State.RUNNING
        assert os.pread(vm.memory.fileno(), 2, used) == bytes(2)
