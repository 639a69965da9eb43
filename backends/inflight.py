"""The buffer in which a back-end notes its requests in flight, and which its front-end keeps."""

from __future__ import annotations

import fcntl
import os
from typing import TYPE_CHECKING

from vhostbridge.native import lib

from .closing import Closing
from .errors import KernelRefused, PeerError, Unsupported
from .fds import OwnedFd
from .foreign_fds import Kind, kind_of
from .mapping import PAGE
from .virtio import TransportFeature

if TYPE_CHECKING:
    from .state import DeviceState

#: Regions begin at multiples of this.
ALIGN = 64
# Descriptors that there is room for at least. A guest may make its vring larger than its front-end
# says, up to this in QEMU: SeaBIOS has 256 where QEMU says 128.
ROOM = 1024
# Of a region's header, and of an entry: its first byte says whether it is in flight.
_SPLIT, _PACKED = 16, 32
# Where a header has its version, two bytes; they follow the features.
_VERSION = 8
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class InflightBuffer(Closing):
    """``size`` bytes at ``offset`` of ``fd``: a region for each of ``queues`` vrings.

    They are of one size, and meant for ``queue_size`` descriptors each. It owns its descriptor.
    What is in it is the front-end's word, and may change at any time.

    Raises:
        PeerError: on construction, when it is no memory, or the file is too short.
    """

    def __init__(self, fd: OwnedFd, offset: int, size: int, queues: int, queue_size: int) -> None:
        if kind_of(fd) is not Kind.MEMORY:
            raise PeerError(
                "the in-flight buffer is neither shared memory nor in a file of a local disk"
            )
        end = os.fstat(fd.fileno()).st_size
        if size == 0 or offset + size > end:
            raise PeerError(
                f"the in-flight buffer has {size} bytes from {offset} on in a file of {end}",
                "whoever made it announced more than it shares",
            )
        if offset % PAGE:
            raise PeerError(f"the in-flight buffer begins at {offset}, which is no whole page")
        self.fd = fd
        self.offset = offset
        self.size = size
        self.queues = queues
        self.queue_size = queue_size
        self._mapped = 0

    @property
    def place(self) -> tuple[int, int, int, int]:
        """Size and offset in bytes, vrings, their size."""
        return (self.size, self.offset, self.queues, self.queue_size)

    def dup(self) -> InflightBuffer:
        """The same buffer, with a descriptor and a mapping of its own."""
        return InflightBuffer(self.fd.dup(), self.offset, self.size, self.queues, self.queue_size)

    @classmethod
    def make(cls, queues: int, queue_size: int, features: int) -> InflightBuffer:
        """A new one for vrings with these features, which nobody can make shorter."""
        packed = features & TransportFeature.RING_PACKED.mask
        size = lib.vb_inflight_size(max(queue_size, ROOM), bool(packed)) * queues
        fd = OwnedFd(os.memfd_create("in-flight", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
        os.ftruncate(fd.fileno(), size)
        fcntl.fcntl(fd.fileno(), fcntl.F_ADD_SEALS, _SEALS)
        return cls(fd, 0, size, queues, queue_size)

    def region(self, index: int, vring_size: int, *, packed: bool) -> tuple[int, int]:
        """Where the region of a vring is mapped, and for how many descriptors it has room.

        Raises:
            PeerError: it has none, or one that is too small.
            KernelRefused: mmap failed.
        """
        each = self._each
        entries = lib.vb_inflight_entries(each, packed)
        if index >= self.queues or vring_size > entries:
            raise PeerError(
                f"the in-flight buffer is for {self.queues} vrings of {entries}, and vring "
                f"{index} has {vring_size} descriptors"
            )
        if not self._mapped:
            address = lib.vb_map_shared(self.size, self.fd.fileno(), self.offset)
            if address < 0:
                raise KernelRefused("mapping the in-flight buffer", -address)
            self._mapped = address
        return int(self._mapped + index * each), int(entries)

    @property
    def _each(self) -> int:
        return self.size // self.queues // ALIGN * ALIGN

    def is_blank(self, index: int) -> bool:
        """Whether nobody has used the region of a vring: its header has no version yet."""
        at = self.offset + index * self._each + _VERSION
        return index >= self.queues or not any(os.pread(self.fd.fileno(), 2, at))

    def check_empty(self, state: DeviceState) -> None:
        """Refuse a state that is not all: some of its requests are here.

        Raises:
            Unsupported: vrings of it stopped with requests in flight.
        """
        step = _PACKED if state.packed else _SPLIT
        count = 0
        for vring in state.vrings:
            if vring.index < self.queues:
                at = self.offset + vring.index * self._each
                count += sum(map(bool, os.pread(self.fd.fileno(), self._each, at)[step::step]))
        if count:
            raise Unsupported(
                f"{count} requests are in flight, which only the front-end's buffer has",
                "let the guest go on, and suspend the device meanwhile",
            )

    def close(self) -> None:
        """Unmap it and close the descriptor; nobody may use it any more. Idempotent."""
        if self._mapped:
            lib.vb_unmap(self._mapped, self.size)
            self._mapped = 0
        self.fd.close()
