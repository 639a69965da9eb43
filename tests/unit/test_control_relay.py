"""The guest's control vring behind the bridge: a driver of it, and a device that answers."""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import trio

from tests.unit.fakes import eventfd, signals
from tests.unit.test_controlled import CTRL_RX, CTRL_VQ, MAC_ADDR, MQ, VERSION_1, Bench, bench
from tests.vm.guest.memory import Memory
from tests.vm.guest.vring import NEXT, Buffer, SplitRing
from vhostbridge.backends.errors import StateError, Unsupported
from vhostbridge.backends.fds import OwnedFd
from vhostbridge.backends.guest import MemoryRegion, VringSetup
from vhostbridge.backends.lifecycle import State
from vhostbridge.backends.state import compatibility
from vhostbridge.bridge.recovery import last_state

FEATURES = VERSION_1 | CTRL_VQ | CTRL_RX | MQ | MAC_ADDR
INDEX = 8
MAC = bytes.fromhex("525400aabbcc")
SET_MAC = b"\1\1" + MAC
PROMISC = b"\0\0\1"


class Guest:
    """A driver with a control vring of 16 descriptors."""

    def __init__(self, b: Bench) -> None:
        self.memory = Memory(1 << 20)
        self.ring = SplitRing(self.memory, 16)
        self._at = self.memory.take(4096, 64)
        fd = b.own(OwnedFd(self.memory.fd))
        self.region = MemoryRegion(self.memory.guest, self.memory.size, fd, 0, (0, 7, 0))
        self.ring.close()
        self.kick, self.call, self.err = (b.own(eventfd()) for _ in range(3))
        self.new_eventfds(self.kick, self.call)
        self._replies: dict[int, tuple[int, int]] = {}

    def new_eventfds(self, kick: OwnedFd, call: OwnedFd) -> None:
        self.kick, self.call = kick, call
        self.ring.kick_fd, self.ring.call_fd = kick.fileno(), call.fileno()

    def setup(self, base: int | None = 0) -> VringSetup:
        guest, ring = self.memory.guest, self.ring
        areas = (guest + ring.descriptors, guest + ring.avail, guest + ring.used)
        fds = (self.kick, self.call, self.err)
        return VringSetup(INDEX, ring.size, *areas, base, *fds, enabled=True)

    def submit(self, command: bytes, *, room: int = 1, kick: bool = True) -> None:
        """In two pieces, as Linux does it."""
        at = self._at + 256 * (len(self._replies) % 8)
        self.memory.map[at : at + len(command)] = command
        self.memory.map[at + 200 : at + 200 + room] = b"\xee" * room
        pieces = [(at, 2), (at + 2, len(command) - 2)] if len(command) > 2 else [(at, len(command))]
        chain = [Buffer(self.memory, *piece) for piece in pieces]
        chain.append(Buffer(self.memory, at + 200, room, writable=True))
        self._replies[self.ring.add(chain, kick=kick)] = (at + 200, room)

    async def replies(self, count: int = 1) -> list[bytes]:
        """Those of the next commands; each with a call."""
        found: list[bytes] = []
        with trio.fail_after(5):
            while len(found) < count:
                for head, _ in self.ring.take_used():
                    at, room = self._replies.pop(head)
                    found.append(self.memory.map[at : at + room])
                await trio.sleep(0.001)
        return found

    async def tell(self, command: bytes) -> int:
        self.submit(command)
        ((ack,),) = await self.replies()
        return ack


@asynccontextmanager
async def relayed() -> AsyncIterator[tuple[Bench, Guest]]:
    async with bench() as b:
        guest = Guest(b)
        await b.device.set_memory([*b.regions, guest.region])
        await b.device.run(FEATURES, [*b.rings(2), guest.setup()])
        yield b, guest


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


async def test_restarted_device_is_told_again_before_data_vrings() -> None:
    async with relayed() as (b, guest):
        for command in (b"\4\0\2\0", PROMISC, SET_MAC):
            await guest.tell(command)
        await b.device.suspend()
        b.commands()
        b.kernel.log.clear()
        rings = [replace(v, size=32) for v in b.device.vrings.values() if v.index != INDEX]
        await b.device.run(FEATURES, [*rings, guest.setup(None)])
        log = b.kernel.log
        after = log[log.index("status 15") + 1 :]
        assert after == [
            SET_MAC.hex(),
            "04000200",
            PROMISC.hex(),
            *[f"enable {n}" for n in range(4)],
        ]
        assert await guest.tell(b"\0\0\0") == 0
        assert b.device.control_state() == {"mac": MAC, "rx": {"promisc": False}, "pairs": 2}


async def test_resumed_device_is_not_told_again() -> None:
    async with relayed() as (b, guest):
        await guest.tell(SET_MAC)
        await b.device.suspend()
        assert b.device.vrings[INDEX].base == 1
        b.commands()
        await b.device.resume()
        assert b.commands() == []
        assert await guest.tell(PROMISC) == 0


