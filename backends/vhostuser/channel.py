"""A vhost-user socket over trio: whole messages in, whole messages out, no descriptor lost."""

from __future__ import annotations

import array
import errno
import os
import socket
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import IntEnum

import trio

from vhostbridge.backends.errors import PeerError, TransportLost
from vhostbridge.backends.fds import OwnedFd, close_all
from vhostbridge.backends.foreign_fds import ForeignFd
from vhostbridge.backends.trace import OFF, Tracer

from .codec import Decoder, Message, encode_reply, encode_request
from .payloads import Empty, Payload
from .specs import Spec
from .tracing import Lane, received, sent

# Room for as many descriptors as the kernel passes on at once. What doesn't fit it would close
# itself, in our thread, and that may wait.
_ANCILLARY = socket.CMSG_SPACE(253 * array.array("i").itemsize)

# Peers may have our sockets' open files too, and make them blocking: each call says that it
# doesn't wait.
_RECEIVE = socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
_SEND = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL

#: How long a peer may take to make room for a reply, in seconds. It waits for that reply.
PATIENCE = 5.0


class Channel:
    """One connected socket. One task receives; senders may be several.

    Args:
        sock: a connected ``AF_UNIX`` ``SOCK_STREAM`` socket; the channel owns it.
        specs: whose requests travel here, ``FRONTEND_SPECS`` or ``BACKEND_SPECS``.
        replies: whether this end receives replies (it sends the requests).
        peer: what errors call the other side.
        trace: what is told of every message.
    """

    def __init__(
        self,
        sock: trio.socket.SocketType,
        specs: Mapping[int, Spec],
        *,
        replies: bool,
        peer: str,
        trace: Tracer = OFF,
    ) -> None:
        self._sock = sock
        self._peer = peer
        self.trace = trace
        self._lane = Lane(peer, specs, replies)
        self._decoder = Decoder(specs, replies=replies, peer=peer)
        self._sending = trio.Lock()
        self._broken = False

    def fileno(self) -> int:
        return self._sock.fileno()

    @property
    def at_boundary(self) -> bool:
        """Whether nothing was received, or sent, of a message that is not whole yet."""
        return self._decoder.at_boundary and not self._broken and not self._sending.locked()

    @property
    def peer_pid(self) -> int:
        """The process at the other end when it connected; 0 where the kernel can't tell."""
        size = struct.calcsize("3i")
        credentials = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
        return int(struct.unpack("3i", credentials)[0])

    async def receive(self) -> Message | None:
        """The next message, or ``None`` when the peer closed the socket between messages.

        Cancelled, it leaves the stream as it was: there is no checkpoint between the system call
        and the decoder.

        Raises:
            PeerError: the peer broke the protocol.
            TransportLost: the connection broke, or ended inside a message.
        """
        while True:
            with self._translate_errors():
                data, ancillary, flags, _ = await self._sock.recvmsg(
                    self._decoder.bytes_desired(), _ANCILLARY, _RECEIVE
                )
            fds = _descriptors(ancillary)
            if flags & socket.MSG_CTRUNC:
                close_all(fds)
                raise PeerError(f"the {self._peer} sent more file descriptors than fit")
            if not data:
                close_all(fds)
                if self._decoder.at_boundary:
                    return None
                raise TransportLost(f"the {self._peer} went away in the middle of a message")
            message = self._decoder.receive(data, fds)
            if message is not None:
                if self.trace.on:
                    seen = (message.request, message.payload, len(message.fds), message.need_reply)
                    self.trace.record(received, self._lane, *seen)
                return message

    async def send_request(
        self,
        request: IntEnum,
        payload: Payload | None = None,
        fds: Sequence[OwnedFd] = (),
        *,
        need_reply: bool = False,
    ) -> None:
        """Send a request; the caller keeps ``fds``."""
        data = encode_request(request, payload or Empty(), need_reply=need_reply)
        await self._send(data, fds)

    async def send_run(self, run: bytes, last: bytes, fds: Sequence[OwnedFd]) -> None:
        """Send encoded requests in one piece, and one with descriptors right behind them.

        A peer that takes longer for ``run`` than we for one system call finds ``last`` there when
        it is done with it, and does nothing else in between.
        """
        numbers = array.array("i", [fd.fileno() for fd in fds])
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)]
        async with self._sending:
            if self._broken:
                raise TransportLost(f"the connection to the {self._peer} broke in a message")
            with self._translate_errors(), socket.socket(fileno=os.dup(self.fileno())) as sock:
                # The socket has room: nothing is under way.
                self._broken = True
                self._tell(run)
                self._tell(last, len(fds))
                with _undisturbed():
                    sock.sendmsg([run])
                    sock.sendmsg([last], ancillary)
                self._broken = False

    async def send_reply(self, request: int, payload: Payload, fds: Sequence[OwnedFd] = ()) -> None:
        """Send a reply in one piece; the caller keeps ``fds``.

        Raises:
            TransportLost: the connection broke, or the peer takes no replies.
        """
        with trio.move_on_after(PATIENCE) as scope:
            await self._send(encode_reply(request, payload), fds)
        if scope.cancelled_caught:
            raise TransportLost(f"the {self._peer} did not take a reply for {PATIENCE:g} s")

    # A message that went out in part, and can't be finished, leaves the stream without framing.
    async def _send(self, data: bytes, fds: Sequence[OwnedFd]) -> None:
        numbers = array.array("i", [fd.fileno() for fd in fds])
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)] if fds else []
        async with self._sending:
            if self._broken:
                raise TransportLost(f"the connection to the {self._peer} broke in a message")
            with self._translate_errors():
                # Before it is sent: the answer may be there before this task goes on.
                self._tell(data, len(fds))
                count = await self._sock.sendmsg([data], ancillary, _SEND)
                self._broken = count < len(data)
                while count < len(data):
                    count += await self._sock.send(data[count:], _SEND)
                self._broken = False

    def _tell(self, data: bytes, fds: int = 0) -> None:
        if self.trace.on:
            self.trace.record(sent, self._lane, data, fds)

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = os.strerror(error.errno or errno.EPIPE)
            raise TransportLost(f"lost the {self._peer}: {reason}") from error
        except trio.ClosedResourceError:
            raise TransportLost(f"the connection to the {self._peer} was closed") from None

    def close(self) -> None:
        self._sock.close()
        self._decoder.close()


# The peer that wakes up does not get our processor, where we are allowed to say so.
@contextmanager
def _undisturbed() -> Iterator[None]:
    usual = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    except PermissionError:
        yield
        return
    try:
        yield
    finally:
        os.sched_setscheduler(0, *usual)


def _descriptors(ancillary: Sequence[tuple[int, int, bytes]]) -> list[ForeignFd]:
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return [ForeignFd(fd) for fd in fds]
