"""What of a session goes to another process, and how what does not fit is refused."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable
from typing import Any

import cbor2
import pytest
import trio

from tests.unit.fakes import FakeDevice, OnVdpa, device_info, memfd, signals
from tests.unit.frontend import OFFER, PF, FrontEnd, connected, ring, shared_files
from vhostbridge.backends.errors import BridgeError, StateError
from vhostbridge.backends.fds import OwnedFd
from vhostbridge.backends.lifecycle import State
from vhostbridge.backends.vhostuser.messages import BackendRequest, Request
from vhostbridge.bridge import handover, handover_facts
from vhostbridge.bridge.handlers import HANDLERS
from vhostbridge.bridge.handover import Arrival, pack, unpack
from vhostbridge.bridge.pauses import Pauses
from vhostbridge.bridge.session import Session


async def leave(vm: FrontEnd) -> OwnedFd:
    """Have the front-end's session packed; it ends, and the device is as it was suspended."""
    boxes: list[OwnedFd] = []

    async def successor(session: Session) -> bool:
        boxes.append(await pack(session, Pauses()))
        return True

    vm.session.part(successor)
    with trio.fail_after(5):
        await vm.ended.wait()
    assert vm.session.taken and vm.device.state is not State.RUNNING
    return boxes[0]


async def empty(device: FakeDevice) -> None:
    """As a process that ends leaves it."""
    await device.reset()
    await device.set_memory([])


async def test_everything_that_the_session_knew_goes_along() -> None:
    before = shared_files()
    async with connected(OnVdpa()) as vm:
        await vm.start(0, 2)
        box = await leave(vm)
        vm.device.bases[2] = 77  # after it was saved: not seen any more
        other = OnVdpa()
        arrival = Arrival(box)
        session = Session("vm", arrival.channel(), other, HANDLERS)
        pause = await unpack(arrival, session, Pauses())
        assert 0 < pause < 60
        for name in ("features", "protocol", "status", "held"):
            assert getattr(session, name) == getattr(vm.session, name)
        assert session.vrings.keys() == vm.session.vrings.keys() == {0, 2}
        assert other.calls[-1] == ("run", vm.device.features, (0, None), (2, None))
        assert other.state is State.RUNNING
        assert other.rings[2].layout == vm.device.placed[2].layout
        assert signals(vm.kicks[0]) > 0 and signals(vm.calls[2]) > 0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(session.run)
            # The front-end has not noticed.
            assert await vm.base(2) == 0
            nursery.cancel_scope.cancel()
        arrival.close()
        await empty(vm.device)
    assert shared_files() == before


async def test_configuration_is_answered_still_when_the_next_device_goes_away() -> None:
    """QEMU would stand still until another one is there."""
    wanted = struct.pack("=III", 0, 60, 0) + bytes(60)
    async with connected(OnVdpa()) as vm:
        await vm.start(0, protocol=OFFER & ~PF.STATUS)
        before = await vm.ask(Request.GET_CONFIG, wanted)
        arrival = Arrival(await leave(vm))
        other = OnVdpa()
        session = Session("vm", arrival.channel(), other, HANDLERS)
        await unpack(arrival, session, Pauses())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(session.run)
            other.fail("its process died")
            with trio.fail_after(2):
                assert await vm.ask(Request.GET_CONFIG, wanted) == before
            nursery.cancel_scope.cancel()
        arrival.close()
        await empty(vm.device)


async def test_configuration_is_known_still_when_the_device_was_away_at_the_end() -> None:
    wanted = struct.pack("=III", 0, 60, 0) + bytes(60)
    async with connected(OnVdpa()) as vm:
        await vm.start(0)
        before = await vm.ask(Request.GET_CONFIG, wanted)
        vm.device.fail("its process died")
        await vm.settle()
        arrival = Arrival(await leave(vm))
        found = await arrival.state()
        assert found is not None
        state, stream = found
        stream.close()
        assert state.config == before[12:]
        arrival.close()


