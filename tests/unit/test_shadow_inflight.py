"""What shadow vrings write into the front-end's in-flight buffer, byte by byte, and what they make
of one that was kept, or made up."""

from __future__ import annotations

import mmap
import os
import select
import struct
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace

import pytest

from tests.unit.fakes import FakeDevice, eventfd, signals
from tests.unit.states import BLOCK, vring
from vhostbridge.backends.errors import PeerError, Unsupported
from vhostbridge.backends.fds import OwnedFd, new_eventfd
from vhostbridge.backends.guest import MemoryRegion, VringSetup
from vhostbridge.backends.inflight import InflightBuffer
from vhostbridge.backends.state import DeviceState
from vhostbridge.bridge.absence import Absence
from vhostbridge.bridge.shadow import ShadowDevice
from vhostbridge.bridge.shadow_rings import GuestMap, ShadowRings
from vhostbridge.bridge.tracking import Tracking
from vhostbridge.native import lib

PAGE, SIZE = 4096, 8
ROOM = 11  # entries that fit into the region of a split ring of 8: it is padded
AVAILABLE, USED, DATA = 0x100, 0x200, 0x800
HEADER = struct.Struct("=QHHHH")  # features, version, desc_num, last_batch_head, used_idx
ENTRY = struct.Struct("=B5xHQ")  # inflight, next, counter
PACKED = 1 << 34


def small_buffer(*, packed: bool = False) -> InflightBuffer:
    size = lib.vb_inflight_size(SIZE, packed)
    fd = OwnedFd(os.memfd_create("buffer"))
    os.ftruncate(fd.fileno(), size)
    return InflightBuffer(fd, 0, size, 1, SIZE)


class Guest:
    """Memory with a vring of 8 descriptors at its beginning, and the buffer that it keeps."""

    def __init__(self, *, packed: bool = False) -> None:
        self.features = PACKED if packed else 0
        self.fd = OwnedFd(os.memfd_create("guest"))
        os.ftruncate(self.fd.fileno(), PAGE)
        self.memory = mmap.mmap(self.fd.fileno(), PAGE)
        self.buffer = small_buffer(packed=packed)
        self.noted = mmap.mmap(self.buffer.fd.fileno(), self.buffer.size)
        self.broken = new_eventfd()
        self.kick = new_eventfd()

    @property
    def region(self) -> MemoryRegion:
        status = os.fstat(self.fd.fileno())
        return MemoryRegion(0, PAGE, self.fd, 0, (status.st_dev, status.st_ino, 0))

    def vring(self, base: int) -> VringSetup:
        return VringSetup(0, SIZE, 0, AVAILABLE, USED, base, self.kick, None, None, enabled=True)

    @contextmanager
    def shadowed(self, base: int) -> Iterator[ShadowRings]:
        """Shadow vrings of a process that lives as long as the block."""
        memory, vrings = GuestMap(), [self.vring(base)]
        memory.update([self.region])
        try:
            rings = ShadowRings(self.features, vrings, memory, 1 << 32, self.broken, self.buffer)
            try:
                yield rings
            finally:
                rings.stop()
                rings.close()
        finally:
            memory.close()

    def offer(self, *heads: int) -> None:
        """Requests of one descriptor each become available."""
        (index,) = struct.unpack_from("<H", self.memory, AVAILABLE + 2)
        for head in heads:
            struct.pack_into("<QIHH", self.memory, 16 * head, DATA + 16 * head, 16, 2, 0)
            struct.pack_into("<H", self.memory, AVAILABLE + 4 + 2 * (index % SIZE), head)
            index += 1
        struct.pack_into("<H", self.memory, AVAILABLE + 2, index)

    def header(self) -> tuple[int, ...]:
        return HEADER.unpack_from(self.noted)

    def entries(self) -> list[tuple[int, int, int]]:
        return [ENTRY.unpack_from(self.noted, 16 + 16 * i) for i in range(SIZE)]

    def note(self, head: int, counter: int, inflight: int = 1, following: int = 0) -> None:
        ENTRY.pack_into(self.noted, 16 + 16 * head, inflight, following, counter)

    def close(self) -> None:
        self.noted.close()
        self.memory.close()
        self.buffer.close()
        for fd in (self.fd, self.broken, self.kick):
            fd.close()


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest()
    yield guest
    guest.close()


def state_of(guest: Guest) -> DeviceState:
    """That of its device."""
    return replace(BLOCK, features=guest.features, vrings=(vring(0, SIZE),))


