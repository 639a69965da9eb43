"""Guest memory of a test driver: shared, with single loads and stores of ring fields."""

from __future__ import annotations

import ctypes
import mmap
import os

PAGE = 4096


class Memory:
    """`size` bytes of shared memory that the device sees at guest address `guest`.

    `user` is what a vhost-user front-end calls the same place; both differ from where it really
    is, so that a translation left out is noticed. With a `path` it is that file, and outlives us.
    """

    def __init__(
        self,
        size: int = 4 << 20,
        *,
        guest: int = 0x4000_0000,
        user: int = 0x7E00_0000_0000,
        path: str = "",
    ) -> None:
        self.size = size
        self.guest = guest
        self.user = user
        if path:
            self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        else:
            self.fd = os.memfd_create("guest-memory", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, size)
        self.map = mmap.mmap(self.fd, size)
        self._anchor = ctypes.c_char.from_buffer(self.map)
        self.address = ctypes.addressof(self._anchor)
        whole = memoryview(self.map)
        # An item of a cast view is loaded and stored whole, which ring indices need.
        self.u16, self.u32, self.u64 = whole.cast("H"), whole.cast("I"), whole.cast("Q")
        self._next = 0

    def take(self, size: int, align: int = 16) -> int:
        """Reserve `size` bytes and return their offset."""
        at = -(-self._next // align) * align
        if at + size > self.size:
            raise MemoryError(f"{size} bytes of {self.size} at {at}")
        self._next = at + size
        return at

    def close(self) -> None:
        """Close the descriptor; the mapping stays as long as this object."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
