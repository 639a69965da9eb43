"""The log of dirty pages that a front-end shares during a migration."""

from __future__ import annotations

import os
from collections.abc import Iterable

from vhostbridge.native import ffi, lib

from .closing import Closing
from .errors import KernelRefused, PeerError
from .fds import OwnedFd
from .foreign_fds import Kind, kind_of
from .guest import MemoryRegion

#: Bytes of guest memory that one bit stands for.
LOG_PAGE = 4096


class DirtyLog(Closing):
    """One bit a page of 4 KiB from guest address 0 on, lowest bit of a byte first.

    The front-end takes bits out while they are set, so they are set atomically. It owns its
    descriptor and its mapping; whoever marks pages through ``address`` stops before ``close``.

    Raises:
        PeerError: on construction, when it is no memory, or the file is too short.
    """

    def __init__(self, fd: OwnedFd, offset: int, size: int) -> None:
        if kind_of(fd) is not Kind.MEMORY:
            raise PeerError("the dirty log is neither shared memory nor in a file of a local disk")
        end = os.fstat(fd.fileno()).st_size
        if size == 0 or offset + size > end:
            raise PeerError(
                f"the dirty log has {size} bytes from {offset} on in a file of {end}",
                "the front-end announced more than it shares",
            )
        mapped = lib.vb_map_shared(offset + size, fd.fileno(), 0)
        if mapped < 0:
            raise KernelRefused("mapping the dirty log", -mapped)
        self.fd = fd
        self.offset = offset
        self.size = size
        self._mapped = mapped

    @property
    def pointer(self) -> object:
        """Where it is mapped, for C."""
        return ffi.cast("uint8_t *", self._mapped + self.offset)

    def covers(self, regions: Iterable[MemoryRegion]) -> bool:
        """Whether every page of the regions has a bit."""
        return all(region.end <= self.size * 8 * LOG_PAGE for region in regions)

    def mark_all(self, regions: Iterable[MemoryRegion]) -> None:
        """Mark every page of the regions; those that share a byte with them too.

        It goes through the file: what a front-end made shorter would be a bus error in memory.

        Raises:
            PeerError: the front-end made the log shorter, or write-protected it.
        """
        for region in regions:
            first = region.guest_address // LOG_PAGE // 8
            last = min((region.end - 1) // LOG_PAGE // 8, self.size - 1)
            while first <= last:
                piece = b"\xff" * min(last + 1 - first, 1 << 20)
                first += self._write(piece, self.offset + first)
        if os.fstat(self.fd.fileno()).st_size < self.offset + self.size:
            raise PeerError("the front-end made the dirty log shorter while it was in use")

    def _write(self, piece: bytes, offset: int) -> int:
        try:
            return os.pwrite(self.fd.fileno(), piece, offset)
        except OSError as error:
            raise PeerError(f"the dirty log can't be written: {error.strerror}") from None

    def close(self) -> None:
        """Unmap it and close the descriptor. Idempotent."""
        if not self.fd.closed:
            lib.vb_unmap(self._mapped, self.offset + self.size)
            self.fd.close()
