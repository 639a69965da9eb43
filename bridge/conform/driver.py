"""A minimal virtio driver: guest memory, split vrings, and requests that come and go.

Indices are single 16-bit loads and stores through memory views, descriptors are complete before
the index is, and each kick is a system call after both.
"""

from __future__ import annotations

import mmap
import os
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from vhostbridge.backends.device import DeviceInfo
from vhostbridge.backends.errors import Unsupported
from vhostbridge.backends.fds import OwnedFd, close_all, new_eventfd
from vhostbridge.backends.guest import MemoryRegion, VringSetup
from vhostbridge.backends.virtio import ring_areas

from .outcome import Breach

MEMORY_SIZE = 2 << 20
# Where guests have memory; devices with a narrower range get it where theirs begins.
_GUEST_ADDRESS = 0x4000_0000
_PAGE = 1 << 16

# Flags of a descriptor (virtio 1.4, section 2.7.5).
_NEXT, _WRITE = 1, 2


class Memory:
    """Guest memory in one memfd, handed out from the bottom up and never given back singly."""

    def __init__(self, info: DeviceInfo) -> None:
        address = max(_GUEST_ADDRESS, info.iova_first)
        if address + MEMORY_SIZE - 1 > info.iova_last:
            address = max(_PAGE, -(-info.iova_first // _PAGE) * _PAGE)
        if address + MEMORY_SIZE - 1 > info.iova_last:
            raise Unsupported(f"{info.target} can't reach {MEMORY_SIZE} bytes of memory")
        fd = OwnedFd(os.memfd_create("vhost-bridge-conform", os.MFD_CLOEXEC))
        os.ftruncate(fd.fileno(), MEMORY_SIZE)
        status = os.fstat(fd.fileno())
        identity = (status.st_dev, status.st_ino, 0)
        self.region = MemoryRegion(address, MEMORY_SIZE, fd, 0, identity)
        self.bytes = mmap.mmap(fd.fileno(), MEMORY_SIZE)
        self._whole = memoryview(self.bytes)
        self.u16 = self._whole.cast("H")
        self.u32 = self._whole.cast("I")
        self.u64 = self._whole.cast("Q")
        self._next = 0
        self._starts: list[int] = []
        self._names: list[str] = []

    def take(self, size: int, align: int, name: str) -> int:
        """Offset of ``size`` bytes that are called ``name`` in evidence."""
        at = -(-self._next // align) * align
        if at + size > MEMORY_SIZE:
            raise MemoryError(f"{size} bytes of driver memory at {at}")
        self._next = at + size
        self._starts.append(at)
        self._names.append(name)
        return at

    def clear(self) -> None:
        """Zero it all and take everything back; no device may be at it."""
        self.bytes[:] = bytes(MEMORY_SIZE)
        self._next = 0
        self._starts.clear()
        self._names.clear()

    def snapshot(self) -> bytes:
        return bytes(self.bytes)

    def difference(self, before: bytes) -> str:
        """What was written since ``before``, for people; empty if nothing was."""
        now = self.snapshot()
        if now == before:
            return ""
        changed = [i for i, (a, b) in enumerate(zip(before, now, strict=True)) if a != b]
        at = changed[0]
        place = bisect_right(self._starts, at) - 1
        name = self._names[place] if place >= 0 else "unused memory"
        return (
            f"{len(changed)} bytes were written, the first at {self.region.guest_address + at:#x} "
            f"({name}): {before[at : at + 8].hex(' ')} became {now[at : at + 8].hex(' ')}"
        )

    def close(self) -> None:
        for view in (self.u16, self.u32, self.u64, self._whole):
            view.release()
        self.bytes.close()
        self.region.fd.close()


@dataclass(frozen=True, slots=True)
class Segment:
    """One descriptor's buffer: an offset in ``Memory``."""

    offset: int
    size: int
    writable: bool = False


class Ring:
    """The driver's side of a split vring (virtio 1.4, section 2.7)."""

    def __init__(self, memory: Memory, index: int, size: int, base: int = 0) -> None:
        areas = ring_areas(size)
        name = f"vring {index}"
        take = memory.take
        self.index, self.size = index, size
        self._memory = memory
        self._descriptors = take(areas.descriptor, 16, f"descriptor area of {name}")
        self._available = take(areas.driver, 2, f"driver area of {name}")
        self._used = take(areas.device, 4, f"device area of {name}")
        memory.u16[self._available // 2 + 1] = memory.u16[self._used // 2 + 1] = base
        self.available_index = self._seen = base
        # First in, first out: a request that a device repeats names a head nobody offered.
        self._free = deque(range(size))
        self._chains: dict[int, list[int]] = {}
        self._kick, self._call = new_eventfd(), new_eventfd()

    def setup(self, base: int | None) -> VringSetup:
        """The ring as a device wants it; its eventfds are lent."""
        start = self._memory.region.guest_address
        return VringSetup(
            index=self.index,
            size=self.size,
            descriptor_area=start + self._descriptors,
            driver_area=start + self._available,
            device_area=start + self._used,
            base=base,
            kick=self._kick,
            call=self._call,
            err=None,
            enabled=True,
        )

    @property
    def used_index(self) -> int:
        """The device's index, as it is in memory."""
        return self._memory.u16[self._used // 2 + 1]

    @property
    def outstanding(self) -> int:
        """How many requests are offered and not taken back."""
        return len(self._chains)

    @property
    def room(self) -> int:
        """How many descriptors are free."""
        return len(self._free)

    def add(self, segments: Sequence[Segment]) -> int:
        """Offer a request and return its head; the device is not kicked."""
        memory, heads = self._memory, [self._free.popleft() for _ in segments]
        for place, (head, segment) in enumerate(zip(heads, segments, strict=True)):
            at = self._descriptors + 16 * head
            last = place == len(heads) - 1
            memory.u64[at // 8] = memory.region.guest_address + segment.offset
            memory.u32[at // 4 + 2] = segment.size
            memory.u16[at // 2 + 6] = (0 if last else _NEXT) | (_WRITE if segment.writable else 0)
            memory.u16[at // 2 + 7] = 0 if last else heads[place + 1]
        self._chains[heads[0]] = heads
        memory.u16[self._available // 2 + 2 + self.available_index % self.size] = heads[0]
        self.available_index = (self.available_index + 1) & 0xFFFF
        memory.u16[self._available // 2 + 1] = self.available_index
        return heads[0]

    def kick(self) -> None:
        os.eventfd_write(self._kick.fileno(), 1)

    def take_calls(self) -> int:
        """How often the device called since the last time."""
        with suppress(BlockingIOError):
            return os.eventfd_read(self._call.fileno())
        return 0

    def take_used(self) -> list[tuple[int, int]]:
        """What was completed since the last time: head and length of each.

        Raises:
            Breach: something was completed that was not offered, or twice.
        """
        done: list[tuple[int, int]] = []
        index = self.used_index
        while self._seen != index:
            at = self._used // 4 + 1 + 2 * (self._seen % self.size)
            head, length = self._memory.u32[at], self._memory.u32[at + 1]
            if head not in self._chains:
                raise Breach(
                    f"vring {self.index}: used entry {self._seen} names descriptor {head}, which "
                    f"is no request that waits (available index {self.available_index}, used "
                    f"index {index}, {len(self._chains)} waiting): a request was repeated or "
                    "made up"
                )
            self._free.extend(self._chains.pop(head))
            self._seen = (self._seen + 1) & 0xFFFF
            done.append((head, length))
        return done

    def close(self) -> None:
        close_all((self._kick, self._call))


class Driver:
    """Drives vrings without a single request, which any device bears; the base of the others."""

    #: Whether it makes requests at all.
    makes_requests = False
    #: Whether a device of the type always completes them.
    must_complete = False

    def __init__(self, memory: Memory, rings: Sequence[Ring]) -> None:
        self.memory = memory
        self.rings = rings

    def submit(self, count: int) -> int:
        """Offer up to ``count`` requests, without a kick; returns how many found room."""
        return 0

    def reap(self) -> None:
        """Take completed requests back.

        Raises:
            Breach: one was not offered, was completed twice or wrongly.
        """
        for ring in self.rings:
            ring.take_used()

    @property
    def outstanding(self) -> int:
        """How many of the submitted requests are not complete."""
        return 0

    def submit_checks(self) -> int:
        """Offer requests that show whether earlier ones did what they should; 0 when done."""
        return 0

    def settle(self) -> None:
        """All first requests came back: learn from them what later ones may rely on."""

    def close(self) -> None:
        for ring in self.rings:
            ring.close()