async def test_driver_is_told_of_what_changed_between_two_processes() -> None:
    """Nobody listened when the disk became larger."""
    wanted = struct.pack("=III", 0, 60, 0) + bytes(60)
    async with connected(OnVdpa()) as vm:
        await vm.start(0)
        reverse = await vm.reverse()
        await vm.ask(Request.GET_CONFIG, wanted)
        arrival = Arrival(await leave(vm))
        other = OnVdpa()
        other.config = b"\xff" * 8 + other.config[8:]
        session = Session("vm", arrival.channel(), other, HANDLERS)
        await unpack(arrival, session, Pauses())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(session.run)
            with trio.fail_after(2):
                told = await reverse.receive()
            assert told is not None and told.request == BackendRequest.CONFIG_CHANGE_MSG
            nursery.cancel_scope.cancel()
        reverse.close()
        arrival.close()
        await empty(vm.device)


async def test_positions_are_those_of_the_suspended_device() -> None:
    async with connected(OnVdpa()) as vm:
        await vm.start(0)
        vm.device.bases[0] = 4711
        arrival = Arrival(await leave(vm))
        other = OnVdpa()
        session = Session("vm", arrival.channel(), other, HANDLERS)
        await unpack(arrival, session, Pauses())
        assert other.bases[0] == 4711
        with trio.CancelScope() as scope:
            scope.cancel()
            await session.run()
        arrival.close()
        await empty(vm.device)


async def test_one_that_was_not_started_goes_along_as_far_as_it_is() -> None:
    """Its set-up goes on with the next process: the second half is told to that one."""
    async with connected(OnVdpa()) as vm:
        await vm.set_up()
        await vm.tell(
            Request.SET_VRING_NUM, (0).to_bytes(4, "little") + (256).to_bytes(4, "little")
        )
        await vm.settle()
        arrival = Arrival(await leave(vm))
        assert arrival.facts.state is None
        other = OnVdpa()
        session = Session("vm", arrival.channel(), other, HANDLERS)
        await unpack(arrival, session, Pauses())
        assert len(other.regions) == 1
        async with trio.open_nursery() as nursery:
            nursery.start_soon(session.run)
            await vm.tell(Request.SET_VRING_ADDR, ring(0))
            await vm.set_kick(0)
            await vm.enable(0)
            await vm.settle()
            assert other.state is State.RUNNING
            nursery.cancel_scope.cancel()
        arrival.close()
        await empty(vm.device)


async def test_device_that_can_not_be_suspended_goes_nowhere() -> None:
    refused: list[str] = []

    async def successor(session: Session) -> bool:
        session.device.refuse["suspend"] = StateError("it is busy")  # type: ignore[attr-defined]
        try:
            await pack(session, Pauses())
        except BridgeError as error:
            refused.append(error.message)
        return False

    async with connected(OnVdpa()) as vm:
        await vm.start(0)
        vm.session.part(successor)
        with trio.fail_after(5):
            await vm.ended.wait()
    assert refused == ["it is busy"] and not vm.session.taken


# What is left in the box is read once.
def boxed(facts: object, *fds: OwnedFd, box: Callable[..., OwnedFd] = handover._box) -> OwnedFd:
    return box(facts if isinstance(facts, bytes) else cbor2.dumps(facts), [f.fileno() for f in fds])


FACTS: dict[str, Any] = {
    "format": handover_facts.FORMAT,
    "producer": "vhost-bridge test",
    "began": 1,
    "pause": None,
    "paused": None,
    "features": 0,
    "protocol": 0,
    "status": 0,
    "held": False,
    "waits": None,
    "socket": 0,
    "reverse": None,
    "state": None,
    "log": None,
    "inflight": None,
    "regions": [],
    "vrings": [],
}
VRING: dict[str, Any] = {
    "index": 0,
    "size": 256,
    "base": None,
    "address": None,
    "kick": None,
    "call": None,
    "err": None,
    "enabled": False,
    "set_up": False,
    "running": False,
}
REGION = {"guest_address": 0, "size": 4096, "user_address": 0, "offset": 0, "fd": 1}


