"""What guest memory itself says of a vring: of a split one the indices that both sides publish.

It is read from the regions' files: a front-end that made one shorter meanwhile would turn a load
from a mapping into a bus error. Packed rings publish no indices, only what was used.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from .errors import PeerError
from .guest import MemoryRegion, VringSetup


def read_u16(regions: Iterable[MemoryRegion], guest_address: int) -> int:
    """A little-endian 16-bit word of guest memory.

    Raises:
        PeerError: the address is not in guest memory, or its file does not have it.
    """
    for region in regions:
        if region.guest_address <= guest_address and guest_address + 2 <= region.end:
            offset = region.offset + guest_address - region.guest_address
            try:
                word = os.pread(region.fd.fileno(), 2, offset)
            except OSError:
                word = b""
            if len(word) == 2:
                return int.from_bytes(word, "little")
            raise PeerError(f"guest memory at {guest_address:#x} can't be read from its file")
    raise PeerError(f"guest address {guest_address:#x} is not in guest memory")


def available_index(regions: Iterable[MemoryRegion], vring: VringSetup) -> int:
    """Where the driver will put its next request (virtio 1.4, section 2.7.6)."""
    return read_u16(regions, vring.driver_area + 2)


def used_index(regions: Iterable[MemoryRegion], vring: VringSetup) -> int:
    """Where the device will put its next completion (virtio 1.4, section 2.7.8)."""
    return read_u16(regions, vring.device_area + 2)


def was_used(regions: Iterable[MemoryRegion], vring: VringSetup) -> bool:
    """Whether anything was used in a packed vring since its base (virtio 1.4, section 2.8.1)."""
    base = vring.base or 0
    flags = read_u16(regions, vring.descriptor_area + 16 * (base >> 16 & 0x7FFF) + 14)
    return flags >> 15 == base >> 31
