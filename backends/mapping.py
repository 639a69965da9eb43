"""Guest memory as it is mapped into this process."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

from vhostbridge.native import lib

from .errors import KernelRefused, PeerError
from .guest import MemoryRegion

PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Mapping:
    """A region as we mapped it: ``address`` is the user address of its first byte.

    ``size`` is the region's, rounded up to whole pages (libblkio's ring region is not page-sized).
    """

    key: tuple[int, int, int, int, int]
    iova: int
    size: int
    address: int
    map_address: int
    map_length: int


def map_region(region: MemoryRegion) -> Mapping:
    """Map a region shared and read-write into this process.

    Raises:
        PeerError: its file is too short for it: touching the rest would be a bus error.
        KernelRefused: mmap failed.
    """
    status = os.fstat(region.fd.fileno())
    if region.offset + region.size > status.st_size:
        raise PeerError(
            f"guest memory at {region.guest_address:#x} needs {region.offset + region.size} bytes "
            f"of its file, which has {status.st_size}"
        )
    # A hugetlbfs file is mapped in its own page size, which is its st_blksize.
    page = max(PAGE, status.st_blksize) if status.st_blksize % PAGE == 0 else PAGE
    start = region.offset // page * page
    length = -(-(region.offset + region.size - start) // page) * page
    address = lib.vb_map_shared(length, region.fd.fileno(), start)
    if address < 0:
        raise KernelRefused(f"mapping guest memory at {region.guest_address:#x}", -address)
    size = -(-region.size // PAGE) * PAGE
    first = address + region.offset - start
    return Mapping(region.key, region.guest_address, size, first, address, length)


def unmap(mappings: Iterable[Mapping]) -> None:
    """Give the mappings up; nobody may use their addresses any more."""
    for mapping in mappings:
        lib.vb_unmap(mapping.map_address, mapping.map_length)
