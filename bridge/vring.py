"""One vring as the front-end describes it, message by message."""

from __future__ import annotations

from dataclasses import dataclass

from vhostbridge.backends.device import DeviceInfo
from vhostbridge.backends.errors import PeerError, Unsupported
from vhostbridge.backends.fds import OwnedFd, close_all
from vhostbridge.backends.guest import VringSetup
from vhostbridge.backends.ring_memory import available_index, used_index
from vhostbridge.backends.vhostuser.payloads import VringAddr
from vhostbridge.backends.virtio import ring_areas

from .memory import MemoryTable

# Where a packed ring starts: both indices 0, both wrap counters 1.
PACKED_START = 0x80008000


def check_packed_base(index: int, size: int, base: int) -> None:
    """Refuse a position outside the ring.

    Raises:
        PeerError: it is one.
    """
    if max(base & 0x7FFF, base >> 16 & 0x7FFF) >= size:
        raise PeerError(f"base {base:#x} of packed vring {index} is not within its {size} entries")


@dataclass(slots=True)
class FrontendVring:
    """What a front-end said of a vring, and whether the device runs it.

    ``base`` is ``None`` while the device knows better. ``set_up`` says that SET_VRING_KICK came
    (with a descriptor or without), which is what starts a ring; GET_VRING_BASE undoes it.
    """

    index: int
    size: int = 0
    base: int | None = None
    address: VringAddr | None = None
    kick: OwnedFd | None = None
    call: OwnedFd | None = None
    err: OwnedFd | None = None
    enabled: bool = False
    set_up: bool = False
    running: bool = False

    @property
    def ready(self) -> bool:
        """Whether it could run: size, addresses and kick are there."""
        return self.set_up and self.size > 0 and self.address is not None

    def check_size(self, size: int, info: DeviceInfo, packed: bool) -> None:
        """Refuse a size that the device can't have.

        Raises:
            Unsupported: more than the device's maximum.
            PeerError: no size at all, or not a power of two in a split ring.
        """
        if size > info.vring_size_max:
            raise Unsupported(
                f"vring {self.index} wants {size} entries, {info.target} has {info.vring_size_max} "
                "at most",
                "lower the queue size of the front-end (queue-size=)",
            )
        if size == 0 or (size & (size - 1) and not packed):
            raise PeerError(f"vring {self.index} can't have {size} entries")

    def start_base(self, packed: bool) -> int:
        """Where a vring that does not run starts: at its base, or as a fresh one."""
        if self.base is not None:
            return self.base
        return PACKED_START if packed else 0

    def begins(self, packed: bool) -> bool:
        """Whether a driver that never used it before starts it."""
        return not self.running and self.start_base(packed) == (PACKED_START if packed else 0)

    def look_for_base(self, table: MemoryTable) -> None:
        """Begin at the used index of a split vring where the front-end does not know better.

        cloud-hypervisor says of a vring that ran elsewhere that all requests are done: the base is
        the available index, where the driver may have gone on from by now. DPDK that listens says
        0, also of one that ran before it was connected anew.

        Raises:
            PeerError: the vring does not lie in guest memory.
        """
        setup, regions = self.setup(table, packed=False), table.regions
        if setup.base is None:
            return
        available, used = available_index(regions, setup), used_index(regions, setup)
        waiting, told = (available - used) % 0x10000, (setup.base - used) % 0x10000
        if waiting <= self.size and (setup.base == 0 or told <= waiting):
            self.base = used

    def forget_layout(self) -> None:
        """Void size and base: what was right for a packed ring may not be for a split one."""
        self.size, self.base = 0, None

    def setup(self, table: MemoryTable, packed: bool) -> VringSetup:
        """The vring in guest addresses.

        Raises:
            PeerError: an area is not in guest memory, or misaligned.
        """
        assert self.address is not None
        areas = ring_areas(self.size, packed)
        place = {
            "descriptor area": (self.address.descriptor, areas.descriptor, areas.descriptor_align),
            "driver area": (self.address.avail, areas.driver, areas.driver_align),
            "device area": (self.address.used, areas.device, areas.device_align),
        }
        guest = {}
        for name, (address, size, align) in place.items():
            what = f"the {name} of vring {self.index}"
            guest[name] = table.guest_address(address, size, what)
            if guest[name] % align:
                raise PeerError(f"{what} at {guest[name]:#x} is not aligned to {align} bytes")
        base = None if self.running else self.start_base(packed)
        if packed and base is not None:
            check_packed_base(self.index, self.size, base)
        return VringSetup(
            index=self.index,
            size=self.size,
            descriptor_area=guest["descriptor area"],
            driver_area=guest["driver area"],
            device_area=guest["device area"],
            base=base,
            kick=self.kick,
            call=self.call,
            err=self.err,
            enabled=self.enabled,
        )

    def regions(self, table: MemoryTable, packed: bool) -> set[tuple[int, int, int, int, int]]:
        """Which regions of memory it lies in; none if it is not wholly in memory."""
        try:
            setup = self.setup(table, packed)
        except PeerError:
            return set()
        areas = (setup.descriptor_area, setup.driver_area, setup.device_area)
        return {r.key for r in table.regions if any(r.guest_address <= a < r.end for a in areas)}

    def stop(self, base: int | None, *, keep_call: bool = False) -> None:
        """Forget the eventfds, as back-ends do at GET_VRING_BASE; the front-end sends new ones.

        The error eventfd stays: QEMU sends it once per connection.
        """
        close_all((self.kick,) if keep_call else (self.kick, self.call))
        self.kick, self.call = None, self.call if keep_call else None
        self.set_up = self.running = False
        self.base = base

    def close(self) -> None:
        close_all((self.kick, self.call, self.err))
        self.kick = self.call = self.err = None
