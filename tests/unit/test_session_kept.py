"""Front-ends that go while their device is to be kept, and the ones that come after them."""

from __future__ import annotations

import os
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from trio.testing import MockClock

from tests.unit.fakes import FakeDevice, frame, u64
from tests.unit.frontend import (
    DEVICE_GETS,
    FEATURES,
    OFFER,
    PF,
    TABLE,
    FrontEnd,
    connected,
    names,
)
from vhostbridge.backends.errors import BridgeError
from vhostbridge.backends.fds import OwnedFd
from vhostbridge.backends.lifecycle import State
from vhostbridge.backends.vhostuser.messages import Request as R
from vhostbridge.bridge.config import OnDisconnect
from vhostbridge.bridge.incoming import Incoming, Origin

KEEP = OnDisconnect.KEEP


def publish_used(memory: OwnedFd, index: int, used: int) -> None:
    os.pwrite(memory.fileno(), struct.pack("<H", used), 0x10000 * (index + 1) + 0x2000 + 2)


async def left_running(device: FakeDevice, *bases: int) -> Incoming:
    """A front-end ran vrings that stop at `bases`, and went; what waits for the next one."""
    async with connected(device, on_disconnect=KEEP) as vm:
        await vm.start(*range(len(bases)))
        device.bases.update(enumerate(bases))
    assert vm.session.incoming is not None
    return vm.session.incoming


@asynccontextmanager
async def next_one(
    device: FakeDevice,
    waiting: Incoming,
    *bases: int,
    used: tuple[int, ...] | None = None,
    features: int = FEATURES,
) -> AsyncIterator[FrontEnd]:
    """The next front-end, with vrings at the same places, started at `bases`."""
    async with connected(device, incoming=waiting, on_disconnect=KEEP) as vm:
        await vm.negotiate(features, OFFER & ~PF.STATUS)
        vm.memory = vm.memfd()
        await vm.send(R.SET_MEM_TABLE, TABLE, vm.memory)
        for index, base in enumerate(bases):
            publish_used(vm.memory, index, base if used is None else used[index])
            await vm.set_call(index)
            await vm.set_ring(index, base)
        await vm.ask(R.GET_FEATURES)
        device.take_calls()
        await vm.enable(*range(len(bases)))
        await vm.settle()
        yield vm


async def test_a_device_is_kept_suspended_and_its_memory_given_back(
    autojump_clock: MockClock,
) -> None:
    device = FakeDevice()
    waiting = await left_running(device, 7, 9)
    assert waiting.origin is Origin.KEPT
    assert [v.base for v in waiting.state.vrings] == [7, 9]
    assert device.state is State.SUSPENDED
    assert device.regions == []
    assert "reset" not in names(device.take_calls())


async def test_the_next_front_end_goes_on(autojump_clock: MockClock) -> None:
    device = FakeDevice()
    waiting = await left_running(device, 7, 9)
    async with next_one(device, waiting, 7, 9) as vm:
        assert vm.session.incoming is None
        assert device.take_calls() == [("run", DEVICE_GETS, (0, 7), (1, 9))]


@pytest.mark.parametrize(
    ("bases", "used", "features"),
    [
        pytest.param((0,), (0,), FEATURES, id="fresh rings at the same place"),
        pytest.param((7,), (6,), FEATURES, id="memory of another moment"),
        pytest.param((6,), (7,), FEATURES, id="another base"),
        pytest.param((7,), (7,), FEATURES & ~(1 << 29), id="other features"),
        pytest.param((7, 0), (7, 0), FEATURES, id="a vring that did not run"),
    ],
)
async def test_one_that_does_not_go_on_begins_with_a_reset_device(
    autojump_clock: MockClock,
    caplog: pytest.LogCaptureFixture,
    bases: tuple[int, ...],
    used: tuple[int, ...],
    features: int,
) -> None:
    device = FakeDevice()
    waiting = await left_running(device, 7)
    with caplog.at_level("INFO"):
        async with next_one(device, waiting, *bases, used=used, features=features) as vm:
            calls = device.take_calls()
            assert names(calls) == ["reset", "run"]
            assert calls[1][2:] == tuple(enumerate(bases))
            assert vm.session.incoming is None
    assert "the kept state is given up: " in caplog.text


@pytest.mark.parametrize("request_", [R.RESET_DEVICE, R.SET_STATUS])
async def test_a_reset_by_the_next_front_end_gives_the_state_up(
    autojump_clock: MockClock, request_: R
) -> None:
    device = FakeDevice()
    waiting = await left_running(device, 7)
    async with connected(device, incoming=waiting, on_disconnect=KEEP) as vm:
        await vm.negotiate()
        await vm.ack(request_, u64(0) if request_ is R.SET_STATUS else b"")
        assert vm.session.incoming is None
        assert device.state is State.RESET


async def test_one_that_dies_in_its_set_up_leaves_the_state_for_the_next(
    autojump_clock: MockClock,
) -> None:
    """Killed in the middle of a message that brings memory."""
    device = FakeDevice()
    waiting = await left_running(device, 7)
    async with connected(device, incoming=waiting, on_disconnect=KEEP) as vm:
        await vm.set_up()
        await vm.set_ring(0, 7)
        memory = vm.memfd()
        await vm.peer.send(frame(R.SET_MEM_TABLE, TABLE)[:-8], [memory])
        vm.peer.close()
        assert "in the middle of a message" in str(await vm.lost())
    assert vm.session.incoming is waiting
    assert device.state is State.SUSPENDED
    assert device.regions == []
    async with next_one(device, waiting, 7):
        assert device.take_calls() == [("run", DEVICE_GETS, (0, 7))]


async def test_a_device_that_never_ran_is_reset(autojump_clock: MockClock) -> None:
    device = FakeDevice()
    async with connected(device, on_disconnect=KEEP) as vm:
        await vm.set_up()
    assert vm.session.incoming is None
    assert device.state is State.RESET


async def test_a_state_that_can_not_be_read_is_not_kept(autojump_clock: MockClock) -> None:
    device = FakeDevice()
    async with connected(device, on_disconnect=KEEP) as vm:
        await vm.start(0)
        device.refuse["read_config"] = BridgeError("no")
    assert vm.session.incoming is None
    assert device.state is State.RESET


async def test_what_a_front_end_brought_is_not_kept_for_another(autojump_clock: MockClock) -> None:
    device = FakeDevice()
    state = (await left_running(device, 7)).state
    async with connected(device, on_disconnect=KEEP) as vm:
        vm.session.incoming = Incoming(state, Origin.FRONT_END)
    assert vm.session.incoming is None
    assert device.state is State.RESET
