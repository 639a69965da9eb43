"""A device whose requests begin and cease to pass through shadow vrings, also when that fails."""

from __future__ import annotations

import errno
import mmap
import os
import select
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest
import trio

from tests.unit import scripted
from tests.unit.fakes import FakeDevice, eventfd, memfd
from vhostbridge.backends.dirty_log import DirtyLog
from vhostbridge.backends.errors import KernelRefused, Unsupported
from vhostbridge.backends.fds import OwnedFd, signal_eventfds
from vhostbridge.backends.guest import MemoryRegion, VringSetup
from vhostbridge.backends.lifecycle import Ability, How, State
from vhostbridge.backends.vhostuser.messages import Request
from vhostbridge.bridge import passage, shadow_rings
from vhostbridge.bridge.shadow import ShadowDevice
from vhostbridge.bridge.shadow_rings import ShadowRings
from vhostbridge.bridge.tracking import Tracking
from vhostbridge.native import lib

MEMORY = 0x10000
BUSY = Unsupported("requests did not finish")


class Guest:
    """Its memory, the log that its front-end shares, and a vring's eventfds."""

    def __init__(self) -> None:
        self.fd, self.log = memfd(MEMORY), DirtyLog(memfd(4096), 0, 4096)
        self.kick, self.call = eventfd(), eventfd()

    @property
    def region(self) -> MemoryRegion:
        status = os.fstat(self.fd.fileno())
        return MemoryRegion(0, MEMORY, self.fd, 0, (status.st_dev, status.st_ino, 0))

    def vring(self, base: int | None) -> VringSetup:
        return VringSetup(0, 8, 0, 0x1000, 0x2000, base, self.kick, self.call, None, enabled=True)

    def write(self, at: int, data: bytes) -> None:
        os.pwrite(self.fd.fileno(), data, at)

    def close(self) -> None:
        self.log.close()
        fds: list[OwnedFd] = [self.fd, self.kick, self.call]
        for fd in fds:
            fd.close()


@asynccontextmanager
async def running(
    guest: Guest, inner: FakeDevice, tracking: Tracking = Tracking.SHADOW
) -> AsyncIterator[ShadowDevice]:
    device = ShadowDevice(inner, tracking)
    await device.set_memory([guest.region])
    await device.run(0, [guest.vring(0)])
    yield device
    if inner.state is not State.FAILED:
        await device.set_memory([])
    await device.aclose()


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest()
    yield guest
    guest.close()


async def test_log_that_was_refused_is_kept_when_it_is_wanted_again(guest: Guest) -> None:
    """Else a migration that is tried again would miss all that the device writes."""
    inner = FakeDevice()
    async with running(guest, inner) as device:
        inner.refuse["suspend"] = BUSY
        with pytest.raises(Unsupported):
            await device.log_writes(guest.log, {})
        assert not device.shadowed and not device.shadow
        await device.log_writes(guest.log, {})
        assert device.shadowed and device.logged_by == "shadow vrings"


async def test_log_ends_although_the_device_is_too_busy_to_go_straight(guest: Guest) -> None:
    """QEMU does not survive a log that does not end."""
    inner = FakeDevice()
    async with running(guest, inner) as device:
        await device.log_writes(guest.log, {})
        inner.refuse["suspend"] = BUSY
        await device.log_writes(None, {})
        assert device.shadowed and device.state is State.RUNNING
        await device.log_writes(guest.log, {})
        assert device.shadowed and device.logged_by == "shadow vrings"
        await device.log_writes(None, {})
        assert not device.shadowed


async def test_requests_in_flight_elsewhere_come_first_although_nobody_logs(guest: Guest) -> None:
    """A device fails in a migration, which is cancelled before the next device is there."""
    lost, inner = FakeDevice(), FakeDevice()
    async with running(guest, lost) as before:
        await before.log_writes(guest.log, {})
        lost.fail("its process died")
        rings = before.hand_over()
        assert rings is not None
        async with running(guest, inner) as after:
            await after.suspend()
            inner.take_calls()
            after.take_over(rings)
            await after.run(0, [guest.vring(None)])
            through, _straight = [call for call in inner.take_calls() if call[0] == "run"]
            assert through[2] == (0, 0) and not after.shadowed


async def test_vring_that_is_polled_does_not_pass_through_shadow_vrings(guest: Guest) -> None:
    """They would never look at it."""
    inner = FakeDevice()
    async with running(guest, inner) as device:
        await device.run(0, [replace(guest.vring(0), kick=None)])
        with pytest.raises(Unsupported, match="shadow vrings do not poll"):
            await device.log_writes(guest.log, {})
        assert device.state is State.RUNNING and inner.regions == [guest.region]
        await device.run(0, [guest.vring(0)])
        await device.log_writes(guest.log, {})
        with pytest.raises(Unsupported, match="shadow vrings do not poll"):
            await device.set_kick(0, None)
        assert device.shadowed


