"""A disk that really serves its vrings, and can be made to break one contract."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

from vhostbridge.backends.device import MemoryRegion, VringSetup
from vhostbridge.backends.lifecycle import State, Verb, step

from .fakes import FakeDevice, device_info

SECTOR = 512
DISK = 2 << 20
#: FLUSH and MQ, VERSION_1.
FEATURES = 1 << 9 | 1 << 12 | 1 << 32


class Disk(FakeDevice):
    """Serves what is available whenever its test or its front-end's kick is looked at.

    ``faults`` names what it does wrong. Nothing runs by itself: ``turn`` is called again and again
    by a task, as a back-end's event loop would.
    """

    def __init__(self, faults: Sequence[str] = (), store: bytearray | None = None) -> None:
        super().__init__(device_info(features=FEATURES, config_size=60, queue_num=2))
        self.faults = set(faults)
        self.store = bytearray(DISK) if store is None else store
        self.config = struct.pack("<Q", DISK // SECTOR).ljust(60, b"\0")
        self.writes = 0
        self.on_write: Callable[[], None] = lambda: None
        self.positions: dict[int, int] = {}
        self.used: dict[int, int] = {}
        self.kicked: set[int] = set()

    # Memory, through the regions' descriptors

    def _place_of(self, address: int) -> tuple[MemoryRegion, int]:
        (region,) = [r for r in self.regions if r.guest_address <= address < r.end]
        return region, region.offset + address - region.guest_address

    def _read(self, address: int, size: int) -> bytes:
        region, at = self._place_of(address)
        return os.pread(region.fd.fileno(), size, at)

    def _write(self, address: int, data: bytes) -> None:
        region, at = self._place_of(address)
        os.pwrite(region.fd.fileno(), data, at)

    def _u16(self, address: int) -> int:
        return int.from_bytes(self._read(address, 2), "little")
