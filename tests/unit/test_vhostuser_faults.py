"""A fault at every step of every operation: the device is as it was, or FAILED with a reason."""

from __future__ import annotations

import os
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.unit.fakes import LOG_ALL, RING_PACKED, Frame, eventfd, frame, memfd, signals, u64
from tests.unit.scripted import OFFER, Answer, Backend, connected
from tests.unit.states import save
from tests.unit.test_client import connected as client_alone
from vhostbridge.backends.dirty_log import DirtyLog
from vhostbridge.backends.errors import BridgeError, TransportLost, Unsupported
from vhostbridge.backends.fds import OwnedFd
from vhostbridge.backends.guest import MemoryRegion, VringSetup
from vhostbridge.backends.lifecycle import How, State
from vhostbridge.backends.vhostuser.device import VhostUserDevice
from vhostbridge.backends.vhostuser.messages import ProtocolFeature, Request

FEATURES = 1 << 32
SIZE = 0x20_0000
USED = {0: 5, 1: 9}


class Model(Backend):
    """A scripted back-end that knows which of its vrings run, and from where."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self.start: dict[int, int] = {}
        self.running: dict[int, int] = {}
        self.slots = 0
        self.left = -1
        self.fault: Answer | None = None
        self.asked: Request | None = None

    def arm(self, step: int, fault: Answer) -> None:
        """Let ``fault`` answer the request after so many good ones."""
        self.left, self.fault = step, fault

    def _honest(self, got: Frame) -> bytes | None:
        self.left -= 1
        request = Request(got.request)
        if self.left == -1 and self.fault is not None:
            self.asked = request
            return self.fault(got)
        if request in (Request.SET_VRING_BASE, Request.GET_VRING_BASE):
            index, number = struct.unpack("=II", got.payload)
            if request is Request.SET_VRING_BASE:
                self.start[index] = number
            else:
                self.running.pop(index, None)
        elif request is Request.SET_VRING_KICK and not got.u64 & 0x100:
            index = got.u64 & 0xFF
            self.running[index] = self.start[index]
        elif request in (Request.ADD_MEM_REG, Request.REM_MEM_REG):
            self.slots += 1 if request is Request.ADD_MEM_REG else -1
        return super()._honest(got)


class Bench:
    """A device with memory and two vrings, and the back-end's model of both."""

    def __init__(self, device: VhostUserDevice, backend: Model) -> None:
        self.device = device
        self.backend = backend
        self.owned: list[OwnedFd] = []
        self.regions = [self.region(0)]
        self.rings = [self.ring(index) for index in USED]

    def own(self, fd: OwnedFd) -> OwnedFd:
        self.owned.append(fd)
        return fd

    def region(self, at: int) -> MemoryRegion:
        fd = self.own(memfd(SIZE))
        return MemoryRegion(at, SIZE, fd, 0, (0, at, 0))

    def ring(self, index: int, size: int = 256) -> VringSetup:
        at = 0x10000 * (index + 1)
        os.pwrite(self.regions[0].fd.fileno(), struct.pack("<H", USED[index]), at + 0x2002)
        kick, call = self.own(eventfd()), self.own(eventfd())
        areas = (at, at + 0x1000, at + 0x2000)
        return VringSetup(index, size, *areas, USED[index], kick, call, None, True)

    def check(self) -> None:
        """The device and its back-end agree, or it is FAILED and says why."""
        device, running = self.device, self.backend.running
        if device.state is State.FAILED:
            assert device.failure
        elif device.state is State.RUNNING:
            assert running == USED
            assert set(device.vrings) == set(USED)
        else:
            assert device.state in (State.SUSPENDED, State.RESET)
            assert running == {}


@asynccontextmanager
async def bench(
    monkeypatch: pytest.MonkeyPatch, offer: ProtocolFeature = OFFER
) -> AsyncIterator[Bench]:
    monkeypatch.setattr("tests.unit.scripted.Backend", Model)
    async with connected(offer) as (device, backend):
        assert isinstance(backend, Model)
        backend.bases.update(USED)
        made = Bench(device, backend)
        await device.set_memory(made.regions)
        await device.run(FEATURES, made.rings)
        for ring in made.rings:
            signals(ring.kick)  # type: ignore[arg-type]
        try:
            yield made
        finally:
            for fd in made.owned:
                fd.close()


async def suspend(b: Bench) -> None:
    await b.device.suspend()


async def resume(b: Bench) -> None:
    await b.device.resume()


async def stop_one(b: Bench) -> None:
    await b.device.stop_vring(1)


async def run_anew(b: Bench) -> None:
    await b.device.run(FEATURES, [b.ring(0, 128), b.ring(1, 64)])


async def add_memory(b: Bench) -> None:
    await b.device.set_memory([*b.regions, b.region(SIZE)])


OPERATIONS: dict[str, tuple[Callable[[Bench], Awaitable[None]], int]] = {
    # How many requests each makes, at most.
    "suspend": (suspend, 2),
    "resume": (resume, 16),
    "run anew": (run_anew, 18),
    "add memory": (add_memory, 1),
}
STEPS = [(name, step) for name, (_, count) in OPERATIONS.items() for step in range(count)]


def refuse(got: Frame) -> bytes:
    # In a reply of its own, a vring that there isn't.
    return frame(got.request, u64(1 if got.flags & 8 else 50), 5)


def lie(got: Frame) -> bytes:
    return frame(got.request, struct.pack("=II", 77, 0), 5)


async def prepare(b: Bench, name: str) -> None:
    if name == "resume":
        await b.device.suspend()