async def test_all_memory_is_logged_where_a_vring_is_polled(guest: Guest) -> None:
    inner = FakeDevice()
    inner.capabilities = replace(inner.capabilities, dirty_log=Ability(How.NO, "a fake"))
    async with running(guest, inner, Tracking.AUTO) as device:
        await device.run(0, [replace(guest.vring(0), kick=None)])
        await device.log_writes(guest.log, {})
        assert device.logged_by == "all guest memory"
        await device.suspend()
    assert os.pread(guest.log.fd.fileno(), 3, 0) == b"\xff\xff\0"


@pytest.mark.parametrize("before", ["no driver", "another driver"])
async def test_driver_that_comes_during_a_migration_starts_though_shadow_vrings_can_not(
    guest: Guest, before: str
) -> None:
    """A guest that boots while it migrates: all its memory counts as written from then on."""
    inner = FakeDevice()
    inner.capabilities = replace(inner.capabilities, dirty_log=Ability(How.NO, "a fake"))
    async with running(guest, inner, Tracking.AUTO) as device:
        if before == "no driver":
            await device.reset()
        await device.log_writes(guest.log, {})
        if before == "another driver":
            assert device.shadowed
            await device.suspend()
        await device.run(0, [replace(guest.vring(5), kick=None)])
        assert (device.state, inner.bases) == (State.RUNNING, {0: 5})
        assert inner.regions == [guest.region]
        assert device.logged_by == "all guest memory"
        assert os.pread(guest.log.fd.fileno(), 3, 0) == b"\0\0\0"
        await device.suspend()
    assert os.pread(guest.log.fd.fileno(), 3, 0) == b"\xff\xff\0"


# Where a request writes to, and what a log has then: that page, and the used ring's.
DATA, PAGES = 0x5000, (1 << 5 | 1 << 2).to_bytes(2, "little")


async def until(done: Callable[[], bool]) -> None:
    with trio.fail_after(5):
        while not done():  # noqa: ASYNC110
            await trio.sleep(0.001)


async def complete(guest: Guest, inner: FakeDevice) -> None:
    """A request that writes, from the guest's vring to the device's and back."""
    guest.write(0, struct.pack("<QIHH", DATA, 512, 2, 0))
    guest.write(0x1000, struct.pack("<HHH", 0, 1, 0))
    setup, region = inner.rings[0], inner.regions[-1]
    with mmap.mmap(region.fd.fileno(), region.size) as memory:
        driver, device = (
            at - region.guest_address for at in (setup.driver_area, setup.device_area)
        )
        await signal_eventfds(guest.kick)
        await until(lambda: memory[driver + 2 : driver + 4] == b"\1\0")
        memory[device + 2 : device + 12] = struct.pack("<HII", 1, 0, 512)
        await signal_eventfds(setup.call)
    await until(lambda: os.pread(guest.fd.fileno(), 2, 0x2002) == b"\1\0")


@asynccontextmanager
async def shadowed(guest: Guest, inner: FakeDevice, how: Tracking) -> AsyncIterator[ShadowDevice]:
    device = ShadowDevice(inner, how, always=True)
    try:
        await device.set_memory([guest.region])
        yield device
    finally:
        await device.aclose()


async def test_what_shadow_vrings_write_is_logged_though_the_device_logs(guest: Guest) -> None:
    """It can't know where in the guest's used ring that is."""
    inner = FakeDevice()
    async with shadowed(guest, inner, Tracking.AUTO) as device:
        await device.run(0, [guest.vring(0)])
        await device.log_writes(guest.log, {0: 0x2000})
        assert inner.logging[0] == 4096
        await complete(guest, inner)
        assert os.pread(guest.log.fd.fileno(), 2, 0) == PAGES


@pytest.mark.parametrize("how", [Tracking.AUTO, Tracking.SHADOW, Tracking.ALL])
async def test_shadow_vrings_let_go_of_a_log(guest: Guest, how: Tracking) -> None:
    """It is unmapped then: also one that they have had since they were made."""
    inner = FakeDevice()
    async with shadowed(guest, inner, how) as device:
        await device.log_writes(guest.log, {0: 0x2000})
        await device.run(0, [guest.vring(0)])
        await device.log_writes(None, {})
        os.pwrite(guest.log.fd.fileno(), bytes(2), 0)
        await complete(guest, inner)
        assert os.pread(guest.log.fd.fileno(), 2, 0) == bytes(2)


