"""/dev/vhost-vdpa-N with bare ioctls: the oracle that owes nothing to the product."""

from __future__ import annotations

import fcntl
import os
import struct
from types import TracebackType
from typing import Self

from .memory import Memory
from .vring import DriverRing

SET_OWNER = 0xAF01
SET_FEATURES = 0x4008AF00
SET_VRING_NUM, SET_VRING_ADDR, SET_VRING_BASE = 0x4008AF10, 0x4028AF11, 0x4008AF12
GET_VRING_BASE = 0xC008AF12
SET_VRING_KICK, SET_VRING_CALL = 0x4008AF20, 0x4008AF21
SET_BACKEND_FEATURES = 0x4008AF25
GET_STATUS, SET_STATUS = 0x8001AF71, 0x4001AF72
SET_VRING_ENABLE = 0x4008AF75
SUSPEND, RESUME = 0xAF7D, 0xAF7E

VERSION_1_ACCESS_PLATFORM = 3 << 32
UPDATE, INVALIDATE = 2, 3
PERSIST = 0x100


class RawDevice:
    """A vhost-vdpa device, opened: owner set, memory mapped."""

    def __init__(self, node: str, memory: Memory | None = None, *, backend: int = 0x2 | PERSIST):
        self.fd = os.open(node, os.O_RDWR | os.O_CLOEXEC)
        self.ioctl(SET_OWNER, "I", 0)
        self.ioctl(SET_BACKEND_FEATURES, "Q", backend)
        if memory is not None:
            self.iotlb(UPDATE, memory.guest, memory.size, memory.address)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def ioctl(self, request: int, layout: str, *values: int) -> tuple[int, ...]:
        """One ioctl; returns the argument as it came back."""
        argument = bytearray(struct.pack(f"={layout}", *values))
        fcntl.ioctl(self.fd, request, argument)
        return struct.unpack(f"={layout}", argument)

    def iotlb(self, kind: int, iova: int, size: int, address: int = 0) -> None:
        message = struct.pack("=IIQQQBB38x", 2, 0, iova, size, address, 3, kind)
        assert os.write(self.fd, message) == 72

    def status(self, value: int) -> None:
        self.ioctl(SET_STATUS, "B", value)

    def start(self, ring: DriverRing, *, base: int = 0, features: int = 0) -> None:
        """Bring a device with one vring to DRIVER_OK."""
        guest = ring.memory.guest
        self.status(1 | 2)
        self.ioctl(SET_FEATURES, "Q", VERSION_1_ACCESS_PLATFORM | features)
        self.status(1 | 2 | 8)
        self.ioctl(SET_VRING_NUM, "II", 0, ring.size)
        self.ioctl(SET_VRING_BASE, "II", 0, base)
        areas = (guest + ring.descriptors, guest + ring.used, guest + ring.avail, 0)
        self.ioctl(SET_VRING_ADDR, "IIQQQQ", 0, 0, *areas)
        self.ioctl(SET_VRING_KICK, "Ii", 0, ring.kick_fd)
        self.ioctl(SET_VRING_CALL, "Ii", 0, ring.call_fd)
        self.ioctl(SET_VRING_ENABLE, "II", 0, 1)
        self.status(1 | 2 | 8 | 4)
