"""Commands of the guest's control vring pass through the bridge: whole, in order, and once."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
import trio

from tests.unit.control_driver import FEATURES, INDEX, MAC, PROMISC, SET_MAC, Guest, relayed
from tests.unit.fakes import eventfd, signals
from tests.unit.test_controlled import Bench
from tests.vm.guest.vring import NEXT, Buffer
from vhostbridge.backends.lifecycle import State
from vhostbridge.bridge.recovery import last_state


def answering(b: Bench, answer: Callable[[bytes, int], bytes]) -> None:
    b.device._rings[True].send = answer  # type: ignore


async def test_commands_pass_and_are_known() -> None:
    async with relayed() as (b, guest):
        signals(guest.call)
        assert [await guest.tell(c) for c in (SET_MAC, PROMISC, b"\4\0\2\0")] == [0, 0, 0]
        assert b.commands() == [SET_MAC, PROMISC, b"\4\0\2\0"]
        with trio.fail_after(5):
            await trio.lowlevel.wait_readable(guest.call.fileno())
        assert b.device.control_state() == {"mac": MAC, "rx": {"promisc": True}, "pairs": 2}
        report = b.device.control_report()
        assert (report["driver"], report["mac"]) == ("guest", "52:54:00:aa:bb:cc")
        assert b.kernel.negotiated == FEATURES


async def test_refused_by_the_device_is_not_known() -> None:
    async with relayed() as (b, guest):
        b.device.refused = {PROMISC}
        assert await guest.tell(PROMISC) == 1
        assert b.commands() == [PROMISC] and b.device.control_state() is None


async def test_malformed_commands_do_not_reach_the_device() -> None:
    async with relayed() as (b, guest):
        for command in (
            b"\0",
            b"\0\0",
            b"\1\1abc",
            b"\x20\0\1",
            b"\2\0\1\0",
            b"\1\0" + b"\xff" * 40,
        ):
            assert await guest.tell(command) == 1
        assert b.commands() == []
        assert await guest.tell(PROMISC) == 0


async def test_whole_reply_comes_back() -> None:
    async with relayed() as (b, guest):
        answering(b, lambda command, room: bytes(range(room)))
        guest.submit(PROMISC, room=20)
        assert await guest.replies() == [bytes(range(20))]


async def test_many_commands_at_once_keep_their_order() -> None:
    async with relayed() as (b, guest):
        sent = [bytes((0, 0, n % 2)) for n in range(5)]
        for command in sent:
            guest.submit(command, kick=False)
        guest.ring.kick()
        assert await guest.replies(5) == [b"\0"] * 5
        assert b.commands() == sent


async def test_suspend_waits_for_the_command_on_its_way() -> None:
    async with relayed() as (b, guest):
        asked, go = threading.Event(), threading.Event()
        told: list[bytes] = []

        def slow(command: bytes, room: int) -> bytes:
            told.append(command)
            asked.set()
            go.wait(5)
            return bytes(room)

        answering(b, slow)
        guest.submit(SET_MAC)
        guest.submit(PROMISC)
        await trio.to_thread.run_sync(asked.wait, 5)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(b.device.suspend)
            await trio.sleep(0.02)
            assert b.device.state is State.RUNNING
            go.set()
        assert told == [SET_MAC] and await guest.replies() == [b"\0"]
        assert b.device.vrings[INDEX].base == 1
        guest.ring.kick()
        await trio.sleep(0.02)
        assert guest.ring.take_used() == []
        await b.device.resume()
        assert await guest.replies() == [b"\0"]
        assert told == [SET_MAC] and b.commands() == [PROMISC]


async def test_suspended_at_any_moment_nothing_is_lost_or_done_twice() -> None:
    async with relayed() as (b, guest):
        sent = [b"\1\1" + n.to_bytes(6, "big") for n in range(200)]

        async def drive() -> None:
            for command in sent:
                assert await guest.tell(command) == 0
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(drive)
            while True:
                await b.device.suspend()
                assert b.device.vrings[INDEX].base == guest.ring.used_index
                await b.device.resume()
                await trio.sleep(0.003)
        assert b.commands() == sent


async def test_guest_that_breaks_its_vring_stops_it_alone(caplog: pytest.LogCaptureFixture) -> None:
    async with relayed() as (b, guest):
        at = guest.ring.descriptors
        guest.submit(PROMISC, kick=False)
        for descriptor in range(16):
            guest.memory.u16[(at + 16 * descriptor) // 2 + 6] = NEXT
            guest.memory.u16[(at + 16 * descriptor) // 2 + 7] = descriptor
        guest.ring.kick()
        with trio.fail_after(5):
            await trio.lowlevel.wait_readable(guest.err.fileno())
        assert "vring 8 stopped: " in caplog.text
        assert b.device.state is State.RUNNING
        await b.device.suspend()
        await b.device.resume()
        await b.device.reset()


@pytest.mark.parametrize("room", [0, 1])
async def test_command_without_room_for_its_reply(room: int) -> None:
    async with relayed() as (b, guest):
        chain = [Buffer(guest.memory, guest._at, 3)]
        if room:
            chain = [Buffer(guest.memory, guest._at, 1, writable=True), *chain]
        guest.ring.add(chain)
        with trio.fail_after(5):
            await trio.lowlevel.wait_readable(guest.err.fileno())
        assert b.commands() == []


async def test_guest_memory_that_goes_away(caplog: pytest.LogCaptureFixture) -> None:
    async with relayed() as (b, guest):
        os.ftruncate(guest.memory.fd, 0)
        os.eventfd_write(guest.ring.kick_fd, 1)
        with trio.fail_after(5):
            await trio.lowlevel.wait_readable(guest.err.fileno())
        assert "vring 8 stopped: guest memory is gone" in caplog.text
        assert b.device.state is State.RUNNING


async def test_device_that_does_not_answer_is_failed_and_the_command_waits() -> None:
    async with relayed() as (b, guest):
        await guest.tell(SET_MAC)
        b.device.silent = True
        guest.submit(PROMISC)
        with trio.fail_after(5):
            await b.device.failed.wait()
        assert b.device.failure == "no answer"
        state = last_state(b.device, [INDEX], [guest.region])
        assert state is not None and state.vrings[-1].base == 1
        assert state.control == {"mac": MAC}


async def test_eventfds_are_exchanged_while_it_runs() -> None:
    async with relayed() as (b, guest):
        for _ in range(5):
            kick, call = b.own(eventfd()), b.own(eventfd())
            guest.new_eventfds(kick, call)
            await b.device.set_kick(INDEX, kick)
            await b.device.set_call(INDEX, call)
            signals(call)
            assert await guest.tell(PROMISC) == 0
            with trio.fail_after(5):
                await trio.lowlevel.wait_readable(call.fileno())


async def test_disabled_vring_waits() -> None:
    async with relayed() as (b, guest):
        await b.device.set_enabled(INDEX, False)
        guest.submit(PROMISC)
        await trio.sleep(0.02)
        assert b.commands() == []
        await b.device.set_enabled(INDEX, True)
        assert await guest.replies() == [b"\0"]


async def test_memory_comes_and_goes_while_it_runs() -> None:
    async with relayed() as (b, guest):
        more = Guest(b)
        region = replace(more.region, guest_address=0x8000_0000, identity=(0, 8, 0))
        await b.device.set_memory([*b.regions, guest.region, region])
        assert await guest.tell(PROMISC) == 0
        await b.device.set_memory([*b.regions, guest.region])
        assert await guest.tell(SET_MAC) == 0
