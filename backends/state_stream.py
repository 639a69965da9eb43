"""Device states on descriptors: files, pipes and sockets, in constant memory.

No descriptor's flags are changed: others may share what it stands for. Work on 1 MiB at a time
goes to a thread, so that a bridge's other tasks never wait for a disk or for SHA-256.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import stat
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TypeVar

import trio

from .closing import Closing
from .errors import StateError
from .fds import OwnedFd
from .state import MAX_CHUNK, Chunk, Decoder, DeviceState, Encoder, End, Event, Head
from .state_file import Copy, Spool, atomic_file, sync, write_all

__all__ = [
    "CheckedFd",
    "Copy",
    "Sink",
    "Source",
    "atomic_file",
    "check_stream",
    "load_internal",
    "save_stream",
]

Progress = Callable[[int], None]
T = TypeVar("T")

# Less than this is handled at once: a thread costs more than the work.
_SMALL = 4 << 10


async def _in_thread(work: Callable[[], T]) -> T:
    # Never abandoned: what a thread still reads or writes must not be closed under it.
    return await trio.to_thread.run_sync(work)


class _Channel(Closing):
    """What ``Sink`` and ``Source`` share: a descriptor, and how one waits on it."""

    #: The access mode, and what the kernel refused, for messages.
    _mode: int
    _verb: str

    def __init__(self, fd: OwnedFd) -> None:
        self._given = fd
        self._socket: socket.socket | None = None
        #: A second open file for the same pipe, with its own flags.
        self._pipe: OwnedFd | None = None
        kind = os.fstat(fd.fileno()).st_mode
        #: The descriptor can be waited for; a file can't, nor does it need it.
        self.pollable = stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind)
        self.is_file = stat.S_ISREG(kind) or stat.S_ISBLK(kind)
        if stat.S_ISSOCK(kind):
            self._socket = socket.socket(fileno=os.dup(fd.fileno()))
        elif stat.S_ISFIFO(kind):
            self._open_pipe()

    def _open_pipe(self) -> None:
        number = self._given.fileno()
        # One that another user made may be refused: then a few bytes at a time, when it is ready.
        with suppress(OSError):
            flags = self._mode | os.O_NONBLOCK | os.O_CLOEXEC
            self._pipe = OwnedFd(os.open(f"/proc/self/fd/{number}", flags))
        with suppress(OSError):  # a larger one only makes it faster
            if fcntl.fcntl(number, fcntl.F_GETPIPE_SZ) < MAX_CHUNK:
                fcntl.fcntl(number, fcntl.F_SETPIPE_SZ, MAX_CHUNK)

    def fileno(self) -> int:
        return (self._pipe or self._given).fileno()

    def close(self) -> None:
        """Close all, the descriptor that was given too. Idempotent."""
        if self._socket is not None:
            self._socket.close()
        if self._pipe is not None:
            self._pipe.close()
        self._given.close()

    def _refused(self, error: OSError) -> StateError:
        return StateError(f"cannot {self._verb} the device state: {error.strerror}")


class Sink(_Channel):
    """Where bytes go. Owns ``fd``: its end is its reader's end of file once this is closed.

    They go into ``copy`` too.
    """

    _mode = os.O_WRONLY
    _verb = "write"

    def __init__(self, fd: OwnedFd, copy: Copy | None = None) -> None:
        super().__init__(fd)
        self._copy = copy

    async def write(self, data: bytes) -> None:
        """Write all of ``data``. If it raises or is cancelled, some of it may be written.

        Raises:
            StateError: there is no space, or nobody reads any more.
        """
        await self.write_made(lambda: data)

    async def write_made(self, make: Callable[[], bytes]) -> int:
        """Write what ``make`` returns, which is called in a thread; return how much it was."""

        def made() -> bytes:
            data = make()
            if self._copy is not None:
                self._copy.add(data)
            return data

        try:
            if not self.pollable:
                return await _in_thread(lambda: write_all(self.fileno(), made()))
            data = await _in_thread(made)
            await self._send(memoryview(data))
            return len(data)
        except OSError as error:
            raise self._refused(error) from None

    async def _send(self, data: memoryview) -> None:
        await trio.lowlevel.checkpoint()
        while data:
            try:
                data = data[self._send_some(data) :]
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self.fileno())

    def _send_some(self, data: memoryview) -> int:
        if self._socket is not None:
            return self._socket.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        if self._pipe is None:
            # A pipe that is ready takes this much without waiting, while no one else writes.
            _require(self.fileno(), select.POLLOUT)
            data = data[: select.PIPE_BUF]
        return os.write(self.fileno(), data)

    async def sync(self) -> None:
        """Have a file's bytes on its disk; nothing for pipes and sockets."""
        if self.is_file:
            try:
                await _in_thread(lambda: sync(self.fileno()))
            except OSError as error:
                raise self._refused(error) from None


