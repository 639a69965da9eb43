"""Kernel drivers that do less, or more, than the ioctls say: each as its source has it (6.12)."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.fakes import device_info, signals
from tests.unit.test_vdpa_faults import ALL, FEATURES, USED, Bench, Kernel
from vhostbridge.backends.errors import BridgeError, KernelRefused, Unsupported
from vhostbridge.backends.fds import OwnedFd
from vhostbridge.backends.guest import VringSetup
from vhostbridge.backends.lifecycle import State, Status
from vhostbridge.backends.vdpa.chardev import BackendFeature
from vhostbridge.backends.vdpa.opening import _capabilities

RESUMES = BackendFeature.SUSPEND | BackendFeature.RESUME


class Mlx5(Kernel):
    """Looks at vring 0 only when it suspends or resumes; RESUME minds nothing of the others."""

    offers = ALL

    def __init__(self, features: BackendFeature) -> None:
        super().__init__(features)
        self.now: dict[int, str] = {}

    @property
    def going(self) -> set[int]:
        return {index for index, now in self.now.items() if now == "ready"}

    def set_status(self, status: int) -> None:
        before = self._status
        super().set_status(status)
        if status == 0:
            self.now = {}
        elif status & ~before & Status.DRIVER_OK:
            self.now = {i: "ready" if self.enabled.get(i) else "new" for i in USED}

    def set_vring_enable(self, index: int, enabled: bool) -> None:
        super().set_vring_enable(index, enabled)
        now = self.now.get(index)
        if not enabled and now == "ready":
            self.now[index] = "suspended"
        elif enabled and (now == "new" or self._resumable):
            self.now.update({index: "ready"} if now else {})

    @property
    def _resumable(self) -> bool:
        return BackendFeature.RESUME in self._features

    def suspend(self) -> None:
        super().suspend()
        if self.now[0] == "ready":
            if "new" in self.now.values():
                raise KernelRefused("fake: SUSPEND", errno.EINVAL)
            self.now = dict.fromkeys(self.now, "suspended")

    def resume(self) -> None:
        super().resume()
        if self.now[0] != "ready":
            self.now = dict.fromkeys(self.now, "ready")


class OldMlx5(Mlx5):
    """With firmware that does not resume."""

    offers = ALL & ~BackendFeature.RESUME


class SolidRun(Kernel):
    """The whole device stands still or runs: SET_VRING_ENABLE is for DRIVER_OK to look at."""

    offers = RESUMES | BackendFeature.IOTLB_PERSIST

    def __init__(self, features: BackendFeature) -> None:
        super().__init__(features)
        self.started: set[int] = set()

    @property
    def going(self) -> set[int]:
        return self.started if self.runs else set()

    def set_status(self, status: int) -> None:
        before = self._status
        super().set_status(status)
        if status & ~before & Status.DRIVER_OK:
            self.started = {index for index, enabled in self.enabled.items() if enabled}


class VpVdpa(Kernel):
    """A virtio device of QEMU's, which breaks when a vring is disabled; no positions at all."""

    offers = BackendFeature.IOTLB_PERSIST

    def set_vring_enable(self, index: int, enabled: bool) -> None:
        super().set_vring_enable(index, enabled)
        assert enabled, "wrong value for queue_enable 0"

    def set_vring_base(self, index: int, base: int) -> None:
        super().set_vring_base(index, base)
        if base:
            raise KernelRefused("fake: SET_VRING_BASE", errno.EOPNOTSUPP)

    def vring_base(self, index: int) -> int:
        raise KernelRefused("fake: GET_VRING_BASE", errno.EOPNOTSUPP)

    @property
    def going(self) -> set[int]:
        return {i for i, on in self.enabled.items() if on and self.kicks[i]} if self.runs else set()


Parent = type[Mlx5] | type[SolidRun] | type[VpVdpa]


