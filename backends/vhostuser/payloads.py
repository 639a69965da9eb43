"""One dataclass for each payload of vhost-user messages.

Nothing here does I/O. Integers are in the machine's own byte order, as the protocol has them.
Source: QEMU's ``docs/interop/vhost-user.rst``.
"""

from __future__ import annotations

import struct
from dataclasses import astuple, dataclass
from typing import ClassVar, Self

MAX_REGIONS = 8
MAX_CONFIG = 256

#: SET_VRING_ADDR: writes to the used ring are logged.
LOG_USED = 0x1


@dataclass(frozen=True, slots=True)
class Empty:
    """No payload."""

    def pack(self) -> bytes:
        return b""

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        if data:
            raise ValueError(f"{len(data)} bytes where none belong")
        return cls()


class _Fixed:
    """A payload whose fields follow each other in one ``struct`` format."""

    LAYOUT: ClassVar[struct.Struct]
    __slots__ = ()

    def pack(self) -> bytes:
        return self.LAYOUT.pack(*astuple(self))  # type: ignore[call-overload]

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        if len(data) != cls.LAYOUT.size:
            raise ValueError(f"{len(data)} bytes, expected {cls.LAYOUT.size}")
        return cls(*cls.LAYOUT.unpack(data))


@dataclass(frozen=True, slots=True)
class U64(_Fixed):
    LAYOUT: ClassVar = struct.Struct("=Q")
    value: int


@dataclass(frozen=True, slots=True)
class VringState(_Fixed):
    """``num`` is a size, a base, an enable flag or a byte order, as the request says."""

    LAYOUT: ClassVar = struct.Struct("=II")
    index: int
    num: int


@dataclass(frozen=True, slots=True)
class VringAddr(_Fixed):
    """Ring areas as front-end user addresses (note: used stands before avail)."""

    LAYOUT: ClassVar = struct.Struct("=IIQQQQ")
    index: int
    flags: int
    descriptor: int
    used: int
    avail: int
    log: int

    @property
    def areas(self) -> tuple[int, int, int]:
        """Where the ring is, wherever it is logged."""
        return (self.descriptor, self.avail, self.used)

    @property
    def log_place(self) -> int | None:
        """The guest address that stands for the used ring in the log; ``None``: not logged."""
        return self.log if self.flags & LOG_USED else None


@dataclass(frozen=True, slots=True)
class VringFd:
    """A ring index, and whether an eventfd comes with it (bit 8 says that none does)."""

    index: int
    has_fd: bool

    def pack(self) -> bytes:
        return struct.pack("=Q", self.index | (0 if self.has_fd else 0x100))

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        value = U64.unpack(data).value
        if value & ~0x1FF:
            raise ValueError(f"unknown bits in vring index {value:#x}")
        return cls(value & 0xFF, not value & 0x100)


@dataclass(frozen=True, slots=True)
class Region(_Fixed):
    """One guest memory region, in bytes; ``mmap_offset`` is where it starts in its fd."""

    LAYOUT: ClassVar = struct.Struct("=QQQQ")
    guest_address: int
    size: int
    user_address: int
    mmap_offset: int


@dataclass(frozen=True, slots=True)
class MemTable:
    """SET_MEM_TABLE: only as many regions as are counted are on the wire."""

    regions: tuple[Region, ...]

    def pack(self) -> bytes:
        return struct.pack("=II", len(self.regions), 0) + b"".join(r.pack() for r in self.regions)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        if len(data) < 8:
            raise ValueError(f"{len(data)} bytes, expected at least 8")
        count, _ = struct.unpack_from("=II", data)
        size = Region.LAYOUT.size
        if count > MAX_REGIONS:
            raise ValueError(f"{count} memory regions, at most {MAX_REGIONS} are allowed")
        if len(data) != 8 + count * size:
            raise ValueError(f"{len(data)} bytes for {count} memory regions")
        return cls(tuple(Region.unpack(data[at : at + size]) for at in range(8, len(data), size)))


@dataclass(frozen=True, slots=True)
class MemReg:
    """ADD_MEM_REG and REM_MEM_REG: one region behind eight bytes of padding."""

    region: Region

    def pack(self) -> bytes:
        return bytes(8) + self.region.pack()

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        if len(data) != 40:
            raise ValueError(f"{len(data)} bytes, expected 40")
        return cls(Region.unpack(data[8:]))


