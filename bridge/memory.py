"""The front-end's memory table: who owns which descriptor, and user to guest addresses."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vhostbridge.backends.errors import PeerError
from vhostbridge.backends.fds import OwnedFd, close_all
from vhostbridge.backends.foreign_fds import Kind, kind_of
from vhostbridge.backends.guest import MemoryRegion
from vhostbridge.backends.vhostuser.payloads import Region

_NOT_SHARED = "give the guest shared memory: memory-backend-memfd,share=on"


@dataclass(frozen=True, slots=True)
class GuestRegion:
    """One region: where the front-end sees it, and what the device is given."""

    user_address: int
    region: MemoryRegion


class MemoryTable:
    """An immutable set of regions; a change makes a new table.

    A table borrows its descriptors. ``close_unused`` settles which of two tables' descriptors
    live on.
    """

    def __init__(self, regions: Sequence[GuestRegion] = ()) -> None:
        self._regions = tuple(regions)

    def __len__(self) -> int:
        return len(self._regions)

    def __iter__(self) -> Iterator[GuestRegion]:
        return iter(self._regions)

    @property
    def regions(self) -> list[MemoryRegion]:
        return [r.region for r in self._regions]

    def with_region(self, new: GuestRegion) -> MemoryTable:
        """This table and one more region (ADD_MEM_REG).

        Raises:
            PeerError: it overlaps one that is there already.
        """
        for old in self._regions:
            if _overlap(
                old.region.guest_address, old.region.size, new.region.guest_address, new.region.size
            ):
                raise PeerError(
                    f"memory region {new.region.guest_address:#x}+{new.region.size:#x} overlaps "
                    f"{old.region.guest_address:#x}+{old.region.size:#x}"
                )
        return MemoryTable((*self._regions, new))

    def without(self, wire: Region) -> MemoryTable:
        """This table less one region (REM_MEM_REG); its mmap offset is not compared.

        Raises:
            PeerError: there is no such region.
        """
        left = [
            r
            for r in self._regions
            if (r.region.guest_address, r.user_address, r.region.size)
            != (wire.guest_address, wire.user_address, wire.size)
        ]
        if len(left) == len(self._regions):
            raise PeerError(
                f"no memory region {wire.guest_address:#x}+{wire.size:#x} to remove",
                "the front-end removes what it never added",
            )
        return MemoryTable(left)

    def guest_address(self, user_address: int, size: int, what: str) -> int:
        """Where ``size`` bytes at a front-end address lie in guest memory.

        Raises:
            PeerError: they are not wholly inside one region; ``what`` names them.
        """
        for r in self._regions:
            offset = user_address - r.user_address
            if offset >= 0 and offset + size <= r.region.size:
                return r.region.guest_address + offset
        raise PeerError(
            f"{what} at user address {user_address:#x}+{size:#x} is outside the guest memory of "
            f"{len(self)} regions"
        )

    def close_unused(self, successor: MemoryTable) -> None:
        """Close the descriptors of this table that ``successor`` does not hold."""
        kept = {id(r.region.fd) for r in successor._regions}
        close_all(r.region.fd for r in self._regions if id(r.region.fd) not in kept)


def _overlap(a: int, a_size: int, b: int, b_size: int) -> bool:
    return a < b + b_size and b < a + a_size


def guest_region(wire: Region, fd: OwnedFd | None) -> GuestRegion:
    """Check one region of a message and pair it with its descriptor, which stays the caller's.

    Raises:
        PeerError: no descriptor, no size, addresses that wrap, or a file that is too short.
    """
    where = f"memory region {wire.guest_address:#x}+{wire.size:#x}"
    if fd is None:
        raise PeerError(f"{where} came without a file descriptor", _NOT_SHARED)
    if wire.size == 0:
        raise PeerError(f"{where} is empty")
    limit = 2**64
    if max(wire.guest_address, wire.user_address, wire.mmap_offset) + wire.size > limit:
        raise PeerError(f"{where} wraps around the end of the address space")
    if kind_of(fd) is not Kind.MEMORY:
        raise PeerError(f"{where} is neither shared memory nor in a file of a local disk")
    status = os.fstat(fd.fileno())
    if wire.mmap_offset + wire.size > status.st_size:
        raise PeerError(
            f"{where} needs {wire.mmap_offset + wire.size} bytes of its file, which has "
            f"{status.st_size}",
            "the front-end announced more memory than it shares",
        )
    identity = (status.st_dev, status.st_ino, wire.mmap_offset)
    region = MemoryRegion(wire.guest_address, wire.size, fd, wire.mmap_offset, identity)
    return GuestRegion(wire.user_address, region)


def table_of(wires: Sequence[Region], fds: Sequence[OwnedFd]) -> MemoryTable:
    """The table of a SET_MEM_TABLE.

    Raises:
        PeerError: descriptors are missing, or a region is malformed or overlaps another.
    """
    if not wires:
        raise PeerError("the front-end shares no memory at all", _NOT_SHARED)
    if len(fds) != len(wires):
        raise PeerError(
            f"SET_MEM_TABLE has {len(wires)} regions and {len(fds)} file descriptors", _NOT_SHARED
        )
    table = MemoryTable()
    for wire, fd in zip(wires, fds, strict=True):
        table = table.with_region(guest_region(wire, fd))
    return table
