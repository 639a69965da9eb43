"""Shadow vrings of one device: memory for the device's vrings, and the threads that relay."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from vhostbridge.backends.dirty_log import DirtyLog
from vhostbridge.backends.errors import BridgeError, KernelRefused, PeerError, Unsupported
from vhostbridge.backends.fds import OwnedFd, close_all, new_eventfd
from vhostbridge.backends.guest import MemoryRegion, VringSetup
from vhostbridge.backends.inflight import InflightBuffer
from vhostbridge.backends.mapping import Mapping as GuestMapping
from vhostbridge.backends.mapping import map_region, unmap
from vhostbridge.backends.virtio import TransportFeature
from vhostbridge.native import ffi, lib

# Descriptors for indirect tables: room for so many a slot, so that long chains rarely wait.
_POOL_PER_SLOT = 32
_POOL_MIN, _POOL_MAX = 1024, 1 << 16
_NO_LOG = (1 << 64) - 1
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

#: What the device must not do, because shadow vrings are split and complete in any order.
_NOT_FOR_DEVICE = TransportFeature.RING_PACKED.mask | TransportFeature.IN_ORDER.mask


@dataclass(frozen=True, slots=True)
class ShadowStats:
    """What went through one shadow vring so far."""

    requests: int
    bytes: int
    kicks: int
    calls: int
    inflight: int


@dataclass(slots=True)
class _Vring:
    guest: VringSetup
    device: VringSetup
    handle: Any
    eventfds: tuple[OwnedFd, OwnedFd]


# Descriptors of the device's vring and for indirect tables, and where they lie.
def _plan(features: int, vring: VringSetup) -> tuple[int, int, Any]:
    slots = 1 << (vring.size - 1).bit_length()
    pool = 0
    if features & TransportFeature.INDIRECT_DESC.mask:
        pool = min(max(_POOL_MIN, _POOL_PER_SLOT * slots), _POOL_MAX)
    layout = ffi.new("struct vb_shadow_layout *")
    lib.vb_shadow_layout(slots, pool, layout)
    return slots, pool, layout


def memory_size(features: int, vrings: Sequence[VringSetup]) -> int:
    """Bytes that the shadow vrings of these take."""
    return sum(_plan(features, vring)[2].size for vring in vrings)


class GuestMap:
    """Guest memory mapped here for the threads; each region once, as long as it stays."""

    def __init__(self) -> None:
        self._mappings: dict[tuple[int, int, int, int, int], GuestMapping] = {}

    def update(self, regions: Sequence[MemoryRegion]) -> list[GuestMapping]:
        """Map what is new; what is gone is returned, for ``unmap`` when nobody uses it any more.

        Raises:
            BridgeError: nothing changed.
        """
        new: list[GuestMapping] = []
        try:
            for region in regions:
                new += [] if region.key in self._mappings else [map_region(region)]
        except BridgeError:
            unmap(new)
            raise
        wanted = {region.key for region in regions}
        gone = [self._mappings.pop(key) for key in list(self._mappings) if key not in wanted]
        self._mappings.update((mapping.key, mapping) for mapping in new)
        return gone

    def table(self) -> Any:
        """The regions as C has them."""
        table = ffi.new("struct vb_region[]", len(self._mappings))
        for entry, mapping in zip(table, self._mappings.values(), strict=True):
            entry.guest_address, entry.size = mapping.iova, mapping.key[1]
            entry.address = mapping.address
        return table

    def close(self) -> None:
        unmap(self._mappings.values())
        self._mappings.clear()


class ShadowRings:
    """Shadow vrings, made stopped. Blocking; one thread at a time.

    ``region`` is memory that the device needs besides the guest's, ``setups`` are its vrings.
    ``broken`` is signalled when a vring breaks, and must stay open until ``mute``. ``inflight`` is
    where requests in flight are noted; what it has already comes first.

    Raises:
        PeerError: on construction, when ``inflight`` is not a buffer of these vrings.
        Unsupported: likewise, when a vring is not in guest memory.
    """

    def __init__(
        self,
        features: int,
        vrings: Sequence[VringSetup],
        memory: GuestMap,
        iova: int,
        broken: OwnedFd | None,
        inflight: InflightBuffer | None = None,
    ) -> None:
        self.features = features & ~_NOT_FOR_DEVICE
        self._packed = bool(features & TransportFeature.RING_PACKED.mask)
        self._vrings: dict[int, _Vring] = {}
        self._size = memory_size(features, vrings)
        fd = OwnedFd(os.memfd_create("shadow-vrings", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
        os.ftruncate(fd.fileno(), self._size)
        # A back-end gets it too, and must not make it shorter under us.
        fcntl.fcntl(fd.fileno(), fcntl.F_ADD_SEALS, _SEALS)
        status = os.fstat(fd.fileno())
        identity = (status.st_dev, status.st_ino, 0)
        self.region = MemoryRegion(iova, self._size, fd, 0, identity)
        self._address = lib.vb_map_shared(self._size, fd.fileno(), 0)
        if self._address < 0:
            fd.close()
            raise KernelRefused("mapping shadow vrings", -self._address)
        # Of our own: the threads may live longer than the front-end.
        self._inflight = None if inflight is None else inflight.dup()
        offset = 0
        try:
            for vring in vrings:
                offset += self._add(features, vring, offset, memory, broken)
        except BaseException:
            self.close()
            raise

    # Returns the bytes that it takes.
    def _add(
        self,
        features: int,
        vring: VringSetup,
        offset: int,
        memory: GuestMap,
        broken: OwnedFd | None,
    ) -> int:
        slots, pool, layout = _plan(features, vring)
        inflight, entries = self._inflight_region(vring)
        kick, call = eventfds = new_eventfd(), new_eventfd()
        iova = self.region.guest_address + offset
        table = memory.table()
        setup = ffi.new(
            "struct vb_shadow_setup *",
            {
                "features": features,
                "descriptor_area": vring.descriptor_area,
                "driver_area": vring.driver_area,
                "device_area": vring.device_area,
                "memory": self._address + offset,
                "iova": iova,
                "inflight": inflight,
                "inflight_size": entries,
                "size": vring.size,
                "base": vring.base or 0,
                "slots": slots,
                "pool": pool,
                "kick": _number(vring.kick),
                "call": _number(vring.call),
                "device_kick": kick.fileno(),
                "device_call": call.fileno(),
                "broken": _number(broken),
            },
        )
        handle = lib.vb_shadow_new(setup, table, len(table))
        if handle == ffi.NULL:
            close_all(eventfds)
            raise Unsupported(
                f"vring {vring.index} can't be shadowed: it is not in guest memory, or its base "
                f"{vring.base or 0:#x} is not in it"
            )
        device = replace(
            vring,
            size=slots,
            descriptor_area=iova,
            driver_area=iova + layout.driver_area,
            device_area=iova + layout.device_area,
            base=0,
            kick=kick,
            call=call,
            err=None,
        )
        self._vrings[vring.index] = _Vring(vring, device, handle, eventfds)
        for _, reason in self.broken_vrings():
            raise PeerError(f"vring {vring.index} can't start: {reason}")
        return int(layout.size)

    # Where the in-flight buffer has a vring, and for how many descriptors.
    def _inflight_region(self, vring: VringSetup) -> tuple[int, int]:
        if self._inflight is None:
            return 0, 0
        return self._inflight.region(vring.index, vring.size, packed=self._packed)

    @property
    def setups(self) -> list[VringSetup]:
        """The device's vrings."""
        return [vring.device for vring in self._vrings.values()]

    @property
    def vrings(self) -> Mapping[int, VringSetup]:
        """The guest's vrings."""
        return MappingProxyType({index: v.guest for index, v in self._vrings.items()})

    def renew(
        self, vrings: Sequence[VringSetup], memory: GuestMap, iova: int, broken: OwnedFd
    ) -> None:
        """After ``stop``, for another device: it gets what is in flight, before anything else.

        Raises:
            Unsupported: these vrings are others than before, or not in ``memory``.
        """
        layouts = {vring.index: vring.layout for vring in vrings}
        if layouts != {index: v.guest.layout for index, v in self._vrings.items()}:
            raise Unsupported("vrings with requests in flight can't change")
        if not self.set_memory(memory):
            raise Unsupported("vrings with requests in flight are not in guest memory any more")
        moved = iova - self.region.guest_address
        self.region = replace(self.region, guest_address=iova)
        for vring in vrings:
            shadow = self._vrings[vring.index]
            areas = ("descriptor_area", "driver_area", "device_area")
            there = {name: getattr(shadow.device, name) + moved for name in areas}
            shadow.device = replace(shadow.device, enabled=vring.enabled, **there)
            self.replace_eventfd(vring.index, vring)
            lib.vb_shadow_renew(shadow.handle, shadow.device.descriptor_area, broken.fileno())

    def prepare(self) -> None:
        """Make the threads, so that ``start`` can't fail. Nothing is relayed yet.

        Raises:
            KernelRefused: there can't be so many.
        """
        self._each(lib.vb_shadow_prepare)

    def start(self) -> None:
        """Relay, beginning with what is available, which the device has when this returns.

        Raises:
            KernelRefused: no thread could be made; nothing is relayed any more.
        """
        self._each(lib.vb_shadow_start)

    def _each(self, begin: Callable[[Any], int]) -> None:
        for vring in self._receiving_first():
            result = begin(vring.handle)
            if result < 0:
                self.stop()
                raise KernelRefused("starting the thread of a shadow vring", -result)

    def hold(self) -> None:
        """Fetch nothing more from the guest."""
        for vring in reversed(self._receiving_first()):
            lib.vb_shadow_hold(vring.handle)

    # A network device drops what it finds no buffer for, be it the answer to a frame that it was
    # just given. In devices with both kinds the vrings with even numbers receive.
    def _receiving_first(self) -> list[_Vring]:
        return sorted(self._vrings.values(), key=lambda v: (v.guest.index % 2, v.guest.index))

    def stop(self) -> None:
        """End the threads, after giving back what the device, which stands still, completed."""
        for vring in self._vrings.values():
            lib.vb_shadow_stop(vring.handle)

    def mute(self) -> None:
        """After ``stop``: nobody is told of a vring that breaks, until ``renew``."""
        for vring in self._vrings.values():
            lib.vb_shadow_mute(vring.handle)

    def settle(self, *, leave: bool = False) -> None:
        """After ``stop``: write down where each vring of the guest goes on.

        With ``leave`` that is behind the requests in flight, which are in the in-flight buffer.

        Raises:
            Unsupported: a vring has requests in flight that later ones overtook.
        """
        handles = {index: vring.handle for index, vring in self._vrings.items()}
        position = lib.vb_shadow_position if leave else lib.vb_shadow_base
        at = {index: position(handle) for index, handle in handles.items()}
        for index, base in at.items():
            if base < 0:
                count = lib.vb_shadow_inflight(handles[index])
                raise Unsupported(
                    f"the device did not complete {count} requests of vring {index}, which later "
                    "ones overtook",
                    "it has to complete what it took before it stops",
                )
        for index, base in at.items():
            vring = self._vrings[index]
            vring.guest = replace(vring.guest, base=base)
            if not leave:
                lib.vb_shadow_unfetch(vring.handle)

    def set_memory(self, memory: GuestMap) -> bool:
        """Use other guest memory from now on; False if a vring is not in it: nothing changed."""
        table = memory.table()
        return all(
            lib.vb_shadow_set_memory(vring.handle, table, len(table)) == 0
            for vring in self._vrings.values()
        )

    def set_log(self, log: DirtyLog | None, used: Mapping[int, int]) -> None:
        """Mark what is written in ``log``; used rings as at the guest addresses of ``used``."""
        for index, vring in self._vrings.items():
            lib.vb_shadow_set_used_log(vring.handle, used.get(index, _NO_LOG))
            if log is None:
                lib.vb_shadow_set_log(vring.handle, ffi.NULL, 0)
            else:
                lib.vb_shadow_set_log(vring.handle, log.pointer, log.size)

    def replace_eventfd(self, index: int, vring: VringSetup) -> None:
        """Use the kick, call and error eventfds of ``vring`` from now on."""
        shadow = self._vrings[index]
        shadow.guest = vring
        lib.vb_shadow_set_kick(shadow.handle, _number(vring.kick))
        lib.vb_shadow_set_call(shadow.handle, _number(vring.call))

    def broken_vrings(self) -> list[tuple[VringSetup, str]]:
        """The guest's vrings that broke, each with the reason."""
        found = []
        for vring in self._vrings.values():
            reason = lib.vb_shadow_broken(vring.handle)
            if reason != ffi.NULL:
                found.append((vring.guest, ffi.string(reason).decode()))
        return found

    def stats(self, index: int) -> ShadowStats:
        """What went through a vring."""
        stats = ffi.new("struct vb_shadow_stats *")
        lib.vb_shadow_stats(self._vrings[index].handle, stats)
        return ShadowStats(stats.requests, stats.bytes, stats.kicks, stats.calls, stats.inflight)

    def close(self) -> None:
        """Release everything; the device must stand still, or not have the vrings any more."""
        for vring in self._vrings.values():
            lib.vb_shadow_free(vring.handle)
            close_all(vring.eventfds)
        self._vrings.clear()
        if self._inflight is not None:
            self._inflight.close()
        if not self.region.fd.closed:
            lib.vb_unmap(self._address, self._size)
            self.region.fd.close()


def _number(fd: OwnedFd | None) -> int:
    return -1 if fd is None else fd.fileno()