class ParentBench(Bench):
    kernel: Mlx5 | SolidRun | VpVdpa

    def __init__(self, parent: Parent) -> None:
        super().__init__(parent.offers, parent)
        self.device.info = device_info(device_id=2)
        self.device.capabilities = _capabilities(parent.offers)

    def indices(self, used: int, available: int) -> None:
        """What guest memory says of both vrings."""
        fd = self.regions[0].fd.fileno()
        for ring in self.rings:
            os.pwrite(fd, struct.pack("<H", used), ring.device_area + 2)
            os.pwrite(fd, struct.pack("<H", available), ring.driver_area + 2)

    @property
    def goes(self) -> set[int]:
        """The vrings that the device works on."""
        return {index for index in self.kernel.going if self.kernel.kicks[index]}

    def again(self, indices: Iterable[int]) -> list[VringSetup]:
        return [replace(self.rings[index], base=None) for index in indices]


@asynccontextmanager
async def bench(parent: Parent) -> AsyncIterator[ParentBench]:
    made = ParentBench(parent)
    try:
        await made.device.set_memory(made.regions)
        yield made
    finally:
        await made.device.aclose()
        for fd in made.owned:
            fd.close()


@pytest.mark.parametrize("parent", [Mlx5, OldMlx5])
@pytest.mark.parametrize("disabled", USED)
@pytest.mark.parametrize("late", [False, True], ids=["from the start", "while running"])
async def test_suspended_though_a_vring_is_disabled(
    parent: Parent, disabled: int, late: bool
) -> None:
    """A pause of cloud-hypervisor's is vring 0, 1, ... disabled, and SUSPEND before the last."""
    async with bench(parent) as b:
        rings = [replace(v, enabled=late or v.index != disabled) for v in b.rings]
        await b.device.run(FEATURES, rings)
        await b.device.set_enabled(disabled, False)
        assert b.kernel.going == {1 - disabled}
        await b.device.suspend()
        assert b.device.state is State.SUSPENDED
        assert b.kernel.going == set()
        await b.device.resume()
        assert b.kernel.going == {1 - disabled}


@pytest.mark.parametrize("parent", [Mlx5, OldMlx5, SolidRun])
@pytest.mark.parametrize("stopped", USED)
async def test_a_vring_that_was_stopped_does_not_go_on_with_the_others(
    parent: Parent, stopped: int
) -> None:
    async with bench(parent) as b:
        await b.device.run(FEATURES, b.rings)
        assert b.kernel.going == {0, 1}
        assert await b.device.stop_vring(stopped) == USED[stopped]
        await b.device.run(FEATURES, b.again([1 - stopped]))
        assert b.kernel.going == {1 - stopped}
        await b.device.run(FEATURES, [replace(b.rings[stopped]), *b.again([1 - stopped])])
        assert b.kernel.going == {0, 1}
        assert b.kernel.bases == USED


@pytest.mark.parametrize("parent", [Mlx5, SolidRun])
async def test_all_vrings_resume_without_being_set_up_again(parent: Parent) -> None:
    async with bench(parent) as b:
        await b.device.run(FEATURES, b.rings)
        await b.device.suspend()
        assert b.kernel.going == set()
        b.kernel.bases.clear()
        await b.device.resume()
        assert b.kernel.going == {0, 1}
        assert b.kernel.bases == {}


@pytest.mark.parametrize("parent", [Mlx5, OldMlx5])
async def test_a_disabled_vring_goes_on_when_it_is_enabled(parent: Parent) -> None:
    async with bench(parent) as b:
        await b.device.run(FEATURES, b.rings)
        await b.device.set_enabled(1, False)
        assert b.kernel.going == {0}
        await b.device.set_enabled(1, True)
        assert b.kernel.going == {0, 1}
        assert b.kernel.bases == USED


async def _disable(b: ParentBench) -> None:
    await b.device.run(FEATURES, b.rings)
    await b.device.set_enabled(1, False)


async def _start_disabled(b: ParentBench) -> None:
    await b.device.run(FEATURES, [b.rings[0], replace(b.rings[1], enabled=False)])


