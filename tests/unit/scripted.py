"""A vhost-user back-end that answers by a script: well by itself, and badly where it is told."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from tests.unit.fakes import DEVICE_FEATURES, PROTOCOL_FEATURES, Frame, RawPeer, frame, state, u64
from vhostbridge.backends.vhostuser.connect import adopt_vhost_user
from vhostbridge.backends.vhostuser.device import VhostUserDevice
from vhostbridge.backends.vhostuser.messages import ProtocolFeature, Request

PF = ProtocolFeature
#: What the script offers unless told otherwise.
OFFER = PF.MQ | PF.REPLY_ACK | PF.BACKEND_REQ | PF.CONFIG | PF.CONFIGURE_MEM_SLOTS | PF.STATUS

#: A whole answer on the wire; ``None`` for none.
Answer = Callable[[Frame], bytes | None]


class Backend:
    """Serves one connection. ``answers`` overrides what it says to a request.

    ``frames`` is everything it was asked; descriptors are kept until ``close``.
    """

    def __init__(self, sock: socket.socket, offer: ProtocolFeature = OFFER) -> None:
        self.peer = RawPeer(sock)
        self.offer = offer
        self.frames: list[Frame] = []
        self.answers: dict[Request, Answer] = {}
        self.bases: dict[int, int] = {}
        self.status = 0
        self.reverse: RawPeer | None = None
        self._held: list[int] = []

    @property
    def names(self) -> list[str]:
        return [Request(f.request).name for f in self.frames]

    def take(self) -> list[Frame]:
        frames, self.frames = self.frames, []
        return frames

    async def serve(self) -> None:
        try:
            while (got := await self.peer.receive()) is not None:
                self.frames.append(got)
                if got.request == Request.SET_BACKEND_REQ_FD:
                    self.reverse = RawPeer(socket.socket(fileno=got.fds[0]))
                else:
                    self._held += got.fds
                answer = self.answers.get(Request(got.request), self._honest)(got)
                if answer is not None:
                    await self.peer.send(answer)
        except (OSError, trio.ClosedResourceError):
            pass

    def _honest(self, got: Frame) -> bytes | None:
        numbers = {
            Request.GET_FEATURES: DEVICE_FEATURES | PROTOCOL_FEATURES,
            Request.GET_PROTOCOL_FEATURES: int(self.offer),
            Request.GET_QUEUE_NUM: 4,
            Request.GET_MAX_MEM_SLOTS: 32,
            Request.GET_STATUS: self.status,
        }
        request = Request(got.request)
        if request is Request.SET_STATUS:
            self.status = got.u64
        if request in numbers:
            return frame(request, u64(numbers[request]), 5)
        if request is Request.GET_VRING_BASE:
            index = struct.unpack("=II", got.payload)[0]
            return frame(request, state(index, self.bases.get(index, 0)), 5)
        if request is Request.GET_CONFIG:
            return frame(request, got.payload, 5)
        return frame(request, u64(0), 5) if got.flags & 8 else None

    def close(self) -> None:
        self.peer.close()
        if self.reverse is not None:
            self.reverse.close()
        for fd in self._held:
            os.close(fd)
        self._held.clear()


def refuse(got: Frame) -> bytes:
    """An answer: no."""
    return frame(got.request, u64(1), 5)


@asynccontextmanager
async def connected(
    offer: ProtocolFeature = OFFER,
) -> AsyncIterator[tuple[VhostUserDevice, Backend]]:
    """A device of ours, connected to a scripted back-end whose handshake frames are gone."""
    ours, theirs = socket.socketpair()
    backend = Backend(theirs, offer)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(backend.serve)
            async with adopt_vhost_user("fake", ours.detach()) as device:
                backend.take()
                yield device, backend
            nursery.cancel_scope.cancel()
    finally:
        backend.close()
