"""Guest memory as a back-end is told of it.

User addresses are ours to choose. They are the guest addresses, in a window that no other memory of
this connection had: DPDK keeps what it has mapped when a table names the addresses that it knows,
although another front-end's memory is meant.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from vhostbridge.backends.errors import BridgeError, PeerError, Unsupported
from vhostbridge.backends.guest import MemoryRegion

from .client import Client
from .messages import ProtocolFeature, Request
from .payloads import MemReg, MemTable, Region

# Guest addresses above this stay as they are. Windows come again after so many.
_WINDOW = 1 << 47
_WINDOWS = 1 << 15

Key = tuple[int, int, int, int, int]


class BackendMemory:
    """What one back-end has mapped of guest memory. ``fail`` is told when that is unknown."""

    def __init__(
        self, client: Client, target: str, region_max: int, fail: Callable[[str], None]
    ) -> None:
        self._client = client
        self._target = target
        self._region_max = region_max
        self._fail = fail
        self._regions: dict[Key, MemoryRegion] = {}
        self._windows: dict[Key, int] = {}
        self._next = 0

    @property
    def regions(self) -> Collection[MemoryRegion]:
        """Those that the back-end has."""
        return self._regions.values()

    def user_address(self, guest_address: int) -> int:
        """Where the back-end was told that this guest address is; itself outside guest memory."""
        for key, region in self._regions.items():
            if region.guest_address <= guest_address < region.end:
                return guest_address + self._windows[key]
        return guest_address

    async def change(self, regions: Sequence[MemoryRegion]) -> None:
        """Let the back-end have exactly these regions; when it refuses, it has those before.

        Raises:
            Unsupported: they are more than it takes.
            BridgeError: it refused them, or is gone.
        """
        wanted = {region.key: region for region in regions}
        if len(wanted) > self._region_max:
            raise Unsupported(
                f"back-end {self._target} takes {self._region_max} memory regions, "
                f"the guest has {len(wanted)}"
            )
        if wanted.keys() != self._regions.keys():
            await self._tell(wanted)
        # Descriptors may be new ones for the same memory: the caller keeps only those alive.
        self._regions = wanted

    async def _tell(self, wanted: dict[Key, MemoryRegion]) -> None:
        before = self._windows
        # A window for what is new: one for each region, or two that touch would seem to be one.
        self._windows = dict(before)
        for key in wanted.keys() - before.keys():
            high = wanted[key].end > _WINDOW
            self._windows[key] = 0 if high else self._next % _WINDOWS * _WINDOW
            self._next += 1
        try:
            if ProtocolFeature.CONFIGURE_MEM_SLOTS in self._client.protocol:
                await self._change_slots(wanted)
            elif wanted:
                await self._client.request(
                    Request.SET_MEM_TABLE,
                    MemTable(tuple(self._wire(r) for r in wanted.values())),
                    [r.fd for r in wanted.values()],
                )
            await self.barrier()
        except BaseException:
            self._windows = before
            raise
        self._windows = {key: self._windows[key] for key in wanted}

    def _wire(self, region: MemoryRegion) -> Region:
        user = region.guest_address + self._windows[region.key]
        return Region(region.guest_address, region.size, user, region.offset)

    async def barrier(self) -> None:
        """Wait until the back-end is done with all that it was told.

        Without acknowledgements it may still be at the memory that we told it to drop; the answer
        to any question comes after that.
        """
        if ProtocolFeature.REPLY_ACK not in self._client.protocol:
            await self._client.request(Request.GET_FEATURES)

    # What was there before is put back when the back-end refuses a step.
    async def _change_slots(self, wanted: dict[Key, MemoryRegion]) -> None:
        before = dict(self._regions)
        try:
            await self._go_to_slots(wanted)
        except PeerError as refusal:
            try:
                await self._go_to_slots(before)
            except BridgeError:
                self._fail(f"guest memory is neither the old nor the new one: {refusal}")
            raise

    async def _go_to_slots(self, wanted: dict[Key, MemoryRegion]) -> None:
        request = self._client.request
        for key in [key for key in self._regions if key not in wanted]:
            await request(Request.REM_MEM_REG, MemReg(self._wire(self._regions[key])))
            del self._regions[key]
        for key, region in wanted.items():
            if key not in self._regions:
                await request(Request.ADD_MEM_REG, MemReg(self._wire(region)), [region.fd])
                self._regions[key] = region