def heads_of(rings: ShadowRings) -> list[int]:
    """Where the requests that the device has been shown write to, as heads of the guest."""
    (setup,) = rings.setups
    with mmap.mmap(rings.region.fd.fileno(), rings.region.size) as ring:
        driver = setup.driver_area - setup.descriptor_area
        (shown,) = struct.unpack_from("<H", ring, driver + 2)
        slots = struct.unpack_from(f"<{shown}H", ring, driver + 4)
        return [(struct.unpack_from("<Q", ring, 16 * s)[0] - DATA) // 16 for s in slots]


def run_until(rings: ShadowRings, inflight: int) -> None:
    rings.start()
    while rings.stats(0).inflight < inflight:
        pass


def test_fetched_requests_are_noted_in_their_order(guest: Guest) -> None:
    guest.offer(5, 2, 7)
    with guest.shadowed(0) as rings:
        assert guest.header() == (0, 1, ROOM, 0, 0)
        run_until(rings, 3)
        noted = {i: e[2] for i, e in enumerate(guest.entries()) if e[0]}
        assert noted == {5: 0, 2: 1, 7: 2}


def test_kept_requests_are_done_again_in_their_order(guest: Guest) -> None:
    """What came after them is fetched from where they end, whatever base is given."""
    guest.offer(5, 2, 7)
    with guest.shadowed(0) as rings:
        run_until(rings, 3)
    guest.offer(0, 1)
    with guest.shadowed(0) as rings:
        run_until(rings, 5)
        assert heads_of(rings) == [5, 2, 7, 0, 1]
        assert {i: e[2] for i, e in enumerate(guest.entries()) if e[0]} == {
            5: 0,
            2: 1,
            7: 2,
            0: 3,
            1: 4,
        }


def test_request_that_was_given_back_but_is_noted_is_not_done_again(guest: Guest) -> None:
    """The used index is one ahead of the buffer's: the last batch is complete."""
    guest.offer(5, 2, 7)
    with guest.shadowed(0) as rings:
        run_until(rings, 3)
    struct.pack_into("<H", guest.noted, 12, 2)  # last_batch_head
    struct.pack_into("<H", guest.memory, USED + 2, 1)
    with guest.shadowed(1) as rings:
        run_until(rings, 2)
        assert heads_of(rings) == [5, 7]
        assert guest.header() == (0, 1, ROOM, 2, 1)
        assert [e[0] for e in guest.entries()] == [0, 0, 0, 0, 0, 1, 0, 1]


def test_vring_that_stops_has_nothing_in_flight(guest: Guest) -> None:
    """Requests that the device did not complete count as not fetched."""
    guest.offer(5, 2, 7)
    with guest.shadowed(0) as rings:
        run_until(rings, 3)
        rings.stop()
        rings.settle()
        guest.buffer.check_empty(state_of(guest))
        assert rings.vrings[0].base == 0
        assert [e[0] for e in guest.entries()] == [0] * SIZE


def test_vring_that_stops_may_leave_requests_in_the_buffer(guest: Guest) -> None:
    guest.offer(5, 2, 7)
    with guest.shadowed(0) as rings:
        run_until(rings, 3)
        rings.stop()
        rings.settle(leave=True)
        assert rings.vrings[0].base == 3
    with pytest.raises(Unsupported, match="3 requests are in flight"):
        guest.buffer.check_empty(state_of(guest))
    with guest.shadowed(3) as rings:
        run_until(rings, 3)
        assert heads_of(rings) == [5, 2, 7]


def test_ring_that_begins_anew_has_nothing_in_flight(guest: Guest) -> None:
    """A guest that started its driver again: the buffer is of the ring before, and says nothing."""
    HEADER.pack_into(guest.noted, 0, 0, 1, SIZE, 3, 5000)
    guest.offer(4)
    with guest.shadowed(0) as rings:
        run_until(rings, 1)
        assert heads_of(rings) == [4]


# Version, last batch, used index.
LIES = {
    "version": (2, 0, 0),
    "batch beyond the ring": (1, 8, 0xFFFF),
    "batch larger than the ring": (1, 0, 0xFFF0),
}


@pytest.mark.parametrize("lie", LIES)
def test_buffer_that_lies_is_refused(guest: Guest, lie: str) -> None:
    version, batch, used = LIES[lie]
    HEADER.pack_into(guest.noted, 0, 0, version, SIZE, batch, used)
    guest.note(1, 1)
    with (
        pytest.raises(PeerError, match="vring 0 can't start: the in-flight buffer"),
        guest.shadowed(0),
    ):
        pass


def test_made_up_requests_stop_the_vring(guest: Guest) -> None:
    """All heads are said to be in flight, whose descriptors lie outside guest memory."""
    HEADER.pack_into(guest.noted, 0, 0, 1, SIZE, 0, 0)
    for head in range(SIZE):
        struct.pack_into("<QIHH", guest.memory, 16 * head, 1 << 40, 16, 2, 0)
        guest.note(head, 2**64 - 1)
    with guest.shadowed(0) as rings:
        rings.start()
        assert select.select([guest.broken.fileno()], [], [], 10)[0]
        rings.stop()
        ((_, reason),) = rings.broken_vrings()
        assert reason == "a descriptor points outside guest memory"
        assert heads_of(rings) == []


PACKED_LIES = {
    "used index": (16, "<H", 8),
    "old used index": (18, "<H", 8),
    "chain leads outside": (32 + 2, "<H", 8),
    "no entries": (32 + 6, "<H", 0),
    "chain is a loop": (32 + 2, "<H", 0),
}


@pytest.mark.parametrize("lie", PACKED_LIES)
def test_packed_buffer_that_lies_is_refused(lie: str) -> None:
    """One request of two descriptors, from entry 0 on; the free list is empty."""
    guest = Guest(packed=True)
    try:
        struct.pack_into("<QHHHHHHBB", guest.noted, 0, 0, 1, SIZE, 8, 8, 0, 0, 1, 1)
        for entry in range(SIZE):
            struct.pack_into("<BxHHHQ", guest.noted, 32 + 32 * entry, 0, entry + 1, 0, 0, 0)
        struct.pack_into("<BxHHHQ", guest.noted, 32, 1, 1, 1, 2, 0)
        with guest.shadowed(0x80008000) as rings:
            rings.settle(leave=True)
            assert rings.vrings[0].base == 0x80008002
        with pytest.raises(Unsupported, match="1 requests are in flight"):
            guest.buffer.check_empty(state_of(guest))
        offset, form, value = PACKED_LIES[lie]
        struct.pack_into("<HH", guest.noted, 12, 8, 8)
        struct.pack_into("<BxHHHQ", guest.noted, 32, 1, 1, 1, 2, 0)
        struct.pack_into(form, guest.noted, offset, value)
        with pytest.raises(PeerError, match="not this vring's"), guest.shadowed(0x80008000):
            pass
    finally:
        guest.close()


def test_free_list_that_is_a_loop_is_refused() -> None:
    guest = Guest(packed=True)
    try:
        struct.pack_into("<QHHHHHHBB", guest.noted, 0, 0, 1, SIZE, 0, 0, 0, 0, 1, 1)
        with pytest.raises(PeerError, match="not this vring's"), guest.shadowed(0x80008000):
            pass
    finally:
        guest.close()


def test_buffer_that_goes_away_stops_the_vring_only() -> None:
    """A front-end that makes a file of its own shorter: a bus error, and the process lives."""
    guest = Guest()
    fd = guest.buffer.fd
    try:
        with guest.shadowed(0) as rings:
            rings.start()
            os.ftruncate(fd.fileno(), 0)
            guest.offer(1)
            os.eventfd_write(guest.kick.fileno(), 1)
            assert select.select([guest.broken.fileno()], [], [], 10)[0]
            rings.stop()
            ((_, reason),) = rings.broken_vrings()
            assert reason == "memory that the front-end shares is gone"
    finally:
        guest.close()


BUSY = Unsupported("requests did not finish")


async def handed_over(guest: Guest) -> ShadowRings:
    """Those of a device that failed and is closed, with a request in flight."""
    inner = FakeDevice()
    device = ShadowDevice(inner, Tracking.AUTO, always=True)
    device.use_inflight(guest.buffer)
    await device.set_memory([guest.region])
    await device.run(0, [guest.vring(0)])
    inner.fail("its process died")
    rings = device.hand_over()
    assert rings is not None
    await device.aclose()
    return rings


async def given_back(guest: Guest) -> ShadowRings:
    """Of a device that took them over and did not run."""
    inner = FakeDevice()
    device = ShadowDevice(inner, Tracking.AUTO, always=True)
    device.take_over(await handed_over(guest))
    await device.set_memory([guest.region])
    inner.refuse["run"] = BUSY
    with pytest.raises(Unsupported):
        await device.run(0, [guest.vring(0)])
    rings = device.give_back()
    assert rings is not None
    await device.aclose()
    return rings


async def recalled(guest: Guest) -> Absence:
    """Of a back-end that kept the buffer itself."""
    with guest.shadowed(0) as rings:
        run_until(rings, 1)
    absence = Absence()
    absence.recall(0, [guest.vring(0)], [guest.region], guest.buffer)
    return absence


@pytest.mark.parametrize("left", [handed_over, given_back, recalled])
async def test_buffer_that_goes_away_after_the_device_is_told_to_nobody(
    guest: Guest, left: Callable[[Guest], Awaitable[ShadowRings | Absence]]
) -> None:
    """The number of the eventfd that was for it may be another connection's by then."""
    guest.offer(5)
    requests = await left(guest)
    assert guest.entries()[5][0] == 1
    with ExitStack() as files, closing(requests):
        others = [files.enter_context(eventfd()) for _ in range(32)]  # in place of what was closed
        os.ftruncate(guest.buffer.fd.fileno(), 0)
        requests.settle()
        assert [signals(fd) for fd in others] == [0] * 32
