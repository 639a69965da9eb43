"""Where a back-end notes what is in flight: the front-end's buffer, or one for us alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vhostbridge.backends.errors import PeerError
from vhostbridge.backends.fds import OwnedFd, close_all
from vhostbridge.backends.guest import VringSetup
from vhostbridge.backends.inflight import InflightBuffer

from .client import Client
from .messages import ProtocolFeature, Request
from .payloads import Inflight, VringFd


class BackendInflight:
    """The in-flight buffer of one back-end, if it negotiated INFLIGHT_SHMFD."""

    def __init__(self, client: Client, target: str, queue_num: int) -> None:
        self._client = client
        self._target = target
        self._queue_num = queue_num
        #: The front-end's; borrowed.
        self.given: InflightBuffer | None = None
        self._own: InflightBuffer | None = None

    @property
    def offered(self) -> bool:
        """Whether the back-end notes what is in flight."""
        return ProtocolFeature.INFLIGHT_SHMFD in self._client.protocol

    async def make(self, queues: int, queue_size: int) -> InflightBuffer:
        """A new buffer, made by the back-end; the caller's.

        Raises:
            PeerError: it gave none, or one that can't be.
        """
        wanted = Inflight(0, 0, queues, queue_size)
        place, fds = await self._client.exchange(Request.GET_INFLIGHT_FD, wanted, [])
        assert isinstance(place, Inflight)
        try:
            if not fds:
                raise PeerError(f"back-end {self._target} gave no in-flight buffer")
            return InflightBuffer(fds[0], place.mmap_offset, place.mmap_size, queues, queue_size)
        except PeerError:
            close_all(fds)
            raise

    async def give(self, vrings: Sequence[VringSetup], deaf: OwnedFd) -> None:
        """Tell the back-end which buffer it is, before the first of ``vrings`` starts.

        libvhost-user starts no vring without one where the feature was negotiated. DPDK and SPDK
        give those vrings a place in it that they have been told of. So they are given the call
        ``deaf`` until they start, as QEMU does when it connects.
        """
        if not self.offered or not vrings:
            return
        buffer = self.given
        indices: Iterable[int] = [v.index for v in vrings]
        if buffer is None:
            queues = max(self._queue_num, *(index + 1 for index in indices))
            buffer = await self.make(queues, max(v.size for v in vrings))
            self.close()
            self._own = buffer
        else:
            indices = range(min(buffer.queues, max(self._queue_num, *(i + 1 for i in indices))))
        for index in indices:
            await self._client.request(Request.SET_VRING_CALL, VringFd(index, True), [deaf])
        place = Inflight(buffer.size, buffer.offset, buffer.queues, buffer.queue_size)
        await self._client.request(Request.SET_INFLIGHT_FD, place, [buffer.fd])

    def close(self) -> None:
        """Give up the buffer that is ours alone."""
        if self._own is not None:
            self._own.close()
