"""Sessions whose front-end wants to know what the device writes: QEMU's order, and lies."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping, Sequence
from typing import cast

import pytest
from trio.testing import MockClock

from tests.unit.fakes import LOG_ALL, FakeDevice, address, memfd, u64
from tests.unit.frontend import FEATURES, MEMORY, OFFER, PF, USER, FrontEnd, connected, ring
from vhostbridge.backends.dirty_log import DirtyLog
from vhostbridge.backends.errors import TransportLost, Unsupported
from vhostbridge.backends.guest import MemoryRegion, VringSetup
from vhostbridge.backends.lifecycle import State
from vhostbridge.backends.vhostuser.messages import Request as R
from vhostbridge.bridge.shadow import with_shadow
from vhostbridge.bridge.tracking import Tracking

# A bit a page for the fake front-end's memory and beyond.
SIZE = 4096
USED_AT = 0x12000


def place(size: int = SIZE, offset: int = 0) -> bytes:
    return struct.pack("=QQ", size, offset)


def logged_ring(index: int) -> bytes:
    at = USER + 0x10000 * (index + 1)
    return address(index, at, at + 0x2000, at + 0x1000, flags=1, log=USED_AT)


async def begin(vm: FrontEnd) -> None:
    with memfd(SIZE) as fd:
        assert await vm.ask(R.SET_LOG_BASE, place(), fd) == place()
    await vm.ack(R.SET_FEATURES, u64(FEATURES | LOG_ALL))
    await vm.ack(R.SET_VRING_ADDR, logged_ring(0))


async def test_log_is_turned_on_and_off_while_running(autojump_clock: MockClock) -> None:
    """QEMU's order; the device is neither stopped nor set up anew by it."""
    async with connected() as vm:
        await vm.start(0)
        await begin(vm)
        assert vm.device.take_calls() == [
            ("log_writes", SIZE, {}),
            ("log_writes", SIZE, {0: USED_AT}),
        ]
        await vm.ack(R.SET_FEATURES, u64(FEATURES))
        await vm.ack(R.SET_VRING_ADDR, ring(0))
        assert vm.device.take_calls() == [("log_writes", None, {})]
        assert vm.device.state is State.RUNNING


async def test_log_that_is_sent_again_takes_the_place_of_the_first(
    autojump_clock: MockClock,
) -> None:
    async with connected() as vm:
        await vm.start(0)
        await begin(vm)
        vm.device.take_calls()
        with memfd(2 * SIZE) as fd:
            assert await vm.ask(R.SET_LOG_BASE, place(2 * SIZE), fd) == place(2 * SIZE)
        assert vm.device.take_calls() == [("log_writes", 2 * SIZE, {0: USED_AT})]


async def test_log_that_a_dying_device_does_not_take_is_for_the_next_one(
    autojump_clock: MockClock,
) -> None:
    class Dying(FakeDevice):
        async def log_writes(self, log: DirtyLog | None, used: Mapping[int, int]) -> None:
            if log is not None and log.size > SIZE:
                self.fail("its process died")
                raise TransportLost("its process died")
            await super().log_writes(log, used)

    async with connected(Dying()) as vm:
        await vm.start(0)
        await begin(vm)
        with memfd(2 * SIZE) as fd:
            assert await vm.ask(R.SET_LOG_BASE, place(2 * SIZE), fd) == place(2 * SIZE)
        vm.device = FakeDevice()
        await vm.session.attach(vm.device)
        assert vm.device.logging == (2 * SIZE, {0: USED_AT})
        assert vm.device.state is State.RUNNING


@pytest.mark.parametrize("at", ["set_memory", "run"])
async def test_device_that_dies_as_its_requests_begin_to_pass_through_shadow_vrings_is_replaced(
    at: str,
) -> None:
    """None did so far: it stopped before that, and where, is known, whatever is available."""

    class Dying(FakeDevice):
        async def set_memory(self, regions: Sequence[MemoryRegion]) -> None:
            await super().set_memory(regions)
            if at == "set_memory" and len(regions) > 1:
                self._die()

        async def run(self, features: int, vrings: Sequence[VringSetup]) -> None:
            await super().run(features, vrings)
            if at == "run" and len(self.regions) > 1:
                self._die()

        def _die(self) -> None:
            self.fail("its process died")
            raise TransportLost("its process died")

        async def aclose(self) -> None:
            """It is gone."""

    inner = Dying()
    async with with_shadow(inner, Tracking.SHADOW) as lost:
        lost.take_calls = inner.take_calls  # type: ignore[attr-defined]
        async with connected(cast(FakeDevice, lost)) as vm:
            await vm.start(0)
            inner.bases[0] = 7
            os.pwrite(vm.memory.fileno(), struct.pack("<H", 9), 0x11002)
            await begin(vm)
            vm.device = FakeDevice()
            async with vm.session.lock:
                await vm.session.attach(vm.device)
            assert vm.device.bases == {0: 7}
            assert vm.device.logging == (SIZE, {0: USED_AT})
            assert vm.device.state is State.RUNNING