class Source(_Channel):
    """Where bytes come from. Owns ``fd``."""

    _mode = os.O_RDONLY
    _verb = "read"

    async def read(self, size: int) -> bytes:
        """Read up to ``size`` bytes, those that are there; none at the end.

        Raises:
            StateError: the kernel can't read it.
        """
        try:
            if not self.pollable:
                return await _in_thread(lambda: os.read(self.fileno(), size))
            return await self._receive(size)
        except OSError as error:
            raise self._refused(error) from None

    async def read_chunk(self) -> bytes:
        """Read ``MAX_CHUNK`` bytes, fewer only at the end."""
        pieces = bytearray()
        while len(pieces) < MAX_CHUNK:
            piece = await self.read(MAX_CHUNK - len(pieces))
            if not piece:
                break
            if len(piece) == MAX_CHUNK:
                return piece
            pieces += piece
        return bytes(pieces)

    async def _receive(self, size: int) -> bytes:
        await trio.lowlevel.checkpoint()
        while True:
            try:
                if self._socket is not None:
                    return self._socket.recv(size, socket.MSG_DONTWAIT)
                if self._pipe is None:
                    _require(self.fileno(), select.POLLIN)
                return os.read(self.fileno(), size)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self.fileno())


def _require(number: int, event: int) -> None:
    poll = select.poll()
    poll.register(number, event)
    if not poll.poll(0):
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))


async def save_stream(
    state: DeviceState, internal: Source | None, sink: Sink, progress: Progress
) -> int:
    """Write a state, with what ``internal`` gives up to its end; return how many bytes it is.

    ``progress`` gets the bytes written so far, again and again. Neither end is closed: nothing
    after this may fail if the reader of ``sink`` is to believe it. A file's bytes are on its disk.

    Raises:
        StateError: the state can't be, or can't be read or written. What was written is no whole
            stream then, which its reader finds out.
    """
    if (internal is None) != (state.internal_owner is None):
        raise ValueError("internal state has an owner, and only that")
    encoder = Encoder()
    written = await sink.write_made(lambda: encoder.begin(state))
    progress(written)
    while internal is not None and (data := await internal.read_chunk()):
        written += await sink.write_made(partial(encoder.internal, data))
        progress(written)
    written += await sink.write_made(encoder.end)
    await sink.sync()
    progress(written)
    return written


class CheckedFd(OwnedFd):
    """A whole stream that can be read again, from where the descriptor stands."""

    __slots__ = ("digest",)

    def __init__(self, fd: int, digest: bytes) -> None:
        super().__init__(fd)
        #: SHA-256 of all of it, as its end has it.
        self.digest = digest


async def check_stream(source_fd: OwnedFd, progress: Progress) -> tuple[DeviceState, CheckedFd]:
    """Read a stream to its end and check all of it; nothing is in doubt when this returns.

    Returns the state, and a descriptor to read the stream from once more: the same file, or a copy
    of what came through a pipe or socket. ``source_fd`` is taken over, and closed.

    Raises:
        StateError: it is damaged, needs a newer version, or can't be read.
    """
    with Source(source_fd) as source:
        spool = None if source.is_file else Spool()
        try:
            start = os.lseek(source.fileno(), 0, os.SEEK_CUR) if spool is None else 0
            state, end = await _check(source, spool, progress)
            again = source_fd.dup() if spool is None else spool.fd.dup()
            os.lseek(again.fileno(), start, os.SEEK_SET)
            return state, CheckedFd(again.detach(), end.digest)
        finally:
            if spool is not None:
                spool.fd.close()


async def _check(
    source: Source, spool: Spool | None, progress: Progress
) -> tuple[DeviceState, End]:
    decoder = Decoder()
    state: DeviceState | None = None
    end: End | None = None
    total = 0

    def take(data: bytes) -> list[Event]:
        events = decoder.feed(data)
        if spool is not None:
            spool.write(data)
        return events

    while data := await source.read(MAX_CHUNK):
        for event in await _some_work(take, data):
            if isinstance(event, Head):
                state = event.state
            elif isinstance(event, End):
                end = event
        total += len(data)
        progress(total)
    decoder.close()
    assert state is not None and end is not None
    return state, end


async def _some_work(work: Callable[[bytes], T], data: bytes) -> T:
    return work(data) if len(data) < _SMALL else await _in_thread(lambda: work(data))


async def load_internal(source_fd: CheckedFd, sink: Sink, progress: Progress) -> None:
    """Copy the internal state of a stream that was checked, and check it again on the way.

    ``progress`` gets the bytes copied so far. ``source_fd`` and ``sink`` stay open: close ``sink``,
    which tells its reader that it was all, only if this returns.

    Raises:
        StateError: the stream was changed since it was checked, or can't be read or written.
    """
    decoder = Decoder()
    copied = 0
    with Source(source_fd.dup()) as source:
        while data := await source.read(MAX_CHUNK):
            for event in await _decoded(partial(decoder.feed, data)):
                if isinstance(event, Chunk):
                    await sink.write(event.data)
                    copied += len(event.data)
                    progress(copied)
                elif isinstance(event, End) and event.digest != source_fd.digest:
                    raise _changed("another state is in its place")
        await _decoded(decoder.close)


async def _decoded(work: Callable[[], T]) -> T:
    try:
        return await _in_thread(work)
    except StateError as error:
        raise _changed(error.message) from None


def _changed(how: str) -> StateError:
    return StateError(f"the device state changed while it was loaded: {how}", "load it again")
