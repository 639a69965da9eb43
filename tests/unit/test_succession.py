"""A bridge's front-end between two processes, and what becomes of it where that can't be."""

from __future__ import annotations

import os
import socket
from functools import partial

import pytest
import trio

from tests.unit.fakes import FakeDevice, OnVdpa, device_info
from tests.unit.frontend import FrontEnd, connected, shared_files
from tests.unit.store import Store
from vhostbridge.backends.errors import BridgeError, StateError
from vhostbridge.backends.lifecycle import State
from vhostbridge.bridge.handlers import HANDLERS
from vhostbridge.bridge.journal import Journal
from vhostbridge.bridge.session import Session
from vhostbridge.bridge.succession import Succession


def begins(store: Store) -> Succession:
    """What a process that begins now finds."""
    succession = Succession("vm", store.next_process(), Journal("vm"))
    succession.find()
    return succession


async def leave(vm: FrontEnd, store: Store) -> None:
    """End the front-end's session as a process does that ends."""
    vm.session.part(begins(store).hand_over)
    with trio.fail_after(5):
        await vm.ended.wait()


async def clean(device: FakeDevice) -> None:
    """As a process that ends leaves it."""
    await device.reset()
    await device.set_memory([])


async def take_over(succession: Succession, device: FakeDevice) -> Session:
    arrival = succession.take()
    session = Session("vm", arrival.channel(), device, HANDLERS)
    await succession.take_over(arrival, session)
    return session


async def end(session: Session) -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        await session.run()


async def test_front_end_goes_on_with_the_next_process(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    store, other = Store(), OnVdpa()
    async with connected(OnVdpa()) as vm:
        await vm.start(0, 2)
        vm.device.bases[2] = 4711
        await leave(vm, store)
        assert vm.session.taken and set(store.kept) == {"session.vm"}
        after = begins(store)
        session = await take_over(after, other)
        assert other.state is State.RUNNING and other.bases == {0: 0, 2: 4711}
        assert after.arrival is None and not store.kept
        for what in ("handed over", "taken over, pause "):
            assert f"vm: front-end (pid {os.getpid()}) {what}" in caplog.text
        await end(session)
        await clean(vm.device)


async def test_one_that_nobody_took_goes_on_as_it_came() -> None:
    """Its back-end was away for all of a process's life."""
    store, other = Store(), OnVdpa()
    async with connected(OnVdpa()) as vm:
        await vm.start(0)
        vm.device.bases[0] = 4711
        await leave(vm, store)
        between = begins(store)
        between.hand_on()
        between.close()
        session = await take_over(begins(store), other)
        assert other.state is State.RUNNING and other.bases == {0: 4711}
        await end(session)
        await clean(vm.device)


async def test_front_end_that_nobody_keeps_is_not_handed_over(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = Store()
    store.full = True
    async with connected(OnVdpa()) as vm:
        await vm.start(0)
        await leave(vm, store)
        assert not vm.session.taken and vm.device.state is State.RESET
    assert "vm: the front-end can't be handed over: the service manager" in caplog.text


async def test_front_end_whose_device_can_not_be_suspended_is_not_handed_over(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = Store()
    async with connected(OnVdpa()) as vm:
        await vm.start(0)
        vm.device.refuse["suspend"] = StateError("it is busy")
        await leave(vm, store)
        assert not vm.session.taken and not store.kept
    assert "vm: the front-end can't be handed over: it is busy" in caplog.text


async def test_one_that_came_and_that_nobody_keeps_is_hung_up(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = Store()
    async with connected(OnVdpa()) as vm:
        await vm.start(0)
        await leave(vm, store)
        between = begins(store)
        store.full = True
        between.hand_on()
        assert "vm: the front-end can't be handed over: the service manager" in caplog.text
        between.close()
        with trio.fail_after(5):
            assert await vm.peer.receive() is None
        await clean(vm.device)


async def test_device_that_it_does_not_fit_leaves_nothing_open() -> None:
    before, store = shared_files(), Store()
    async with connected(OnVdpa()) as vm:
        await vm.start(0)
        await leave(vm, store)
        after, other = begins(store), OnVdpa(device_info(features=0))
        arrival = after.take()
        session = Session("vm", arrival.channel(), other, HANDLERS)
        with pytest.raises(BridgeError, match="was not offering"):
            await session.run(partial(after.take_over, arrival, session))
        assert await vm.peer.receive() is None
        await clean(vm.device)
    assert shared_files() == before


def test_what_is_damaged_is_told_and_not_there(caplog: pytest.LogCaptureFixture) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    store = Store()
    with ours, theirs:
        ours.send(b"\xa1")
        store.keep("session.vm", theirs.fileno())
    assert begins(store).arrival is None
    assert "vm: what the process before left" in caplog.text