@dataclass(frozen=True, slots=True)
class Log(_Fixed):
    """SET_LOG_BASE: size in bytes and offset in the fd of the dirty bitmap."""

    LAYOUT: ClassVar = struct.Struct("=QQ")
    size: int
    offset: int


@dataclass(frozen=True, slots=True)
class Iotlb(_Fixed):
    LAYOUT: ClassVar = struct.Struct("=QQQBB6x")
    iova: int
    size: int
    user_address: int
    perm: int
    type: int


@dataclass(frozen=True, slots=True)
class Config:
    """GET_CONFIG and SET_CONFIG. In a failed GET_CONFIG's reply everything is zero and empty, down
    to no payload at all from libvhost-user."""

    offset: int
    flags: int
    data: bytes

    def pack(self) -> bytes:
        return struct.pack("=III", self.offset, len(self.data), self.flags) + self.data

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        if not data:
            return cls(0, 0, b"")
        if len(data) < 12:
            raise ValueError(f"{len(data)} bytes, expected at least 12")
        offset, size, flags = struct.unpack_from("=III", data)
        if size > MAX_CONFIG or offset + size > MAX_CONFIG:
            raise ValueError(f"config bytes {offset}+{size} lie beyond {MAX_CONFIG}")
        if len(data) != 12 + size:
            raise ValueError(f"{len(data) - 12} config bytes, {size} announced")
        return cls(offset, flags, data[12:])


@dataclass(frozen=True, slots=True)
class VringArea(_Fixed):
    LAYOUT: ClassVar = struct.Struct("=QQQ")
    index: int
    size: int
    offset: int


@dataclass(frozen=True, slots=True)
class Inflight:
    """The in-flight buffer's description. QEMU sends 24 bytes, others leave the padding out."""

    mmap_size: int
    mmap_offset: int
    queues: int
    queue_size: int

    def pack(self) -> bytes:
        return struct.pack(
            "=QQHH4x", self.mmap_size, self.mmap_offset, self.queues, self.queue_size
        )

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        if len(data) not in (20, 24):
            raise ValueError(f"{len(data)} bytes, expected 24")
        return cls(*struct.unpack_from("=QQHH", data))


@dataclass(frozen=True, slots=True)
class Uuid:
    """A shared object's UUID, as bytes. QEMU's GET_SHARED_OBJECT leaves it out."""

    value: bytes

    def pack(self) -> bytes:
        return self.value

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        if len(data) not in (0, 16):
            raise ValueError(f"{len(data)} bytes, expected 16")
        return cls(data)


@dataclass(frozen=True, slots=True)
class StateTransfer(_Fixed):
    """SET_DEVICE_STATE_FD: direction 0 saves, 1 loads; phase 0 (stopped) is the only one."""

    LAYOUT: ClassVar = struct.Struct("=II")
    direction: int
    phase: int


@dataclass(frozen=True, slots=True)
class Mmap(_Fixed):
    LAYOUT: ClassVar = struct.Struct("=B7xQQQQ")
    shmid: int
    fd_offset: int
    shm_offset: int
    length: int
    flags: int


@dataclass(frozen=True, slots=True)
class ShmemConfig:
    """Sizes in bytes of the shared memory regions, indexed by their id; zero is none."""

    count: int
    sizes: tuple[int, ...]

    def pack(self) -> bytes:
        return struct.pack("=II256Q", self.count, 0, *self.sizes)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        if len(data) != 2056:
            raise ValueError(f"{len(data)} bytes, expected 2056")
        count, _, *sizes = struct.unpack("=II256Q", data)
        return cls(count, tuple(sizes))


@dataclass(frozen=True, slots=True)
class Raw:
    """Bytes that are passed on or ignored, not looked into."""

    data: bytes

    def pack(self) -> bytes:
        return self.data

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        return cls(data)


Payload = (
    Empty
    | U64
    | VringState
    | VringAddr
    | VringFd
    | Region
    | MemTable
    | MemReg
    | Log
    | Iotlb
    | Config
    | VringArea
    | Inflight
    | Uuid
    | StateTransfer
    | Mmap
    | ShmemConfig
    | Raw
)