async def test_refused_when_told_again_fails_the_start() -> None:
    async with relayed() as (b, guest):
        await guest.tell(SET_MAC)
        await b.device.suspend()
        b.device.refused = {SET_MAC}
        rings = [replace(v, size=32) for v in b.device.vrings.values() if v.index != INDEX]
        with pytest.raises(Unsupported, match="refused MAC ADDR_SET, which the guest's driver"):
            await b.device.run(FEATURES, [*rings, guest.setup(None)])
        assert b.device.state is State.SUSPENDED
        assert b.device.vrings[INDEX].base == 1


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


async def test_loaded_state_is_told_before_data_vrings_run() -> None:
    async with relayed() as (b, guest):
        for command in (SET_MAC, PROMISC):
            await guest.tell(command)
        await b.device.suspend()
        state = replace(b.device.state_of(bytes(24)), transport="vdpa")
    async with bench() as b:
        other = Guest(b)
        await b.device.set_memory([*b.regions, other.region])
        b.device.load(state)
        assert b.device.vrings[INDEX].base == 2 and b.device.state is State.SUSPENDED
        await b.device.run(FEATURES, [*b.rings(2), other.setup(2)])
        assert b.commands() == [SET_MAC, PROMISC]
        assert b.device.control_state() == {"mac": MAC, "rx": {"promisc": True}}


async def test_address_from_the_configuration_goes_along() -> None:
    async with relayed() as (b, _):
        await b.device.suspend()
        state = b.device.state_of(MAC + bytes(18))
        assert state.control is None
    async with bench() as b:
        other = Guest(b)
        await b.device.set_memory([*b.regions, other.region])
        b.device.load(replace(state, features=FEATURES | 1 << 5))
        await b.device.run(FEATURES | 1 << 5, [*b.rings(2), other.setup(0)])
        assert b.commands() == [SET_MAC]


async def test_state_that_can_not_be_told_is_refused_before_the_device_is_touched() -> None:
    async with bench() as b:
        state = replace(b.device.state_of(b""), control={"newer": 1}, features=FEATURES)
        with pytest.raises(StateError, match="can't be told to a device"):
            b.device.load(state)
        assert b.device.state is State.RESET


async def test_compatibility_knows_who_can_be_told() -> None:
    async with bench() as b:
        mac = 1 << 5
        info = replace(b.device.info, features=b.device.info.features | mac)
        state = replace(b.device.state_of(MAC + bytes(18)), control={"mac": MAC}, device_id=1)
        state = replace(state, features=FEATURES | mac, transport="vdpa")
        now = bytes(24)
        abilities = b.device.capabilities
        assert compatibility(state, info, abilities, now) == []
        told = compatibility(state, replace(info, takes_control=False), abilities, now)
        assert [reason for reason in told if "control vring" in reason]
        assert [reason for reason in told if reason.startswith("mac ")]


async def test_another_driver_begins_with_a_device_that_forgot() -> None:
    async with relayed() as (b, guest):
        await guest.tell(PROMISC)
        await b.device.suspend()
        b.device.new_driver()
        b.kernel.log.clear()
        b.commands()
        other = Guest(b)
        await b.device.set_memory([*b.regions, other.region])
        await b.device.run(FEATURES, [*b.rings(2), other.setup(0)])
        assert "status 0" in b.kernel.log and b.commands() == []
        assert b.device.control_state() is None


async def test_reset_forgets() -> None:
    async with relayed() as (b, guest):
        await guest.tell(PROMISC)
        await b.device.suspend()
        await b.device.reset()
        assert b.device.control_state() is None and INDEX not in b.device.vrings


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


async def test_what_the_guest_said_holds_while_its_control_vring_is_stopped() -> None:
    async with relayed() as (b, guest):
        assert await guest.tell(SET_MAC) == 0
        await b.device.stop_vring(INDEX)
        rest = [replace(v, base=None) for i, v in b.device.vrings.items() if i != INDEX]
        await b.device.run(FEATURES, rest)
        assert b.device.control_report()["driver"] == "guest"
        assert b.commands() == [SET_MAC]


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


async def test_front_end_goes_over_to_the_control_vring_and_back() -> None:
    async with bench() as b:
        guest = Guest(b)
        await b.device.set_memory([*b.regions, guest.region])
        await b.device.run(VERSION_1 | MQ, b.rings(2))
        assert b.commands() == [b"\4\0\2\0", PROMISC]
        await b.device.suspend()
        await b.device.run(FEATURES, [*b.rings(2), guest.setup(0)])
        assert b.commands() == [] and await guest.tell(SET_MAC) == 0
        await b.device.suspend()
        await b.device.run(VERSION_1 | MQ, b.rings(2))
        assert b.commands() == [SET_MAC, b"\4\0\2\0", PROMISC]
        assert b.device.control_vring is None
