"""A front-end that takes a device's state along: SET_DEVICE_STATE_FD and CHECK_DEVICE_STATE."""

from __future__ import annotations

import os
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import MockClock

from tests.unit.fakes import OWN, Stateful, device_info, u64
from tests.unit.frontend import DEVICE_GETS, FEATURES, OFFER, PF, TABLE, FrontEnd, connected, names
from vhostbridge.backends.errors import PeerError
from vhostbridge.backends.fds import OwnedFd
from vhostbridge.backends.lifecycle import State
from vhostbridge.backends.state_stream import check_stream
from vhostbridge.backends.vhostuser.messages import Request as R

PROTOCOL = OFFER & ~PF.STATUS | PF.DEVICE_STATE
ACCEPTED, REFUSED = u64(0x100), u64(0x101)


async def save(vm: FrontEnd) -> bytes:
    """What the bridge writes for a front-end that saves, up to its end."""
    reader, writer = (OwnedFd(fd) for fd in os.pipe())
    with reader:
        with writer:
            request = struct.pack("=II", 0, 0)
            assert await vm.ask(R.SET_DEVICE_STATE_FD, request, writer) == ACCEPTED
        data = b""
        while piece := await trio.to_thread.run_sync(os.read, reader.fileno(), 1 << 16):
            data += piece
    return data


async def offer_state(vm: FrontEnd, data: bytes) -> int:
    """Load ``data``; the answer to CHECK_DEVICE_STATE."""
    reader, writer = (OwnedFd(fd) for fd in os.pipe())
    with reader:
        request = struct.pack("=II", 1, 0)
        assert await vm.ask(R.SET_DEVICE_STATE_FD, request, reader) == ACCEPTED
    os.write(writer.fileno(), data)
    writer.close()
    return int.from_bytes(await vm.ask(R.CHECK_DEVICE_STATE), "little")


async def stopped(vm: FrontEnd) -> None:
    await vm.start(0, protocol=PROTOCOL)
    await vm.base(0)


async def saved_state() -> bytes:
    async with connected(Stateful()) as vm:
        await stopped(vm)
        data = await save(vm)
        assert await vm.ask(R.CHECK_DEVICE_STATE) == u64(0)
    return data


async def test_stopped_device_is_saved_and_may_be_again() -> None:
    async with connected(Stateful()) as vm:
        await stopped(vm)
        first = await save(vm)
        assert await vm.ask(R.CHECK_DEVICE_STATE) == u64(0)
        assert first == await save(vm)
        assert await vm.ask(R.CHECK_DEVICE_STATE) == u64(0)
        assert OWN in first
        assert vm.device.state is State.SUSPENDED


async def test_saved_state_is_a_stream_of_ours() -> None:
    reader, writer = (OwnedFd(fd) for fd in os.pipe())
    os.write(writer.fileno(), await saved_state())
    writer.close()
    state, checked = await check_stream(reader, lambda count: None)
    with checked:
        assert (state.internal_owner, [v.index for v in state.vrings]) == ("fake", [0])


async def test_state_is_loaded_before_anything_else_is_said() -> None:
    data = await saved_state()
    device = Stateful()
    device.own = b""
    async with connected(device) as vm:
        await vm.send(R.SET_PROTOCOL_FEATURES, u64(int(PROTOCOL)))
        assert await offer_state(vm, data) == 0
        assert (device.own, device.state) == (OWN, State.SUSPENDED)


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-1], lambda data: data + b"x", lambda data: b"", lambda data: b"garbage"],
    ids=["truncated", "too long", "empty", "garbage"],
)
async def test_damaged_state_is_not_loaded(damage: Callable[[bytes], bytes]) -> None:
    data = await saved_state()
    device = Stateful()
    device.own = b""
    async with connected(device) as vm:
        await vm.send(R.SET_PROTOCOL_FEATURES, u64(int(PROTOCOL)))
        assert await offer_state(vm, damage(data)) == 1
        assert (device.own, device.state) == (b"", State.RESET)
        assert await offer_state(vm, data) == 0


@pytest.mark.parametrize(("direction", "phase"), [(2, 0), (0, 1), (1, 7)])
async def test_unknown_transfer_is_refused(direction: int, phase: int) -> None:
    async with connected(Stateful()) as vm:
        await stopped(vm)
        with OwnedFd(os.memfd_create("state")) as fd:
            request = struct.pack("=II", direction, phase)
            assert await vm.ask(R.SET_DEVICE_STATE_FD, request, fd) == REFUSED