def test_large_luggage_comes_whole_and_in_order() -> None:
    files = [memfd(n) for n in range(1, 301)]
    data = cbor2.dumps({**FACTS, "producer": "x" * 50_000})
    arrival = Arrival(boxed(data, *files))
    assert arrival.facts.producer == "x" * 50_000
    for number, fd in enumerate(files):
        with arrival.take(number) as taken:
            assert os.fstat(taken.fileno()).st_ino == os.fstat(fd.fileno()).st_ino
        fd.close()
    with pytest.raises(StateError, match="descriptor 7 is missing"):
        arrival.take(7)


def test_what_was_read_once_is_gone() -> None:
    box = boxed(FACTS)
    again = box.dup()
    Arrival(box).close()
    with pytest.raises(StateError, match="damaged"):
        Arrival(again)


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        (b"\xa1", "damaged"),
        (b"\x00", "another version"),
        ({**FACTS, "format": handover_facts.FORMAT + 1}, "another version"),
        ({**FACTS, "more": 1}, "not the ones that are known"),
        ({k: v for k, v in FACTS.items() if k != "held"}, "not the ones that are known"),
        ({**FACTS, "features": -1}, "features of its Facts is malformed"),
        ({**FACTS, "status": True}, "status of its Facts is malformed"),
        ({**FACTS, "held": 1}, "held of its Facts is malformed"),
        ({**FACTS, "log": [1, "x", 2]}, "log of its Facts is malformed"),
        ({**FACTS, "regions": 5}, "regions of its Facts is malformed"),
    ],
)
def test_facts_that_are_none_are_refused(facts: object, why: str) -> None:
    with memfd(1) as file, pytest.raises(StateError, match=why):
        Arrival(boxed(facts, file))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"vrings": [{**VRING, "index": 9}]}, "beyond the 4 vrings"),
        ({"vrings": [{**VRING, "size": 4096}]}, "wants 4096 entries"),
        ({"vrings": [{**VRING, "size": 5}]}, "can't have 5 entries"),
        ({"vrings": [{**VRING, "kick": 1}]}, "should be an eventfd"),
        ({"vrings": [{**VRING, "kick": 9}]}, "descriptor 9 is missing"),
        ({"vrings": [{**VRING, "address": [1, 2]}]}, "no five parts"),
        ({"vrings": [{**VRING, "address": [1, 2, 3, 4, None]}]}, "address of its VringFacts"),
        ({"vrings": [{"index": 0}]}, "not the ones that are known"),
        ({"vrings": [7]}, "not the ones that are known"),
        ({"regions": [{**REGION, "size": 8192}]}, "needs 8192 bytes of its file"),
        ({"regions": [REGION, REGION]}, "descriptor 1 is missing"),
        ({"regions": [{**REGION, "fd": 0}]}, "descriptor 0 is missing"),
        ({"log": [1, 2]}, "no size, offset and descriptor"),
        ({"log": [4096, 4096, 1]}, "in a file of 4096"),
        ({"pause": "operator"}, "no reason or times"),
        ({"pause": "boredom", "paused": [1, 2]}, "no reason or times"),
        ({"pause": "operator", "paused": [1]}, "no reason or times"),
        ({"inflight": [4096, 0, 1, 64]}, "no place, vrings and descriptor"),
        ({"inflight": [4097, 0, 1, 64, 1]}, "in a file of 4096"),
        ({"reverse": 1}, "."),
        ({"features": 1 << 60}, "was not offering"),
        ({"protocol": 1 << 7}, "does not go with"),
        ({"state": 1}, "no device state|cut short"),
    ],
)
async def test_facts_that_do_not_fit_are_refused(changes: dict[str, Any], why: str) -> None:
    device = OnVdpa(device_info())
    ours, theirs = socket.socketpair()
    with ours, memfd(4096) as file:
        fd = OwnedFd(theirs.detach())
        arrival = Arrival(boxed({**FACTS, **changes}, fd, file))
        fd.close()
        session = Session("vm", arrival.channel(), device, HANDLERS)

        async def begin() -> None:
            try:
                await unpack(arrival, session, Pauses())
            finally:
                arrival.close()

        with pytest.raises((BridgeError, OSError), match=why):
            await session.run(begin)
        assert ours.recv(1) == b""
    assert device.state is State.RESET and device.regions == []