async def test_broken_vring_is_told_though_its_front_end_changes_the_eventfd(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number may be another file's by the time that it is written to."""
    err, kept = eventfd(), []

    async def changed_meanwhile(*fds: OwnedFd | None) -> None:
        kept.append(err.dup())
        err.close()
        await signal_eventfds(*fds)

    async with shadowed(guest, FakeDevice(), Tracking.AUTO) as device, trio.open_nursery() as tasks:
        await device.run(0, [replace(guest.vring(0), err=err)])
        monkeypatch.setattr(passage, "signal_eventfds", changed_meanwhile)
        tasks.start_soon(device.watch)
        guest.write(0x1000, struct.pack("<HHH", 0, 9, 0))
        await signal_eventfds(guest.kick)
        await until(lambda: bool(kept) and select.select(kept, [], [], 0)[0] == kept)
        tasks.cancel_scope.cancel()
    kept[0].close()


async def test_vring_that_stopped_before_stays_so_when_a_suspend_fails(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A back-end remembers where it stopped; its eventfds are closed."""
    async with scripted.connected() as (inner, backend):
        device = ShadowDevice(inner, Tracking.AUTO, always=True)
        await device.set_memory([guest.region])
        second = replace(guest.vring(0), index=1, driver_area=0x4000, device_area=0x5000)
        await device.run(0, [guest.vring(0), second])
        await device.stop_vring(1)
        await device.run(0, [guest.vring(None)])
        backend.take()
        monkeypatch.setattr(ShadowRings, "settle", Mock(side_effect=[BUSY, None]))
        with pytest.raises(Unsupported, match="did not finish"):
            await device.suspend()
        kicked = [f.payload[0] for f in backend.take() if f.request == Request.SET_VRING_KICK]
        assert device.state is State.RUNNING and kicked == [0]
        await device.suspend()
        await device.aclose()


async def test_shadow_vring_that_stopped_is_forgotten_when_the_others_go_straight(
    guest: Guest,
) -> None:
    """In a state it would be a vring that no guest has."""
    async with scripted.connected() as (inner, _backend):
        device = ShadowDevice(inner, Tracking.SHADOW)
        await device.set_memory([guest.region])
        second = replace(guest.vring(0), index=1, driver_area=0x4000, device_area=0x5000)
        await device.log_writes(guest.log, {})
        await device.run(0, [guest.vring(0), second])
        await device.stop_vring(1)
        await device.run(0, [guest.vring(None)])
        await device.log_writes(None, {})
        assert not device.shadowed
        await device.suspend()
        (left,) = (await device.capture()).vrings
        assert (left.index, left.driver_area) == (0, 0x1000)
        await device.aclose()


@pytest.mark.parametrize("wanted", [True, False])
async def test_shadow_vrings_let_go_of_a_log_that_the_device_has_trouble_with(
    guest: Guest, wanted: bool
) -> None:
    """It can't begin, or the device is gone when it ends: it is unmapped in any case."""
    inner = FakeDevice()
    async with shadowed(guest, inner, Tracking.AUTO) as device:
        await device.run(0, [guest.vring(0)])
        if not wanted:
            await device.log_writes(guest.log, {0: 0x2000})
        inner.refuse["log_writes"] = BUSY
        with pytest.raises(Unsupported):
            await device.log_writes(guest.log if wanted else None, {0: 0x2000} if wanted else {})
        os.pwrite(guest.log.fd.fileno(), bytes(2), 0)
        await complete(guest, inner)
        assert os.pread(guest.log.fd.fileno(), 2, 0) == bytes(2)


async def test_device_that_can_not_go_on_after_a_suspend_that_failed_has_failed(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in flight is for the next one. Else the next run would give it up."""
    async with scripted.connected() as (inner, backend):
        device = ShadowDevice(inner, Tracking.AUTO, always=True)
        await device.set_memory([guest.region])
        await device.run(0, [guest.vring(0)])
        monkeypatch.setattr(ShadowRings, "settle", Mock(side_effect=BUSY))
        backend.answers[Request.SET_VRING_NUM] = scripted.refuse
        with pytest.raises(Unsupported, match="did not finish"):
            await device.suspend()
        assert device.state is State.FAILED
        assert device.failure.startswith("requests did not finish; going on failed too: ")
        rings = device.hand_over()
        assert rings is not None
        rings.close()
        await device.aclose()


class FewThreads:
    """The kernel makes one only; when it refuses the second, the device has used the first's."""

    def __init__(self, done: Callable[[], None]) -> None:
        self._made: set[object] = set()
        self._done = done

    def __getattr__(self, name: str) -> Any:
        def make(handle: object) -> int:
            self._made.add(handle)
            if len(self._made) < 2:
                return int(getattr(lib, name)(handle))
            self._done()
            return -errno.EAGAIN

        return make if name in ("vb_shadow_prepare", "vb_shadow_start") else getattr(lib, name)


async def test_requests_are_not_done_twice_when_there_are_no_more_threads(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = FakeDevice()

    def use() -> None:
        if len(inner.regions) == 2:
            region, vring = inner.regions[1], inner.rings[0]
            with mmap.mmap(region.fd.fileno(), region.size) as memory:
                at = vring.device_area - region.guest_address
                memory[at + 2 : at + 12] = struct.pack("<HII", 1, 0, 512)

    async with running(guest, inner) as device:
        second = replace(guest.vring(0), index=1, driver_area=0x4000, device_area=0x5000)
        await device.run(0, [guest.vring(0), second])
        guest.write(0, struct.pack("<QIHH", 0x8000, 512, 2, 0))
        guest.write(0x1000, struct.pack("<HHH", 0, 1, 0))
        monkeypatch.setattr(shadow_rings, "lib", FewThreads(use))
        with pytest.raises(KernelRefused, match="starting the thread"):
            await device.log_writes(guest.log, {})
        assert device.state is State.RUNNING and inner.regions == [guest.region]
        (used,) = struct.unpack("<H", os.pread(guest.fd.fileno(), 2, 0x2002))
        assert inner.rings[0].base == used
