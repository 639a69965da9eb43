"""Waiting until a device without SUSPEND has finished the requests that it fetched."""

from __future__ import annotations

import errno
import time
from collections.abc import Collection, Iterable

from vhostbridge.backends.errors import KernelRefused, Unsupported
from vhostbridge.backends.guest import MemoryRegion, VringSetup
from vhostbridge.backends.ring_memory import available_index, used_index
from vhostbridge.backends.virtio import TransportFeature

from .chardev import Chardev

# How long a device may take to finish what it has fetched, in seconds.
DRAIN_SECONDS = 5.0
# How long it may take to look at a vring that it was kicked for, in seconds.
SETTLE_SECONDS = 0.01


def check_drainable(target: str, features: int) -> None:
    """Refuse a device whose vrings would have no position after a reset.

    Raises:
        Unsupported: they are packed.
    """
    if features & TransportFeature.RING_PACKED.mask:
        raise Unsupported(
            f"{target} can't be stopped: it has no SUSPEND, and a packed ring's position can't be "
            "read from memory",
            "use split rings (packed=off) with this device",
        )


def wait_drained(
    device: Chardev, target: str, regions: Collection[MemoryRegion], vrings: Iterable[VringSetup]
) -> None:
    """Wait for split vrings that are not kicked any more. Blocking.

    A request is done once it is used. One whose kick was just delivered may not even be fetched;
    one that the driver has not kicked for yet never will be: so a position short of what was
    available counts only when it has not moved for a while. vp_vdpa tells no positions: all that is
    available has to be done.

    Raises:
        Unsupported: requests take too long.
    """
    deadline = time.monotonic() + DRAIN_SECONDS
    for vring in vrings:
        available = available_index(regions, vring)
        last, since = -1, 0.0
        while True:
            base, now = _position(device, vring.index), time.monotonic()
            if base is None:
                base = available = available_index(regions, vring)
            if base != last:
                last, since = base, now
            if base == used_index(regions, vring) and (
                base == available or now > since + SETTLE_SECONDS
            ):
                break
            if now > deadline:
                raise Unsupported(
                    f"{target} can't be stopped: vring {vring.index} did not finish its "
                    f"requests in {DRAIN_SECONDS:g} s"
                )
            time.sleep(0.001)


def _position(device: Chardev, index: int) -> int | None:
    try:
        return device.vring_base(index)
    except KernelRefused as error:
        if error.errno == errno.EOPNOTSUPP:
            return None
        raise
