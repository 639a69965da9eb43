"""What a guest gives its device: memory, and vrings in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from .errors import BridgeError
from .fds import OwnedFd, signal_eventfds


@dataclass(frozen=True, slots=True)
class MemoryRegion:
    """Guest memory: ``size`` bytes at ``guest_address``, in ``fd`` from ``offset`` on.

    The one who made it owns ``fd`` and keeps it open until another ``set_memory`` has replaced
    the region. ``identity`` (device, inode, offset) tells whether two regions are the same memory
    although their descriptors differ.
    """

    guest_address: int
    size: int
    fd: OwnedFd
    offset: int
    identity: tuple[int, int, int]

    @property
    def key(self) -> tuple[int, int, int, int, int]:
        return (self.guest_address, self.size, *self.identity)

    @property
    def end(self) -> int:
        """First guest address behind the region."""
        return self.guest_address + self.size


@dataclass(frozen=True, slots=True)
class VringSetup:
    """One vring, ready to run. Area addresses are guest physical; descriptors are borrowed.

    ``base`` is encoded as vhost has it: split rings the 16-bit available index, packed rings
    available index and wrap counter below used index and wrap counter. ``None`` means where the
    device left off when it was last suspended.
    """

    index: int
    size: int
    descriptor_area: int
    driver_area: int
    device_area: int
    base: int | None
    kick: OwnedFd | None
    call: OwnedFd | None
    err: OwnedFd | None
    enabled: bool

    @property
    def layout(self) -> tuple[int, int, int, int]:
        """What makes it the same ring, whatever its position and eventfds are."""
        return (self.size, self.descriptor_area, self.driver_area, self.device_area)


async def kick_and_call(vrings: Iterable[VringSetup]) -> None:
    """Notify both sides of each vring once, for what they were not told while it stood still."""
    await signal_eventfds(*(fd for vring in vrings for fd in (vring.kick, vring.call)))


def with_base(vring: VringSetup, known: Mapping[int, VringSetup]) -> VringSetup:
    """``vring``, if it has no base with that of the vring that is ``known``.

    Raises:
        BridgeError: that has none either.
    """
    if vring.base is not None:
        return vring
    before = known.get(vring.index)
    if before is None or before.base is None:
        raise BridgeError(f"vring {vring.index} has no base to go on from")
    return replace(vring, base=before.base)


def whole_base(base: int, *, packed: bool) -> int:
    """A position as its peer told it.

    Of a packed ring DPDK tells the available half only, on both sides of vhost-user, and takes the
    other one for equal, which it is while nothing is in flight.
    """
    return base | base << 16 if packed and base <= 0xFFFF else base


def base_of(vrings: Mapping[int, VringSetup], index: int) -> int:
    """Where a vring stopped.

    Raises:
        BridgeError: it never ran.
    """
    vring = vrings.get(index)
    if vring is None or vring.base is None:
        raise BridgeError(f"vring {index} was never started")
    return vring.base
