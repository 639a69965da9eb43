"""The configuration space of a back-end's device."""

from __future__ import annotations

from vhostbridge.backends.errors import PeerError, Unsupported

from .client import Client
from .messages import ProtocolFeature, Request
from .payloads import Config


class BackendConfig:
    """What GET_CONFIG and SET_CONFIG reach; ``target`` is the back-end's name in errors."""

    def __init__(self, client: Client, target: str) -> None:
        self._client = client
        self._target = target
        # How many bytes are known to be there.
        self._size = 0

    async def read(self, offset: int, size: int) -> bytes:
        """Part of it, in bytes.

        Raises:
            Unsupported: the back-end has none.
            PeerError: it answered another number of bytes.
        """
        self._check("read")
        # From the beginning, as QEMU does: libvhost-user and DPDK overlook the offset.
        wanted = offset + size
        reply = await self._client.request(Request.GET_CONFIG, Config(0, 0, bytes(wanted)))
        assert isinstance(reply, Config)
        if len(reply.data) != wanted:
            raise PeerError(
                f"back-end {self._target} answered {len(reply.data)} configuration bytes, "
                f"{wanted} were asked"
            )
        self._size = max(self._size, wanted)
        return reply.data[offset:]

    async def known(self) -> bytes:
        """What was read of it so far: a back-end does not say how much there is.

        Raises:
            BridgeError: as of ``read``.
        """
        return await self.read(0, self._size) if self._size else b""

    async def write(self, offset: int, data: bytes, flags: int) -> None:
        """Change part of it.

        Raises:
            Unsupported: the back-end has none.
            PeerError: it refused.
        """
        self._check("write")
        await self._client.request(Request.SET_CONFIG, Config(offset, flags, data))

    def _check(self, what: str) -> None:
        if ProtocolFeature.CONFIG not in self._client.protocol:
            raise Unsupported(f"back-end {self._target} has no configuration space to {what}")
