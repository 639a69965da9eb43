"""Addresses for memory of the bridge's own, which the device reaches beside the guest's."""

from __future__ import annotations

from collections.abc import Iterable

from vhostbridge.backends.device import DeviceInfo
from vhostbridge.backends.errors import Unsupported
from vhostbridge.backends.guest import MemoryRegion

#: Such memory lies as high as the device reaches, but below this: guests have no memory there, and
#: front-ends whose guest addresses are their own user addresses have theirs above.
CEILING = 1 << 46

_ALIGN = 0x1_0000


def free_window(info: DeviceInfo, regions: Iterable[MemoryRegion], size: int, ceiling: int) -> int:
    """The highest place below ``ceiling`` that has ``size`` bytes and overlaps no region.

    Raises:
        Unsupported: there is none that the device reaches.
    """
    end = min(info.iova_last + 1, ceiling) // _ALIGN * _ALIGN
    for region in sorted(regions, key=lambda r: -r.guest_address):
        if region.guest_address < end and region.end > end - size:
            end = region.guest_address // _ALIGN * _ALIGN
    if end - size < info.iova_first:
        raise Unsupported(
            f"{info.target} has no addresses left for shadow vrings beside guest memory"
        )
    return (end - size) // _ALIGN * _ALIGN
