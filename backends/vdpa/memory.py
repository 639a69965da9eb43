"""Guest memory of a vhost-vdpa device: our mappings of it and the IOTLB entries made from them.

IOVA is the guest physical address. vhost-vdpa has no "replace": an UPDATE that overlaps fails and
an INVALIDATE drops every entry it touches, so entries are kept one per region and removed whole.
"""

from __future__ import annotations

import resource
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from vhostbridge.backends.errors import BridgeError, KernelRefused, PeerError, Unsupported
from vhostbridge.backends.guest import MemoryRegion
from vhostbridge.backends.mapping import PAGE, Mapping, map_region, unmap

from .chardev import Chardev


def check_regions(regions: Sequence[MemoryRegion], first: int, last: int) -> None:
    """Refuse regions that overlap, are not page-aligned or lie outside the IOVA range.

    Raises:
        PeerError: misaligned or overlapping regions.
        Unsupported: the device can't reach them.
    """
    end_before = 0
    for region in sorted(regions, key=lambda r: r.guest_address):
        where = f"guest memory {region.guest_address:#x}-{region.end - 1:#x}"
        if region.guest_address % PAGE or region.offset % PAGE:
            raise PeerError(f"{where} is not aligned to {PAGE} bytes")
        if region.guest_address < end_before:
            raise PeerError(f"{where} overlaps the region before it")
        end_before = -(-region.end // PAGE) * PAGE
        if region.guest_address < first or end_before - 1 > last:
            raise Unsupported(
                f"{where} is outside the device's IOVA range {first:#x}-{last:#x}",
                "give the guest less memory, or a device with a wider range",
            )


class HalfChanged(BridgeError):
    """A change of memory failed, and so did the way back: ``lost`` is not the device's any more."""

    def __init__(self, message: str, hint: str, lost: Sequence[Mapping]) -> None:
        super().__init__(message, hint)
        self.lost = lost


class GuestMemory:
    """What one device can reach in one of its address spaces. Blocking; one thread at a time."""

    def __init__(self, device: Chardev, *, batch: bool, asid: int = 0) -> None:
        self._device = device
        self._batch = batch
        # Kernels before address spaces, and fakes, have no such argument.
        self._space = {"asid": asid} if asid else {}
        self._mappings: dict[tuple[int, int, int, int, int], Mapping] = {}
        #: What ``update`` was given last.
        self.regions: Sequence[MemoryRegion] = ()
        #: Memory of the bridge's own beside it, from the next ``update`` on.
        self.own: Sequence[MemoryRegion] = ()

    def update(self, regions: Sequence[MemoryRegion]) -> None:
        """Make ``regions`` the device's memory; what stays is not touched.

        Raises:
            HalfChanged: the device must not run on; what it lost comes back with another update.
            BridgeError: nothing changed; the previous memory is in force.
        """
        wanted = {region.key: region for region in (*regions, *self.own)}
        gone = [m for key, m in self._mappings.items() if key not in wanted]
        new: list[Mapping] = []
        try:
            for key, region in wanted.items():
                if key not in self._mappings:
                    new.append(map_region(region))
            self._change(gone, new)
        except HalfChanged as error:
            unmap(new)
            self._drop(error.lost)
            raise
        except BridgeError:
            unmap(new)
            raise
        self._drop(gone)
        self._mappings.update((m.key, m) for m in new)
        self.regions = regions

    def _drop(self, mappings: Sequence[Mapping]) -> None:
        for mapping in mappings:
            del self._mappings[mapping.key]
        unmap(mappings)

    def needs_removal(self, regions: Sequence[MemoryRegion]) -> bool:
        """Whether ``update(regions)`` would take memory away."""
        return not set(self._mappings) <= {region.key for region in (*regions, *self.own)}

    def map_again(self) -> None:
        """After a reset that lost the parent's entries: invalidate ours and add them anew."""
        mappings = list(self._mappings.values())
        if mappings:
            self._change(mappings, mappings)

    def close(self) -> None:
        """Unmap everything; the device must be closed already."""
        unmap(self._mappings.values())
        self._mappings.clear()

    # Entries out, entries in, in one batch where the kernel has it. On failure entries go back.
    def _change(self, gone: Sequence[Mapping], new: Sequence[Mapping]) -> None:
        removed: list[Mapping] = []
        added: list[Mapping] = []
        if self._batch:
            self._device.iotlb_batch_begin(**self._space)
        try:
            try:
                for mapping in gone:
                    self._unmap(mapping)
                    removed.append(mapping)
                for mapping in new:
                    self._map(mapping)
                    added.append(mapping)
            finally:
                if self._batch:
                    self._device.iotlb_batch_end(**self._space)
        except KernelRefused as error:
            self._undo(added, removed, self._explain(error, new))

    # What can be put back is, whatever can't.
    def _undo(
        self, added: Sequence[Mapping], removed: Sequence[Mapping], reason: BridgeError
    ) -> NoReturn:
        lost: list[Mapping] = []
        second: KernelRefused | None = None
        for mapping in added:
            try:
                self._unmap(mapping)
            except KernelRefused as error:
                second = error
        for mapping in removed:
            try:
                self._map(mapping)
            except KernelRefused as error:
                second = error
                lost.append(mapping)
        if second is None:
            raise reason from None
        raise HalfChanged(
            f"guest memory could not be changed ({reason.message}), nor put back "
            f"({second.message})",
            reason.hint or "the device is opened anew; dmesg may say why",
            lost,
        ) from None

    def _unmap(self, mapping: Mapping) -> None:
        self._device.iotlb_unmap(mapping.iova, mapping.size, **self._space)

    def _map(self, mapping: Mapping) -> None:
        self._device.iotlb_map(mapping.iova, mapping.size, mapping.address, **self._space)

    # The kernel says EFAULT whatever happened. The locked-memory limit is the usual reason, and the
    # one of entries the next: hardware needs one for each piece of memory that is in one place.
    def _explain(self, error: KernelRefused, new: Sequence[Mapping]) -> BridgeError:
        limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        needed = sum(m.size for m in new) + _pinned_bytes()
        if limit != resource.RLIM_INFINITY and needed > limit:
            return Unsupported(
                f"guest memory needs {needed // 1024} KiB of locked memory, RLIMIT_MEMLOCK allows "
                f"{limit // 1024} KiB",
                "set LimitMEMLOCK=infinity in the unit, or ulimit -l unlimited",
            )
        if new and (entries := _entry_limit()):
            error.hint = (
                f"this kernel maps {entries} pieces of memory at most: give the guest huge pages, "
                "or load vhost_vdpa with more max_iotlb_entries"
            )
        return error


# Linux 7.2 and newer, and stable kernels that took it over.
_ENTRIES = Path("/sys/module/vhost_vdpa/parameters/max_iotlb_entries")


def _entry_limit() -> str:
    try:
        return _ENTRIES.read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _pinned_bytes() -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").split("\n"):
        if line.startswith("VmPin:"):
            return int(line.split()[1]) * 1024
    return 0
