"""A device whose requests begin and cease to pass through shadow vrings, also when that fails."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from tests.unit.fakes import FakeDevice, eventfd, memfd
from vhostbridge.backends.guest import MemoryRegion, VringSetup
from vhostbridge.backends.dirty_log import DirtyLog
from vhostbridge.backends.errors import Unsupported
from vhostbridge.backends.fds import OwnedFd
from vhostbridge.backends.lifecycle import Ability, How, State
from vhostbridge.bridge.shadow import ShadowDevice
from vhostbridge.bridge.tracking import Tracking

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
