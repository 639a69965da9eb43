"""An ioctl that fails at every step of every operation: as it was, or FAILED with a reason."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import cast
from unittest.mock import Mock

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.unit.fakes import CAPABILITIES, device_info, eventfd, memfd, signals
from vhostbridge.backends.errors import BridgeError, KernelRefused
from vhostbridge.backends.fds import OwnedFd
from vhostbridge.backends.guest import MemoryRegion, VringSetup
from vhostbridge.backends.lifecycle import How, State, Status
from vhostbridge.backends.vdpa.chardev import BackendFeature, Chardev
from vhostbridge.backends.vdpa.device import VdpaDevice
from vhostbridge.backends.vdpa.opening import _capabilities

FEATURES = 1 << 32
SIZE = 0x20_0000
USED = {0: 5, 1: 9}
ALL = (
    BackendFeature.SUSPEND
    | BackendFeature.RESUME
    | BackendFeature.IOTLB_BATCH
    | BackendFeature.IOTLB_PERSIST
    | BackendFeature.ENABLE_AFTER_DRIVER_OK
)


class Kernel:
    """What a vhost-vdpa device does, as far as a driver sees; one call of it may fail.

    Every method that the device calls counts as a step.
    """

    def __init__(self, features: BackendFeature) -> None:
        self._features = features
        self._status = 0
        self.suspended = False
        self.bases: dict[int, int] = {}
        self.kicks: dict[int, bool] = {}
        self.enabled: dict[int, bool] = {}
        self.entries: dict[int, int] = {}
        self.left = -1
        # Where nothing can be mapped.
        self.hole = -1

    def arm(self, step: int) -> None:
        self.left = step

    def _step(self, name: str) -> None:
        self.left -= 1
        if self.left == -1:
            raise KernelRefused(f"fake: {name}", 5)

    @property
    def runs(self) -> bool:
        return bool(self._status & Status.DRIVER_OK) and not self.suspended

    def backend_features(self) -> BackendFeature:
        return self._features

    def set_backend_features(self, features: BackendFeature) -> None:
        pass

    def status(self) -> int:
        self._step("GET_STATUS")
        return self._status

    def set_status(self, status: int) -> None:
        self._step("SET_STATUS")
        self._status = status
        if status == 0:
            self.suspended = False
            self.bases, self.kicks, self.enabled = {}, {}, {}
            if BackendFeature.IOTLB_PERSIST not in self._features:
                self.entries.clear()

    def set_vring_base(self, index: int, base: int) -> None:
        self._step("SET_VRING_BASE")
        assert not self.runs
        self.bases[index] = base

    def vring_base(self, index: int) -> int:
        self._step("GET_VRING_BASE")
        return self.bases[index]

    def set_vring_kick(self, index: int, fd: OwnedFd | None) -> None:
        self._step("SET_VRING_KICK")
        self.kicks[index] = fd is not None and fd.fileno() >= 0

    def set_vring_enable(self, index: int, enabled: bool) -> None:
        self._step("SET_VRING_ENABLE")
        self.enabled[index] = enabled

    def suspend(self) -> None:
        self._step("SUSPEND")
        assert self._status & Status.DRIVER_OK
        self.suspended = True

    def resume(self) -> None:
        self._step("RESUME")
        self.suspended = False

    def iotlb_map(self, iova: int, size: int, address: int) -> None:
        self._step("IOTLB UPDATE")
        if iova == self.hole:
            raise KernelRefused("fake: IOTLB UPDATE", errno.EFAULT)
        assert iova not in self.entries
        self.entries[iova] = size

    def iotlb_unmap(self, iova: int, size: int) -> None:
        self._step("IOTLB INVALIDATE")
        self.entries.pop(iova, None)

    def close(self) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *args: self._step(name)


class Bench:
    def __init__(self, features: BackendFeature, kernel: type[Kernel] = Kernel) -> None:
        self.kernel = kernel(features)
        capabilities = _capabilities(features) if features is not ALL else CAPABILITIES
        self.device = VdpaDevice(cast(Chardev, self.kernel), device_info(), capabilities)
        self.owned: list[OwnedFd] = []
        self.regions = [self.region(0)]
        self.rings = [self.ring(index) for index in USED]

    def own(self, fd: OwnedFd) -> OwnedFd:
        self.owned.append(fd)
        return fd

    def region(self, at: int) -> MemoryRegion:
        return MemoryRegion(at, SIZE, self.own(memfd(SIZE)), 0, (0, at, 0))

    def ring(self, index: int, size: int = 256) -> VringSetup:
        at = 0x10000 * (index + 1)
        for area in (0x1002, 0x2002):
            os.pwrite(self.regions[0].fd.fileno(), struct.pack("<H", USED[index]), at + area)
        kick, call = self.own(eventfd()), self.own(eventfd())
        areas = (at, at + 0x1000, at + 0x2000)
        return VringSetup(index, size, *areas, USED[index], kick, call, None, True)

    def check(self) -> None:
        """The device and the kernel agree, or it is FAILED and says why."""
        device, kernel = self.device, self.kernel
        if device.state is State.FAILED:
            assert device.failure
            return
        assert set(kernel.entries) == {region.guest_address for region in self.regions}
        assert kernel.runs == (device.state is State.RUNNING)
        if device.state is State.RUNNING:
            assert kernel.bases == USED
            assert kernel.kicks == {0: True, 1: True}
        if device.state is State.SUSPENDED:
            assert {index: v.base for index, v in device.vrings.items()} == USED


KINDS = {
    "all": ALL,
    "no RESUME": ALL & ~BackendFeature.RESUME,
    "no SUSPEND": ALL & ~BackendFeature.SUSPEND & ~BackendFeature.RESUME,
    "no PERSIST": ALL & ~BackendFeature.IOTLB_PERSIST,
}


@asynccontextmanager
async def bench(kind: str) -> AsyncIterator[Bench]:
    made = Bench(KINDS[kind])
    try:
        await made.device.set_memory(made.regions)
        await made.device.run(FEATURES, made.rings)
        yield made
    finally:
        await made.device.aclose()
        for fd in made.owned:
            fd.close()


async def suspend(b: Bench) -> None:
    await b.device.suspend()


async def resume(b: Bench) -> None:
    await b.device.resume()


async def run_anew(b: Bench) -> None:
    await b.device.run(FEATURES, [b.ring(0, 128), b.ring(1, 64)])


async def add_memory(b: Bench) -> None:
    await b.device.set_memory([*b.regions, b.region(SIZE)])


async def remove_memory(b: Bench) -> None:
    await b.device.set_memory(b.regions[:1])


async def prepare(b: Bench, name: str) -> None:
    if name == "resume":
        await b.device.suspend()
    elif name == "remove memory":
        b.regions.append(b.region(SIZE))
        await b.device.set_memory(b.regions)


OPERATIONS: dict[str, tuple[Callable[[Bench], Awaitable[None]], int]] = {
    # More steps than any of them makes.
    "suspend": (suspend, 14),
    "resume": (resume, 26),
    "run anew": (run_anew, 34),
    "add memory": (add_memory, 4),
    # Where the device pauses for it, the kernel may refuse to let it go on.
    "remove memory": (remove_memory, 14),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OPERATIONS)
async def test_one_ioctl_fails(kind: str, name: str) -> None:
    operation, steps = OPERATIONS[name]
    for step in range(steps):
        async with bench(kind) as b:
            await prepare(b, name)
            before = b.device.state
            for ring in b.rings:
                signals(ring.kick)  # type: ignore[arg-type]
            b.kernel.arm(step)
            again = False
            try:
                await operation(b)
            except BridgeError:
                assert b.device.state in (before, State.FAILED), step
                again = b.device.state is before
                if b.device.state is State.RUNNING and name == "suspend":
                    assert all(signals(ring.kick) for ring in b.rings)  # type: ignore[arg-type]
            else:
                if "memory" in name:
                    b.regions = list(b.device._memory.regions)
            b.kernel.arm(-1)
            b.check()
            if again:
                await operation(b)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OPERATIONS)
async def test_a_cancelled_task_ends_what_it_began(kind: str, name: str) -> None:
    async with bench(kind) as b:
        await prepare(b, name)
        with trio.CancelScope() as scope:
            original = b.kernel._step

            def cancel(what: str) -> None:
                trio.from_thread.run_sync(scope.cancel)
                original(what)

            b.kernel._step = cancel  # type: ignore
            await OPERATIONS[name][0](b)
            await trio.lowlevel.checkpoint()
        assert scope.cancelled_caught
        b.kernel._step = original  # type: ignore
        if "memory" in name:
            b.regions = list(b.device._memory.regions)
        assert b.device.state is not State.FAILED
        b.check()


@pytest.mark.parametrize("kind", KINDS)
async def test_a_device_that_lost_memory_does_not_run_on(kind: str) -> None:
    """A change failed and could not be undone. All that can be put back is, also later."""
    async with bench(kind) as b, trio.open_nursery() as waiting:
        before = [*b.regions, b.region(SIZE), b.region(2 * SIZE)]
        await b.device.set_memory(before)
        waiting.start_soon(b.device.failed.wait)
        others = [replace(b.region(at), identity=(1, at, 0)) for at in (SIZE, 2 * SIZE)]
        b.kernel.hole = SIZE
        with pytest.raises(BridgeError, match=r"not be changed \(fake: .*\), nor put back \(fake:"):
            await b.device.set_memory([*b.regions, *others])
        assert b.device.state is State.FAILED and b.device.failure
        assert set(b.kernel.entries) == {0, 2 * SIZE}
        assert not b.kernel.runs or b.device.capabilities.resume.how is not How.NATIVE
        b.kernel.hole = -1
        await b.device.reset()
        await b.device.set_memory(before)
        assert set(b.kernel.entries) == {0, SIZE, 2 * SIZE}


async def test_a_device_that_does_not_go_on_with_less_memory_has_failed() -> None:
    """Neither by RESUME nor started anew: the memory before is not in force any more."""
    async with bench("all") as b, trio.open_nursery() as waiting:
        await prepare(b, "remove memory")
        waiting.start_soon(b.device.failed.wait)
        refuse = Mock(side_effect=KernelRefused("fake: not now", errno.EBUSY))
        b.kernel.resume = b.kernel.set_vring_num = refuse  # type: ignore
        with pytest.raises(KernelRefused, match="not now"):
            await remove_memory(b)
        assert b.device.state is State.FAILED
        assert "; going on failed too: " in b.device.failure


async def test_a_device_that_stopped_nobody_knows_where_is_known_to_have_failed() -> None:
    """Without RESUME it can't go on: whoever waits for its failure opens it again."""
    async with bench("no RESUME") as b, trio.open_nursery() as waiting:
        waiting.start_soon(b.device.failed.wait)
        await wait_all_tasks_blocked()
        b.kernel.arm(1)
        with pytest.raises(KernelRefused, match="GET_VRING_BASE"):
            await b.device.suspend()
        assert b.device.state is State.FAILED
        assert "GET_VRING_BASE" in b.device.failure


async def test_a_kick_that_is_refused_is_not_given_to_the_device_later() -> None:
    """Its front-end's session has closed it by then."""
    async with bench("no RESUME") as b:
        with eventfd() as other:
            b.kernel.arm(0)
            with pytest.raises(KernelRefused):
                await b.device.set_kick(0, other)
        await b.device.suspend()
        await b.device.resume()
        assert b.kernel.kicks == {0: True, 1: True}
        assert all(signals(ring.kick) for ring in b.rings)  # type: ignore[arg-type]


async def test_a_vring_that_was_stopped_stays_so_when_memory_goes() -> None:
    """The device pauses for that, and the front-end has closed the stopped vring's eventfds."""
    async with bench("all") as b:
        await b.device.set_memory([*b.regions, b.region(SIZE)])
        await b.device.stop_vring(1)
        going, stopped = b.rings
        for fd in (stopped.kick, stopped.call):
            assert fd is not None
            fd.close()
        await b.device.run(FEATURES, [replace(going, base=None)])
        await b.device.set_memory(b.regions)
        assert b.kernel.enabled == {0: True}
        assert set(b.kernel.entries) == {0}
        await b.device.suspend()
        assert {index: v.base for index, v in b.device.vrings.items()} == {0: USED[0]}
