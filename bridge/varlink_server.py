"""A varlink server on a UNIX socket, for root and this process's own user.

A client is not trusted with the daemon's well-being: what it may hold of memory, descriptors,
connections and time is limited, and its faults cost it its own connection only.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass

import trio

from vhostbridge.backends.fds import close_all
from vhostbridge.backends.vhostuser.sockets import EXHAUSTED

from .journald import working_for
from .varlink import (
    ANCILLARY,
    Call,
    Frame,
    Framer,
    Reply,
    Service,
    Values,
    VarlinkError,
    WireError,
    close_frames,
    decode_call,
    received_fds,
)

_log = logging.getLogger("vhostbridge.control")

#: Connections at a time; one more ends the one that has been idle for longest.
CONNECTIONS = 32
#: Calls of a connection that may wait while one is answered.
PIPELINED = 2
#: A client that does not take its reply for so long is cut off, in seconds.
PATIENCE = 10.0
#: Progress is told at most this often, in seconds.
INTERVAL = 0.1


@dataclass(frozen=True, slots=True)
class Peer:
    """The process that connected."""

    pid: int
    uid: int

    def __str__(self) -> str:
        return f"pid {self.pid}, uid {self.uid}"

    @property
    def allowed(self) -> bool:
        return self.uid in (0, os.geteuid())


def peer_of(sock: trio.socket.SocketType) -> Peer:
    """Who connected, as the kernel tells."""
    size = struct.calcsize("3i")
    pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return Peer(pid, uid)


class _Answering:
    """A call while it is answered."""

    def __init__(self, call: Call, peer: Peer, tell: Callable[[Values], Awaitable[None]]) -> None:
        self.call = call
        self.asked_by = str(peer)
        self._tell = tell
        self.latest: Values = {}
        self.news = trio.Event()
        self.done = trio.Event()

    def progress(self, parameters: Values) -> None:
        if self.call.more and not self.call.oneway:
            self.latest = parameters
            self.news.set()

    async def tell(self, parameters: Values) -> None:
        if not self.call.oneway:
            await self._tell(parameters)

    def finish(self) -> None:
        self.done.set()
        self.news.set()


class Connection:
    """One client. Its calls are answered one after the other.

    A client that goes away while it is answered has what it asked for cancelled, unless it said
    ``oneway``. One that only ends its own sending (``shutdown``) still gets its answers.
    """

    def __init__(self, sock: trio.socket.SocketType, service: Service, peer: Peer) -> None:
        self._sock = sock
        self._service = service
        self._peer = peer
        self._framer = Framer()
        self._waiting: list[Frame] = []
        self._gone = False
        self._scope = trio.CancelScope()
        self._current: tuple[Call, trio.CancelScope] | None = None
        #: When the last call was answered.
        self.idle_since = trio.current_time()

    @property
    def busy(self) -> bool:
        return self._current is not None

    def cut(self, why: str) -> None:
        """End the connection, and what it waits for."""
        _log.warning("control client (%s) cut off: it %s", self._peer, why)
        self._scope.cancel()

    async def run(self) -> None:
        """Serve until the client goes away or is cut off; everything it sent is closed then."""
        incoming, calls = trio.open_memory_channel[Frame](PIPELINED)
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._watch)
                    nursery.start_soon(self._read, incoming)
                    async for frame in calls:
                        await self._take(frame)
                    nursery.cancel_scope.cancel()
        finally:
            close_frames(self._waiting)
            with suppress(trio.WouldBlock, trio.EndOfChannel):
                while True:
                    close_all(calls.receive_nowait().fds)
            calls.close()
            self._framer.close()
            self._sock.close()

    # The end of both directions, which a client that only ends its own sending is far from; and
    # which shows although calls are waiting to be read.
    async def _watch(self) -> None:
        with select.epoll() as hang_up:
            hang_up.register(self._sock.fileno(), 0)
            await trio.lowlevel.wait_readable(hang_up.fileno())
        self._gone = True
        if self._current is not None and not self._current[0].oneway:
            self._current[1].cancel()

    async def _read(self, incoming: trio.MemorySendChannel[Frame]) -> None:
        with incoming:
            while await self._receive():
                while self._waiting:
                    await incoming.send(self._waiting[0])
                    del self._waiting[0]

    # False at the end of what the client sends.
    async def _receive(self) -> bool:
        try:
            data, ancillary, flags, _ = await self._sock.recvmsg(
                65536, ANCILLARY, socket.MSG_CMSG_CLOEXEC
            )
            self._waiting = self._framer.feed(data, received_fds(ancillary, flags))
        except OSError:
            return False
        except WireError as error:
            self.cut(error.message)
            return False
        return bool(data)

    async def _take(self, frame: Frame) -> None:
        try:
            call = decode_call(frame)
            if self._gone and not call.oneway:
                return
            with trio.CancelScope() as scope:
                self._current = call, scope
                reply = await self._answer(_Answering(call, self._peer, self._tell))
                if not call.oneway:
                    await self._send(reply.encode())
        except WireError as error:
            self.cut(error.message)
        finally:
            close_all(frame.fds)
            self._current = None
            working_for.set("")
            self.idle_since = trio.current_time()

    async def _answer(self, answering: _Answering) -> Reply:
        call = answering.call
        try:
            method = self._service.find(call)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._tell_progress, answering)
                try:
                    result: Values | VarlinkError = await method.run(answering)
                except VarlinkError as error:
                    result = error
                finally:
                    answering.finish()
        except VarlinkError as error:
            result = error
        if isinstance(result, VarlinkError):
            return Reply(result.parameters, result.name)
        return Reply(result)

    # The latest state, when the client has room for it: it never waits, so a client that is
    # stopped does not stop what it asked for.
    async def _tell_progress(self, answering: _Answering) -> None:
        while True:
            await answering.news.wait()
            if answering.done.is_set():
                return
            answering.news = trio.Event()
            if self._has_room():
                await self._send(Reply(answering.latest, continues=True).encode())
            with trio.move_on_after(INTERVAL):
                await answering.done.wait()

    def _has_room(self) -> bool:
        poll = select.poll()
        poll.register(self._sock.fileno(), select.POLLOUT)
        return any(events & select.POLLOUT for _, events in poll.poll(0))

    # Waits for as long as it takes: what is told in this way is not held up by who doesn't read it.
    async def _tell(self, parameters: Values) -> None:
        await trio.lowlevel.wait_writable(self._sock.fileno())
        await self._send(Reply(parameters, continues=True).encode())

    # A reply that went out in part leaves the stream without framing: then the connection ends.
    async def _send(self, data: bytes) -> None:
        left = memoryview(data)
        with trio.move_on_after(PATIENCE):
            try:
                while left:
                    left = left[await self._sock.send(left) :]
            except OSError:
                self._gone = True
                return
        if left:
            self.cut(f"did not take a reply for {PATIENCE:g} s")


class Server:
    """The connections of one listening socket."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._connections: set[Connection] = set()

    async def serve(self, listener: trio.socket.SocketType) -> None:
        """Accept and serve clients until cancelled. The listener stays open."""
        async with trio.open_nursery() as nursery:
            while True:
                try:
                    sock, _ = await listener.accept()
                except OSError as error:
                    if error.errno not in EXHAUSTED:
                        raise
                    _log.error("no control client can connect: %s", os.strerror(error.errno))
                    await trio.sleep(1)
                    continue
                connection = self._admit(sock)
                if connection is not None:
                    nursery.start_soon(self._run, connection)

    def _admit(self, sock: trio.socket.SocketType) -> Connection | None:
        peer = peer_of(sock)
        if not peer.allowed:
            _log.warning("control client (%s) refused: it is neither root nor our user", peer)
        elif len(self._connections) < CONNECTIONS or self._make_room():
            connection = Connection(sock, self._service, peer)
            self._connections.add(connection)
            return connection
        else:
            _log.warning("control client (%s) refused: %d are busy", peer, CONNECTIONS)
        sock.close()
        return None

    # Only who waits for nothing has to leave.
    def _make_room(self) -> bool:
        idle = [connection for connection in self._connections if not connection.busy]
        if not idle:
            return False
        oldest = min(idle, key=lambda connection: connection.idle_since)
        oldest.cut(f"was the one idle for longest of {CONNECTIONS}")
        self._connections.discard(oldest)
        return True

    async def _run(self, connection: Connection) -> None:
        try:
            await connection.run()
        except Exception:
            # A bug of ours costs this client its connection, not the bridges theirs.
            _log.exception("internal error, control client cut off")
        finally:
            self._connections.discard(connection)