async def test_running_device_is_not_saved() -> None:
    async with connected(Stateful()) as vm:
        await vm.start(0, protocol=PROTOCOL)
        with OwnedFd(os.memfd_create("state")) as fd:
            assert await vm.ask(R.SET_DEVICE_STATE_FD, struct.pack("=II", 0, 0), fd) == REFUSED


async def test_check_without_a_transfer_fails() -> None:
    async with connected(Stateful()) as vm:
        await stopped(vm)
        assert await vm.ask(R.CHECK_DEVICE_STATE) == u64(1)


async def test_reader_that_goes_away_fails_the_save_only() -> None:
    async with connected(Stateful()) as vm:
        await stopped(vm)
        reader, writer = (OwnedFd(fd) for fd in os.pipe())
        reader.close()
        with writer:
            request = struct.pack("=II", 0, 0)
            assert await vm.ask(R.SET_DEVICE_STATE_FD, request, writer) == ACCEPTED
        assert await vm.ask(R.CHECK_DEVICE_STATE) == u64(1)
        assert vm.device.state is State.SUSPENDED


async def test_device_without_state_of_its_own_does_not_offer_it() -> None:
    async with connected() as vm:
        assert await vm.ask(R.GET_PROTOCOL_FEATURES) == u64(int(OFFER))


async def test_state_goes_through_nothing_that_makes_readers_wait() -> None:
    async with connected(Stateful()) as vm:
        await vm.negotiate(protocol=PROTOCOL)
        with OwnedFd(os.open("/dev/null", os.O_RDWR)) as fd:
            for direction in (0, 1):
                request = struct.pack("=II", direction, 0)
                assert await vm.ask(R.SET_DEVICE_STATE_FD, request, fd) == u64(0x101)


async def test_state_that_never_comes_is_given_up(autojump_clock: MockClock) -> None:
    async with connected(Stateful()) as vm:
        await vm.negotiate(protocol=PROTOCOL)
        reader, writer = (OwnedFd(fd) for fd in os.pipe())
        with reader, writer:
            request = struct.pack("=II", 1, 0)
            assert await vm.ask(R.SET_DEVICE_STATE_FD, request, reader) == u64(0x100)
            began = trio.current_time()
            assert await vm.ask(R.CHECK_DEVICE_STATE) == u64(1)
            assert trio.current_time() - began < 40


async def gone_after_saving(vm: FrontEnd) -> bytes:
    """The back-end has given all, been asked whether it was all, and ended: passt does so."""
    await stopped(vm)
    data = await save(vm)
    vm.device.fail("its process ended")
    assert await vm.ask(R.CHECK_DEVICE_STATE) == u64(0)
    return data


async def start_again(vm: FrontEnd) -> None:
    """As QEMU does when its migration has failed."""
    await vm.set_ring(0, base=0)
    await vm.set_kick(0)
    await vm.settle()


async def test_front_end_is_told_that_a_back_end_that_ended_gave_all() -> None:
    async with connected(Stateful()) as vm:
        await gone_after_saving(vm)
        assert await vm.ask(R.GET_PROTOCOL_FEATURES) != u64(0)
        assert not vm.ended.is_set()


async def test_next_back_end_gets_the_state_only_when_the_front_end_goes_on() -> None:
    async with connected(Stateful()) as vm:
        await gone_after_saving(vm)
        second = Stateful()
        second.own = b""
        await vm.session.attach(second)
        vm.device = second
        await vm.settle()
        assert (second.own, second.state) == (b"", State.RESET)
        await start_again(vm)
        assert (second.own, second.state) == (OWN, State.RUNNING)


async def test_front_end_that_goes_on_before_the_next_back_end_is_there_waits() -> None:
    async with connected(Stateful()) as vm:
        await gone_after_saving(vm)
        await start_again(vm)
        second = Stateful()
        second.own = b""
        await vm.session.attach(second)
        vm.device = second
        assert (second.own, second.state) == (OWN, State.RUNNING)


