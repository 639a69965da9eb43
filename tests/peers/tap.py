"""A relay between a vhost-user front-end and a back-end that keeps what both say."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

HEADER = 12
REPLY = 4
SET_BACKEND_REQ_FD = 21


@dataclass(slots=True)
class Heard:
    """The messages on one channel, each way, as they stood on the wire, with their descriptors."""

    forward: list[tuple[bytes, int]] = field(default_factory=list)
    backward: list[tuple[bytes, int]] = field(default_factory=list)


class Tap:
    """Listens on `listen` and passes one connection to `target`, reverse channels too."""

    def __init__(self, listen: Path, target: Path) -> None:
        self._target = target
        self.main = Heard()
        #: Its requests go backward.
        self.reverse = Heard()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(listen))
        self._listener.listen()
        self._threads: list[threading.Thread] = []
        self._sockets: list[socket.socket] = []
        self._start(self._serve)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for end in (self._listener, *self._sockets):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(30)
        for end in (self._listener, *self._sockets):
            end.close()

    def _start(self, function: object, *arguments: object) -> None:
        thread = threading.Thread(target=function, args=arguments)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _serve(self) -> None:
        try:
            front, _ = self._listener.accept()
        except OSError:
            return
        back = socket.socket(socket.AF_UNIX)
        self._sockets += [front, back]
        back.connect(str(self._target))
        self._join(front, back, self.main)

    def _join(self, front: socket.socket, back: socket.socket, heard: Heard) -> None:
        self._start(self._pass, front, back, heard.forward)
        self._start(self._pass, back, front, heard.backward)

    def _pass(
        self, source: socket.socket, sink: socket.socket, heard: list[tuple[bytes, int]]
    ) -> None:
        with suppress(OSError):
            while True:
                data, fds, _, _ = socket.recv_fds(source, HEADER, 32, socket.MSG_WAITALL)
                with _closing(fds):
                    if len(data) < HEADER:
                        break
                    request, flags, size = struct.unpack("=III", data)
                    data += source.recv(size, socket.MSG_WAITALL) if size else b""
                    heard.append((data, len(fds)))
                    if request == SET_BACKEND_REQ_FD and not flags & REPLY:
                        fds[0] = self._tapped(fds[0])
                    socket.send_fds(sink, [data], fds)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    # The other end of a socket of ours, in place of the front-end's.
    def _tapped(self, fd: int) -> int:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        front = socket.socket(fileno=fd)
        self._sockets += [front, ours]
        self._join(front, ours, self.reverse)
        return theirs.detach()


@contextmanager
def _closing(fds: list[int]) -> Iterator[None]:
    try:
        yield
    finally:
        for fd in fds:
            os.close(fd)