@pytest.mark.parametrize("known", [True, False])
async def test_what_a_lost_device_wrote_is_logged_where_all_memory_counts_as_written(
    autojump_clock: MockClock, known: bool
) -> None:
    """The guest may stop, and its memory be sent, before there is another one. If nobody knows
    where it was, the front-end is cut off, and looks at the log all the same."""
    inner = FakeDevice()
    async with with_shadow(inner, Tracking.ALL) as lost, connected(cast(FakeDevice, lost)) as vm:
        lost.take_calls = inner.take_calls  # type: ignore[attr-defined]
        await vm.start(0)
        log = vm.memfd(SIZE)
        assert await vm.ask(R.SET_LOG_BASE, place(), log) == place()
        await vm.ack(R.SET_FEATURES, u64(FEATURES | LOG_ALL))
        assert os.pread(log.fileno(), SIZE, 0) == bytes(SIZE)
        if not known:
            os.pwrite(vm.memory.fileno(), struct.pack("<H", 9), 0x11002)
        lost.fail("its process died")
        if known:
            assert await vm.base(0) == 0
        else:
            await vm.lost()
        pages = MEMORY // 4096
        assert os.pread(log.fileno(), pages // 8, 0) == b"\xff" * (pages // 8)


async def test_front_end_that_leaves_ends_the_log(autojump_clock: MockClock) -> None:
    device = FakeDevice()
    async with connected(device) as vm:
        await vm.start(0)
        await begin(vm)
    assert device.logging == (None, {})


async def test_front_end_is_offered_no_log_where_that_is_to_be_refused() -> None:
    """QEMU says so then before it migrates; a bridge before ours would rely on it."""
    async with (
        with_shadow(inner := FakeDevice(), Tracking.REFUSE) as device,
        connected(cast(FakeDevice, device)) as vm,
    ):
        vm.device = inner
        assert not int.from_bytes(await vm.ask(R.GET_FEATURES), "little") & LOG_ALL
        offer = PF(int.from_bytes(await vm.ask(R.GET_PROTOCOL_FEATURES), "little"))
        assert offer == OFFER & ~PF.LOG_SHMFD
        await vm.send(R.SET_FEATURES, u64(FEATURES | LOG_ALL))
        assert "was not offering: LOG_ALL" in str(await vm.lost())


async def test_device_that_can_not_log_refuses_and_goes_on(autojump_clock: MockClock) -> None:
    device = FakeDevice()
    device.refuse["log_writes"] = Unsupported("it can't")
    async with connected(device) as vm:
        await vm.start(0)
        with memfd(SIZE) as fd:
            assert await vm.ask(R.SET_LOG_BASE, place(), fd) == place()
        await vm.nack(R.SET_FEATURES, u64(FEATURES | LOG_ALL))
        assert device.state is State.RUNNING
        await begin(vm)


async def test_log_that_is_too_small_is_refused(autojump_clock: MockClock) -> None:
    async with connected() as vm:
        await vm.start(0)
        with memfd(SIZE) as fd:
            assert await vm.ask(R.SET_LOG_BASE, place(1), fd) == place(1)
        await vm.nack(R.SET_FEATURES, u64(FEATURES | LOG_ALL))
        assert vm.device.take_calls() == []


async def test_log_without_a_file_ends_the_session(autojump_clock: MockClock) -> None:
    async with connected() as vm:
        await vm.start(0, protocol=OFFER & ~PF.STATUS & ~PF.REPLY_ACK)
        await vm.send(R.SET_LOG_BASE, place())
        assert "came without a file descriptor" in str(await vm.lost())


async def test_log_larger_than_its_file_ends_the_session(autojump_clock: MockClock) -> None:
    async with connected() as vm:
        await vm.start(0, protocol=OFFER & ~PF.STATUS & ~PF.REPLY_ACK)
        with memfd(SIZE) as fd:
            await vm.send(R.SET_LOG_BASE, place(SIZE, 1), fd)
            assert "bytes from 1 on in a file of" in str(await vm.lost())
