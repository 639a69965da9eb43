"""The device's side of a control vring that the guest has: its commands as bytes, one at a time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vhostbridge.backends.errors import PeerError, Unsupported
from vhostbridge.backends.guest import MemoryRegion, VringSetup
from vhostbridge.native import ffi, lib

from .command_ring import COMMAND_MAX, REPLY_MAX
from .shadow_rings import GuestMap


class GuestCommands:
    """A control vring in guest memory. Blocking; one thread at a time."""

    def __init__(self, features: int, vring: VringSetup, memory: GuestMap) -> None:
        """``vring`` has a base; ``memory`` stays mapped as long as this is used.

        Raises:
            Unsupported: it does not lie in guest memory, or its base in it.
        """
        table = memory.table()
        setup = ffi.new(
            "struct vb_shadow_setup *",
            {
                "features": features,
                "descriptor_area": vring.descriptor_area,
                "driver_area": vring.driver_area,
                "device_area": vring.device_area,
                "size": vring.size,
                "base": vring.base or 0,
            },
        )
        self._index = vring.index
        self._handle = lib.vb_requests_new(setup, table, len(table))
        if self._handle == ffi.NULL:
            raise Unsupported(
                f"control vring {vring.index} is not in guest memory, or its base "
                f"{vring.base or 0:#x} is not in it"
            )
        self._bytes = ffi.new(f"uint8_t[{COMMAND_MAX + 1}]")
        self._room = ffi.new("uint32_t *")

    def fetch(self) -> tuple[bytes, int] | None:
        """The next command and how many bytes its reply may have; ``None``: a kick will tell.

        One that is too long to be any comes with more than ``COMMAND_MAX`` bytes.

        Raises:
            PeerError: the guest broke the rules of the vring, which is used no more.
        """
        result = lib.vb_requests_fetch(self._handle, self._bytes, COMMAND_MAX + 1, self._room)
        self._check()
        if result < 0:
            return None
        length = min(result, COMMAND_MAX + 1)
        return bytes(ffi.buffer(self._bytes, length)), min(self._room[0], REPLY_MAX)

    def ask_for_kicks(self) -> None:
        """Have the driver notify whoever has the vring next."""
        lib.vb_requests_ask_for_kicks(self._handle)

    def give(self, reply: bytes) -> bool:
        """Answer the command that was fetched; whether the guest wants to be called for it.

        Raises:
            PeerError: as ``fetch`` does.
        """
        result = lib.vb_requests_give(self._handle, reply, len(reply))
        self._check()
        return bool(result > 0)

    def _check(self) -> None:
        reason = lib.vb_requests_broken(self._handle)
        if reason != ffi.NULL:
            raise PeerError(f"vring {self._index} stopped: {ffi.string(reason).decode()}")

    @property
    def base(self) -> int:
        """Where another one goes on: behind the last command that was answered."""
        return int(lib.vb_requests_base(self._handle))

    def close(self) -> None:
        lib.vb_requests_free(self._handle)
        self._handle = ffi.NULL


def ask_for_kicks(
    features: int, vrings: Iterable[VringSetup], regions: Sequence[MemoryRegion]
) -> None:
    """Have the driver kick the device that is to start, in vrings that none runs.

    One that polls, as DPDK's, tells the driver not to; not every device tells it otherwise.

    Raises:
        BridgeError: the vrings or their bases are not in guest memory.
    """
    memory = GuestMap()
    try:
        memory.update(regions)
        for vring in vrings:
            ring = GuestCommands(features, vring, memory)
            try:
                ring.ask_for_kicks()
            finally:
                ring.close()
    finally:
        memory.close()