async def test_log_says_when_vrings_run_and_when_they_only_wait(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An operator puts the guest's address back when its connections are there again."""
    async with connected(Stateful()) as vm:
        await gone_after_saving(vm)
        with caplog.at_level("INFO"):
            await start_again(vm)
            assert "running vrings" not in caplog.text
            assert "vrings 0 wait for the back-end" in caplog.text
            vm.device = Stateful()
            await vm.session.attach(vm.device)
            assert "running vrings 0" in caplog.text


async def test_state_is_given_again_when_nothing_ran_since() -> None:
    """A paused guest is migrated once more."""
    async with connected(Stateful()) as vm:
        first = await gone_after_saving(vm)
        second = Stateful()
        second.own = b""
        await vm.session.attach(second)
        vm.device = second
        assert await save(vm) == first
        assert await vm.ask(R.CHECK_DEVICE_STATE) == u64(0)


async def test_back_end_that_ends_after_it_ran_on_is_lost() -> None:
    async with connected(Stateful()) as vm:
        await stopped(vm)
        await save(vm)
        assert await vm.ask(R.CHECK_DEVICE_STATE) == u64(0)
        await start_again(vm)
        assert vm.device.state is State.RUNNING
        vm.device.fail("its process ended")
        await vm.ended.wait()


async def test_state_that_the_next_back_end_refuses_ends_the_session() -> None:
    class Refusing(Stateful):
        @asynccontextmanager
        async def internal_sink(self) -> AsyncIterator[OwnedFd]:
            self.fail("it refuses")
            raise PeerError("it refuses")
            yield

    async with connected(Stateful()) as vm:
        await gone_after_saving(vm)
        second = Refusing()
        await vm.session.attach(second)
        vm.device = second
        await vm.set_ring(0, base=0)
        await vm.lost()


class Smaller(Stateful):
    """It has no room for the vrings of the state."""

    def __init__(self) -> None:
        super().__init__()
        self.info = device_info(vring_size_max=128)
        self.own = b""


async def test_back_end_that_does_not_fit_the_state_does_not_run_without_it() -> None:
    """Nor does the one after it: what it knew of its guest's files is in the state."""
    async with connected(Stateful()) as vm:
        await vm.start(0, protocol=PROTOCOL | PF.STATUS)
        await vm.ack(R.SET_STATUS, u64(0xF))
        await vm.base(0)
        await vm.ack(R.SET_STATUS, u64(0))
        await save(vm)
        vm.device.fail("its process ended")
        assert await vm.ask(R.CHECK_DEVICE_STATE) == u64(0)
        second = Smaller()
        await vm.session.attach(second)
        await vm.set_ring(0, base=0, size=128)
        await vm.send(R.SET_STATUS, u64(0xF), flags=0x9)
        assert "does not fit" in str(await vm.lost())
        assert second.failed.is_set() and "run" not in names(second.calls)
        vm.device = second


async def test_next_back_end_does_not_run_without_a_state_that_was_given_up() -> None:
    async with connected(Stateful()) as vm:
        await gone_after_saving(vm)
        await start_again(vm)
        vm.device = Smaller()
        await vm.session.attach(vm.device)
        assert "does not fit" in str(await vm.lost())
        assert not vm.session.awaiting


async def test_cloud_hypervisor_takes_the_state_along() -> None:
    """It pauses by disabling, asks for bases and state then, and reads the dirty log last."""
    async with connected(Stateful()) as vm:
        await vm.start(0, 1, protocol=PROTOCOL)
        vm.device.bases.update({0: 40, 1: 2})
        vm.need_reply = True
        await vm.enable(0, 1, on=0)
        assert [await vm.base(index) for index in (0, 1)] == [40, 2]
        data = await save(vm)
        assert await vm.ask(R.CHECK_DEVICE_STATE) == u64(0)
        place = struct.pack("=QQ", 4096, 0)
        with OwnedFd(os.memfd_create("log")) as log:
            os.ftruncate(log.fileno(), 4096)
            assert await vm.ask(R.SET_LOG_BASE, place, log, flags=0x9) == place
        assert vm.device.state is State.SUSPENDED
    async with connected(Stateful()) as vm:
        await vm.send(R.SET_PROTOCOL_FEATURES, u64(int(PROTOCOL)))
        vm.need_reply = True
        assert await offer_state(vm, data) == 0
        await vm.tell(R.SET_FEATURES, u64(FEATURES))
        await vm.tell(R.SET_MEM_TABLE, TABLE, vm.memfd())
        for index, base in ((0, 40), (1, 2)):
            await vm.set_ring(index, base=base)
        await vm.enable(0, 1)
        await vm.settle()
        assert vm.device.take_calls()[-1] == ("run", DEVICE_GETS, (0, 40), (1, 2))