@pytest.mark.parametrize(("name", "step"), STEPS)
@pytest.mark.parametrize("fault", [refuse, lie])
async def test_a_wrong_answer(
    monkeypatch: pytest.MonkeyPatch, name: str, step: int, fault: Answer
) -> None:
    async with bench(monkeypatch) as b:
        await prepare(b, name)
        before = b.device.state
        b.backend.arm(step, fault)
        try:
            await OPERATIONS[name][0](b)
        except BridgeError:
            assert b.device.state in (before, State.FAILED)
        else:
            assert b.backend.asked is Request.GET_STATUS  # any status is a right answer
        b.check()
        if b.device.state is before:
            await OPERATIONS[name][0](b)


@pytest.mark.parametrize(("name", "step"), STEPS)
async def test_a_lost_connection(monkeypatch: pytest.MonkeyPatch, name: str, step: int) -> None:
    async with bench(monkeypatch) as b:
        await prepare(b, name)

        def hang_up(got: Frame) -> None:
            b.backend.peer.close()

        b.backend.arm(step, hang_up)
        with pytest.raises(BridgeError):
            await OPERATIONS[name][0](b)
        await b.device.failed.wait()
        b.check()


@pytest.mark.parametrize(("name", "step"), STEPS)
async def test_a_cancelled_task(monkeypatch: pytest.MonkeyPatch, name: str, step: int) -> None:
    """What was begun is ended: half an operation is a stopped device."""
    async with bench(monkeypatch) as b:
        await prepare(b, name)
        honest = b.backend._honest
        with trio.CancelScope() as scope:

            def cancel(got: Frame) -> bytes | None:
                scope.cancel()
                return honest(got)

            b.backend.arm(step, cancel)
            await OPERATIONS[name][0](b)
            await trio.lowlevel.checkpoint()
        assert scope.cancelled_caught
        assert b.device.state is not State.FAILED
        b.check()


async def test_requests_that_finish_late_are_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The back-end answers GET_VRING_BASE first, as qemu-storage-daemon does."""
    async with bench(monkeypatch) as b:
        b.backend.bases[0] = USED[0] + 3
        fd = b.regions[0].fd.fileno()
        async with trio.open_nursery() as nursery:

            async def finish() -> None:
                await trio.sleep(0.2)
                os.pwrite(fd, struct.pack("<H", USED[0] + 3), 0x12002)

            nursery.start_soon(finish)
            before = trio.current_time()
            await b.device.suspend()
            assert trio.current_time() >= before + 0.2
        assert b.device.vrings[0].base == USED[0] + 3


async def test_requests_that_never_finish_leave_the_device_running(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vhostbridge.backends.vhostuser.draining.DRAIN_SECONDS", 0.2)
    async with bench(monkeypatch) as b:
        b.backend.bases[1] = USED[1] + 3
        with pytest.raises(Unsupported, match="vring 1 has 3 requests that did"):
            await b.device.suspend()
        assert b.device.state is State.RUNNING
        assert b.backend.running == {0: USED[0], 1: USED[1] + 3}
        assert signals(b.rings[1].kick) >= 1  # type: ignore[arg-type]


async def test_back_end_that_logs_takes_both_features_for_it() -> None:
    """DPDK's may offer LOG_SHMFD without LOG_ALL, and marks nothing then."""
    async with connected(OFFER | ProtocolFeature.LOG_SHMFD) as (device, _backend):
        assert device.capabilities.dirty_log.how is How.EMULATED


@pytest.mark.parametrize("step", [0, 1])
async def test_a_log_that_was_refused_is_begun_when_it_is_asked_for_again(
    monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Else a migration that is tried again would miss what the back-end writes."""
    async with bench(monkeypatch, OFFER | ProtocolFeature.LOG_SHMFD) as b:
        with DirtyLog(memfd(4096), 0, 4096) as log:
            b.backend.answers[Request.SET_LOG_BASE] = lambda got: frame(got.request, u64(0), 5)
            b.backend.arm(step, refuse)
            with pytest.raises(BridgeError):
                await b.device.log_writes(log, {0: 0x5000})
            assert b.backend.asked in (Request.SET_FEATURES, Request.SET_VRING_ADDR)
            b.backend.take()
            await b.device.log_writes(log, {0: 0x5000})
            asked = {Request(got.request): got for got in b.backend.take()}
            assert asked[Request.SET_FEATURES].u64 & LOG_ALL
            assert struct.unpack_from("=II", asked[Request.SET_VRING_ADDR].payload) == (0, 1)
            await b.device.log_writes(None, {})


async def test_vrings_of_the_driver_before_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state with a split vring and the position of a packed one would be none."""
    async with bench(monkeypatch) as b:
        await b.device.suspend()
        first, second = b.rings
        packed = [replace(first, base=0x80008000), replace(second, base=0x80058005)]
        b.backend.bases.update({0: 0x80008000, 1: 0x80058005})
        await b.device.run(FEATURES | RING_PACKED, packed)
        await b.device.suspend()
        b.backend.bases[0] = 0
        await b.device.run(FEATURES, [replace(first, base=0)])
        os.pwrite(b.regions[0].fd.fileno(), bytes(2), first.device_area + 2)
        await b.device.suspend()
        state = await b.device.capture()
        assert [(v.index, v.base) for v in state.vrings] == [(0, 0)]
        assert save(state)


async def test_a_vring_is_not_stopped_when_the_back_end_leaves_under_the_message(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It may be seen by who reads before it is by who writes."""
    async with client_alone() as (client, peer, _):

        async def send_late(*arguments: object) -> None:
            peer.close()
            await wait_all_tasks_blocked()
            raise TransportLost("a write failed")

        monkeypatch.setattr(client._channel, "send_run", send_late)
        with eventfd() as call, pytest.raises(TransportLost, match="a write failed"):
            await client.stop_busy_vring(0, True, call)
        with pytest.raises(TransportLost, match="closed the connection"):
            await client.stop_vring(0)
