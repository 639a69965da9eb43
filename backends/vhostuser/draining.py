"""Waiting until a back-end that has stopped a vring is done with the vring's requests."""

from __future__ import annotations

from collections.abc import Collection

import trio

from vhostbridge.backends.errors import Unsupported
from vhostbridge.backends.guest import MemoryRegion, VringSetup
from vhostbridge.backends.ring_memory import used_index

from .client import Client
from .messages import Request

# How long requests may still take once their back-end was told to stop, in seconds.
DRAIN_SECONDS = 5.0
# It is asked this often whether it is still there meanwhile, in seconds.
PROBE = 0.1


async def drained(
    client: Client, target: str, regions: Collection[MemoryRegion], vring: VringSetup, base: int
) -> None:
    """Wait until a split vring that stopped at ``base`` has used all before it.

    A back-end has to complete a ring's requests before it answers GET_VRING_BASE, but
    qemu-storage-daemon (10.0) answers first: it writes to guest memory for as long as they take.

    Raises:
        Unsupported: they take too long.
        BridgeError: the back-end is gone.
    """
    deadline = trio.current_time() + DRAIN_SECONDS
    used = used_index(regions, vring)
    while used != base:
        if trio.current_time() > deadline:
            raise Unsupported(
                f"{target} can't be stopped: vring {vring.index} has "
                f"{(base - used) & 0xFFFF} requests that did not finish in {DRAIN_SECONDS:g} s"
            )
        # A back-end that broke hangs up at the next message.
        with trio.move_on_after(PROBE):
            while (used := used_index(regions, vring)) != base:  # noqa: ASYNC110
                await trio.sleep(0.0002)
        if used != base:
            await client.request(Request.GET_FEATURES)
