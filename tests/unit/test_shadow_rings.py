"""Shadow vrings as Python has them: memory that goes away, and the dirty log."""

from __future__ import annotations

import mmap
import os
import select
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import trio

from tests.unit.fakes import FakeDevice
from vhostbridge.backends.dirty_log import DirtyLog
from vhostbridge.backends.errors import PeerError, Unsupported
from vhostbridge.backends.fds import OwnedFd, new_eventfd
from vhostbridge.backends.guest import MemoryRegion, VringSetup
from vhostbridge.backends.virtio import TransportFeature
from vhostbridge.bridge.shadow import with_shadow
from vhostbridge.bridge.shadow_rings import GuestMap, ShadowRings
from vhostbridge.bridge.tracking import Tracking
from vhostbridge.native import ffi, lib

PAGE = 4096


def guest_memory(pages: int) -> MemoryRegion:
    fd = OwnedFd(os.memfd_create("guest"))
    os.ftruncate(fd.fileno(), pages * PAGE)
    status = os.fstat(fd.fileno())
    return MemoryRegion(0, pages * PAGE, fd, 0, (status.st_dev, status.st_ino, 0))


def vring(base: int, kick: OwnedFd | None = None) -> VringSetup:
    return VringSetup(0, 8, 0, 0x100, 0x200, base, kick, None, None, enabled=True)


def test_guest_memory_that_goes_away_stops_the_vring_only() -> None:
    """A front-end that makes its memory's file shorter: a bus error, and the process lives."""
    broken, kick = new_eventfd(), new_eventfd()
    region, memory = guest_memory(4), GuestMap()
    memory.update([region])
    rings = ShadowRings(0, [vring(0, kick)], memory, 1 << 32, broken)
    rings.start()
    assert rings.broken_vrings() == []
    os.ftruncate(region.fd.fileno(), 0)
    os.eventfd_write(kick.fileno(), 1)
    assert select.select([broken.fileno()], [], [], 10)[0]
    rings.stop()
    ((_, reason),) = rings.broken_vrings()
    assert reason == "memory that the front-end shares is gone"
    rings.close()
    memory.close()
    for fd in (broken, kick, region.fd):
        fd.close()


class Watched:
    """The native code, which notes the vrings, by their number, that start or are held."""

    def __init__(self) -> None:
        self.made: list[Any] = []
        self.started: list[int] = []
        self.held: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(lib, name)

    def vb_shadow_new(self, *arguments: Any) -> Any:
        self.made.append(lib.vb_shadow_new(*arguments))
        return self.made[-1]

    def vb_shadow_start(self, handle: Any) -> int:
        self.started.append(self.made.index(handle))
        return int(lib.vb_shadow_start(handle))

    def vb_shadow_hold(self, handle: Any) -> None:
        self.held.append(self.made.index(handle))
        lib.vb_shadow_hold(handle)


@contextmanager
def four_rings() -> Iterator[ShadowRings]:
    """As of a network card with two queue pairs; each has a buffer available, in its own page."""
    broken, region, memory = new_eventfd(), guest_memory(4), GuestMap()
    memory.update([region])
    with mmap.mmap(region.fd.fileno(), region.size) as guest:
        for page in range(0, region.size, PAGE):
            struct.pack_into("<QIHH", guest, page, page + 0x800, 16, 0, 0)
            struct.pack_into("<HHH", guest, page + 0x100, 0, 1, 0)
    areas = [(at, at + 0x100, at + 0x200) for at in range(0, region.size, PAGE)]
    vrings = [VringSetup(i, 8, *a, 0, None, None, None, enabled=True) for i, a in enumerate(areas)]
    rings = ShadowRings(0, vrings, memory, 1 << 32, broken)
    try:
        yield rings
    finally:
        rings.stop()
        rings.close()
        memory.close()
        broken.close()
        region.fd.close()


def shown(rings: ShadowRings) -> list[int]:
    """How many buffers each of the device's vrings has had."""
    with mmap.mmap(rings.region.fd.fileno(), rings.region.size) as memory:
        offsets = [setup.driver_area - rings.region.guest_address for setup in rings.setups]
        return [struct.unpack_from("<H", memory, offset + 2)[0] for offset in offsets]


def test_device_has_what_was_available_when_the_vrings_have_started() -> None:
    """Whenever the threads get a processor."""
    with four_rings() as rings:
        assert shown(rings) == [0, 0, 0, 0]
        rings.start()
        assert shown(rings) == [1, 1, 1, 1]


