"""A relay between a vhost-user front-end and a back-end that hangs up at a chosen message."""

from __future__ import annotations

import os
import socket
import struct
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

HEADER = 12


class Cut:
    """Listens on `socket` and passes everything to `target`, until `at` messages went there.

    The next one is not passed on: both sides lose the connection. Connections after that are
    passed on whole.
    """

    def __init__(self, listen: Path, target: Path, at: int) -> None:
        self._target = target
        self._left: int | None = at
        #: Requests that went to the back-end.
        self.passed: list[int] = []
        self.happened = False
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(listen))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(30)
        self._listener.close()

    def disarm(self) -> None:
        """Pass on whatever comes."""
        self._left = None

    def _serve(self) -> None:
        while True:
            try:
                front, _ = self._listener.accept()
            except OSError:
                return
            with front, socket.socket(socket.AF_UNIX) as back:
                back.connect(str(self._target))
                backwards = threading.Thread(target=self._pass_bytes, args=(back, front))
                backwards.start()
                self._pass_messages(front, back)
                for end in (front, back):
                    with suppress(OSError):
                        end.shutdown(socket.SHUT_RDWR)
                backwards.join()

    def _pass_messages(self, front: socket.socket, back: socket.socket) -> None:
        with suppress(OSError):
            while True:
                data, fds, _, _ = socket.recv_fds(front, HEADER, 32, socket.MSG_WAITALL)
                try:
                    if len(data) < HEADER:
                        return
                    request, _, size = struct.unpack("=III", data)
                    data += front.recv(size, socket.MSG_WAITALL) if size else b""
                    if self._left == 0:
                        self._left, self.happened = None, True
                        return
                    if self._left is not None:
                        self._left -= 1
                        self.passed.append(request)
                    socket.send_fds(back, [data], fds)
                finally:
                    for fd in fds:
                        os.close(fd)

    @staticmethod
    def _pass_bytes(back: socket.socket, front: socket.socket) -> None:
        with suppress(OSError):
            while data := back.recv(65536):
                front.sendall(data)
        with suppress(OSError):
            front.shutdown(socket.SHUT_RDWR)