async def _start_enabled(b: ParentBench) -> None:
    await b.device.run(FEATURES, b.rings)


@pytest.mark.parametrize("parent", [Mlx5, OldMlx5, SolidRun])
@pytest.mark.parametrize("begin", [_disable, _start_disabled, _start_enabled])
async def test_a_vring_that_could_not_be_switched_is_switched_when_it_is_tried_again(
    parent: Parent, begin: Callable[[ParentBench], Awaitable[None]]
) -> None:
    """Whichever ioctl was refused: the device and what is known of it are as before."""
    enabled = begin is not _start_enabled
    refused = 0
    for step in range(36):
        async with bench(parent) as b:
            await begin(b)
            before = b.goes
            b.kernel.arm(step)
            try:
                await b.device.set_enabled(1, enabled)
            except BridgeError:
                refused += 1
                if b.device.state is State.FAILED:
                    continue
                assert b.goes == before and b.device.vrings[1].enabled is not enabled
                await b.device.set_enabled(1, enabled)
            assert b.goes == ({0, 1} if enabled else {0})
            assert b.device.vrings[1].enabled is enabled
            b.kernel.arm(-1)
            await b.device.suspend()
            assert {index: v.base for index, v in b.device.vrings.items()} == USED
    assert 0 < refused < 36


def _signalled(fd: OwnedFd | None) -> int:
    assert fd is not None
    return signals(fd)


async def test_vrings_of_a_virtio_device_are_disabled_by_not_being_kicked() -> None:
    async with bench(VpVdpa) as b:
        b.indices(0, 0)
        await b.device.run(FEATURES, [replace(v, base=0) for v in b.rings])
        await b.device.set_enabled(0, False)
        assert b.kernel.going == {1}
        await b.device.set_kick(0, b.rings[0].kick)
        assert b.kernel.going == {1}
        _signalled(b.rings[0].kick)
        await b.device.set_enabled(0, True)
        assert b.kernel.going == {0, 1}
        assert _signalled(b.rings[0].kick) == 1


async def test_a_vring_of_a_virtio_device_that_starts_disabled() -> None:
    async with bench(VpVdpa) as b:
        b.indices(0, 0)
        first, second = (replace(v, base=0) for v in b.rings)
        await b.device.run(FEATURES, [first, replace(second, enabled=False)])
        assert b.kernel.going == {0}
        await b.device.set_enabled(1, True)
        assert b.kernel.going == {0, 1}


async def test_a_device_that_tells_no_positions_stops_when_all_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vhostbridge.backends.vdpa.draining.DRAIN_SECONDS", 0.1)
    async with bench(VpVdpa) as b:
        b.indices(0, 0)
        await b.device.run(FEATURES, [replace(v, base=0) for v in b.rings])
        b.indices(6, 7)
        with pytest.raises(Unsupported, match="vring 0 did not finish its requests"):
            await b.device.suspend()
        assert b.kernel.going == {0, 1}
        b.indices(7, 7)
        await b.device.suspend()
        assert {v.base for v in b.device.vrings.values()} == {7}
        with pytest.raises(Unsupported, match="does not set a vring's position \\(0x7 of vring 0"):
            await b.device.resume()
        assert b.device.state is State.SUSPENDED
        b.indices(0, 0)
        await b.device.run(FEATURES, [replace(v, base=0) for v in b.rings])
        assert b.kernel.going == {0, 1}


async def test_too_many_pieces_of_memory_are_explained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Hardware takes an entry for each piece that is in one place; the kernel tells EFAULT."""
    limit = tmp_path / "max_iotlb_entries"
    limit.write_text("2048\n")
    monkeypatch.setattr("vhostbridge.backends.vdpa.memory._ENTRIES", limit)
    async with bench(SolidRun) as b:
        b.kernel.arm(0)
        with pytest.raises(KernelRefused, match="this kernel maps 2048 pieces of memory at most"):
            await b.device.set_memory([*b.regions, b.region(1 << 30)])
