"""What a back-end is told about a vring."""

from __future__ import annotations

from collections.abc import Mapping

from vhostbridge.backends.fds import OwnedFd
from vhostbridge.backends.guest import VringSetup

from .client import Client
from .memory import BackendMemory
from .messages import Request
from .payloads import LOG_USED, VringAddr, VringFd, VringState


class VringMessages:
    """A vring's set-up, and changes of it.

    Args:
        enables: whether there is SET_VRING_ENABLE, which comes with protocol features.
    """

    def __init__(self, client: Client, memory: BackendMemory, *, enables: bool) -> None:
        self._client = client
        self._memory = memory
        self._enables = enables
        #: Where writes to used rings are to be logged, by vring, as guest addresses.
        self.used_logs: Mapping[int, int] = {}

    async def set_up(self, vring: VringSetup, *, packed: bool) -> None:
        """Everything but its kick.

        Back-ends start a ring when its kick arrives, qemu-storage-daemon even one that is disabled.
        So the kick is last: before it nothing was taken, and another device can go on instead. The
        call is first: VPP has no third vring, or a later one, before it was given a call.
        """
        index = vring.index
        await self.call(index, vring.call)
        await self._client.request(Request.SET_VRING_NUM, VringState(index, vring.size))
        # With the addresses VPP takes a used index from memory, where packed vrings have none.
        if packed:
            await self.addresses(vring)
        await self._client.request(Request.SET_VRING_BASE, VringState(index, vring.base or 0))
        if not packed:
            await self.addresses(vring)
        if vring.err is not None:
            await self.err(index, vring.err)
        if self._enables:
            await self.enable(index, vring.enabled)

    async def addresses(self, vring: VringSetup) -> None:
        """Where it lies, and where writes to its used ring are to be logged."""
        user = self._memory.user_address
        log = self.used_logs.get(vring.index)
        address = VringAddr(
            vring.index,
            0 if log is None else LOG_USED,
            user(vring.descriptor_area),
            user(vring.device_area),
            user(vring.driver_area),
            log or 0,
        )
        await self._client.request(Request.SET_VRING_ADDR, address)

    async def enable(self, index: int, enabled: bool) -> None:
        await self._client.request(Request.SET_VRING_ENABLE, VringState(index, int(enabled)))

    async def kick(self, index: int, fd: OwnedFd | None) -> None:
        await self._send_fd(Request.SET_VRING_KICK, index, fd)

    async def call(self, index: int, fd: OwnedFd | None) -> None:
        await self._send_fd(Request.SET_VRING_CALL, index, fd)

    async def err(self, index: int, fd: OwnedFd | None) -> None:
        await self._send_fd(Request.SET_VRING_ERR, index, fd)

    async def _send_fd(self, request: Request, index: int, fd: OwnedFd | None) -> None:
        fds = [] if fd is None else [fd]
        await self._client.request(request, VringFd(index, fd is not None), fds)