def test_no_frame_is_sent_before_there_are_buffers_for_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Vrings that receive start first, all of them, and are held last."""
    watched = Watched()
    monkeypatch.setattr("vhostbridge.bridge.shadow_rings.lib", watched)
    with four_rings() as rings:
        rings.start()
        rings.hold()
    assert watched.started == [0, 2, 1, 3]
    assert watched.held == [3, 1, 2, 0]


SPLIT, PACKED = 0, TransportFeature.RING_PACKED.mask
EVENT_IDX = TransportFeature.EVENT_IDX.mask


@pytest.mark.parametrize(
    ("features", "base", "offset", "asks"),
    [
        pytest.param(SPLIT, 3, 0, 0, id="split"),
        pytest.param(SPLIT | EVENT_IDX, 3, 4 + 8 * 8, 3, id="split with indices"),
        pytest.param(PACKED, 0x80038003, 2, 0, id="packed"),
        pytest.param(PACKED | EVENT_IDX, 0x80038003, 0, 0x8003, id="packed with indices"),
    ],
)
def test_driver_is_asked_for_kicks_when_the_vring_goes_straight_again(
    features: int, base: int, offset: int, asks: int
) -> None:
    """The device need not say so itself: vdpa_sim does not."""
    broken, region, memory = new_eventfd(), guest_memory(1), GuestMap()
    memory.update([region])
    with mmap.mmap(region.fd.fileno(), region.size) as guest, new_eventfd() as kick:
        struct.pack_into("<H", guest, 0x102, 3)
        rings = ShadowRings(features, [vring(base, kick)], memory, 1 << 32, broken)
        rings.start()
        rings.hold()
        struct.pack_into("<H", guest, 0x200 + offset, 1)  # what it says while it works
        rings.stop()
        assert struct.unpack_from("<H", guest, 0x200 + offset) == (asks,)
    rings.close()
    memory.close()
    broken.close()
    region.fd.close()


async def test_vrings_that_break_as_they_start_are_reported() -> None:
    region, errors = guest_memory(4), [new_eventfd() for _ in range(4)]
    with mmap.mmap(region.fd.fileno(), region.size) as guest, new_eventfd() as kick:
        for page in range(0, region.size, PAGE):
            struct.pack_into("<H", guest, page + 0x102, 9)  # more than there is room for
        vrings = [
            VringSetup(i, 8, at, at + 0x100, at + 0x200, 0, kick, None, errors[i], enabled=True)
            for i, at in enumerate(range(0, region.size, PAGE))
        ]
        async with with_shadow(FakeDevice(), Tracking.AUTO, always=True) as device:
            await device.set_memory([region])
            await device.run(0, vrings)
            with trio.fail_after(10):
                for error in errors:
                    await trio.lowlevel.wait_readable(error.fileno())
    for fd in (region.fd, *errors):
        fd.close()


def test_vring_outside_guest_memory_is_refused() -> None:
    broken, region, memory = new_eventfd(), guest_memory(1), GuestMap()
    memory.update([region])
    outside = VringSetup(0, 256, 0, 0x1000, 0x2000, 0, None, None, None, enabled=True)
    with pytest.raises(Unsupported, match="vring 0 can't be shadowed"):
        ShadowRings(0, [outside], memory, 1 << 32, broken)
    memory.close()
    broken.close()
    region.fd.close()


@pytest.mark.parametrize("base", [8, 0x7FFF, 0x80000, 0x7FFF0000, 0xFFFFFFFF])
def test_base_outside_a_packed_vring_is_refused(base: int) -> None:
    """From a front-end or from a device: C would read and write there."""
    broken, region, memory = new_eventfd(), guest_memory(4), GuestMap()
    memory.update([region])
    with pytest.raises(Unsupported, match=f"or its base {base:#x} is not in it"):
        ShadowRings(TransportFeature.RING_PACKED.mask, [vring(base)], memory, 1 << 32, broken)
    memory.close()
    broken.close()
    region.fd.close()


def test_back_end_can_not_take_the_shadow_vrings_memory_away() -> None:
    """It has the same file, and a bus error of ours outside the threads would end all bridges."""
    broken, region, memory = new_eventfd(), guest_memory(4), GuestMap()
    memory.update([region])
    rings = ShadowRings(0, [vring(0)], memory, 1 << 32, broken)
    with pytest.raises(PermissionError):
        os.ftruncate(rings.region.fd.fileno(), 0)
    rings.close()
    memory.close()
    broken.close()
    region.fd.close()


@pytest.mark.parametrize(
    ("address", "size", "marked"),
    [
        (0, 1, {0}),
        (PAGE - 1, 2, {0, 1}),
        (7 * PAGE, 2 * PAGE, {7, 8}),
        (5 * PAGE, 0, set()),
        (63 * PAGE, 5 * PAGE, {63}),
        (1 << 40, PAGE, set()),
    ],
)
def test_pages_are_marked_in_the_log(address: int, size: int, marked: set[int]) -> None:
    """One bit a page, the lowest first; what lies behind the log's end is left out."""
    bits = ffi.new("uint8_t[8]")
    lib.vb_log_mark(bits, 8, address, size)
    word = int.from_bytes(bytes(bits), "little")
    assert {page for page in range(64) if word >> page & 1} == marked


def log_file(size: int) -> OwnedFd:
    fd = OwnedFd(os.memfd_create("log"))
    os.ftruncate(fd.fileno(), size)
    return fd


def test_everything_is_marked_in_the_log() -> None:
    region = guest_memory(16)
    with log_file(PAGE) as fd, DirtyLog(fd.dup(), 8, 64) as log:
        log.mark_all([region])
        assert log.covers([region])
        with mmap.mmap(fd.fileno(), PAGE) as found:
            assert found[:16] == bytes(8) + b"\xff\xff" + bytes(6)
    region.fd.close()


def test_log_that_is_larger_than_its_file_is_refused() -> None:
    with log_file(PAGE) as fd, pytest.raises(PeerError, match="4097 bytes from 0 on in a file of"):
        DirtyLog(fd, 0, 4097)


def test_log_that_is_too_small_for_the_memory_is_seen() -> None:
    region = guest_memory(9)
    with log_file(PAGE) as fd, DirtyLog(fd.dup(), 0, 1) as log:
        assert not log.covers([region])
    region.fd.close()
