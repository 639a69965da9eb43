"""Where a device that is gone had come to: what guest memory says of it."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace

from vhostbridge.backends.device import Device
from vhostbridge.backends.errors import PeerError
from vhostbridge.backends.guest import MemoryRegion
from vhostbridge.backends.ring_memory import available_index, read_u16, used_index
from vhostbridge.backends.state import DeviceState
from vhostbridge.backends.virtio import TransportFeature


def last_state(
    device: Device, running: Collection[int], regions: Iterable[MemoryRegion]
) -> DeviceState | None:
    """The state from which another device goes on; ``None`` if nothing tells it for certain.

    The indices in memory tell it when all requests are complete, or are completed in order. What
    else the device had taken, out of order, only it knew; as it did state of its own.
    """
    packed = device.features & TransportFeature.RING_PACKED.mask
    if device.internal_owner is not None or (packed and running):
        return None
    in_order = device.features & TransportFeature.IN_ORDER.mask
    state = device.state_of(b"")
    at = {}
    for index in running:
        vring = device.vrings[index]
        try:
            at[index] = used_index(regions, vring)
            ordered = in_order or index == device.control_vring
            if not ordered and at[index] != available_index(regions, vring):
                return None
        except PeerError:
            return None
    vrings = tuple(replace(v, base=at.get(v.index, v.base)) for v in state.vrings)
    return replace(state, vrings=vrings)


def moved_on(state: DeviceState, regions: Iterable[MemoryRegion]) -> DeviceState | None:
    """The state brought up to date with guest memory; ``None`` if that can't be for certain.

    A device that hung may have worked on before its end. What it completed since is told by the
    used ring, and it is known to have taken nothing else if those are the next requests in order
    of being available, as a set.
    """
    if state.features & TransportFeature.RING_PACKED.mask or state.internal_owner is not None:
        return state
    regions = list(regions)
    vrings = []
    try:
        for vring in state.vrings:
            used = read_u16(regions, vring.device_area + 2)
            count = (used - vring.base) & 0xFFFF
            places = [(vring.base + n) % vring.size for n in range(min(count, vring.size))]
            offered = sorted(read_u16(regions, vring.driver_area + 4 + 2 * at) for at in places)
            done = sorted(read_u16(regions, vring.device_area + 4 + 8 * at) for at in places)
            if count > vring.size or offered != done:
                return None
            vrings.append(replace(vring, base=used))
    except PeerError:
        return None
    return replace(state, vrings=tuple(vrings))
