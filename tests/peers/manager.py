"""A service manager as systemd is one: it is told what goes on, and keeps descriptors."""

from __future__ import annotations

import array
import os
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from .bridge import COMMAND, ENVIRONMENT
from .process import Process

# What sd_listen_fds(3) expects: descriptors from 3 on, and the pid of who may have them.
LAUNCHER = """\
import fcntl, os, sys
names, fds, argv = sys.argv[1], [int(n) for n in sys.argv[2].split(",") if n], sys.argv[3:]
spare = [fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for fd in fds]
for number, fd in enumerate(spare, 3):
    os.dup2(fd, number)
os.closerange(3 + len(spare), 4096)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(fds)), LISTEN_FDNAMES=names)
os.execv(argv[0], argv)
"""


class Manager:
    """Listens at `folder`/notify, in a thread, for a `with` block's length.

    `store` has what is kept, by name and descriptor; `said` all else, message by message.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "notify"
        self.store: list[tuple[str, int]] = []
        self.said: list[str] = []
        #: Listening sockets of socket units, as `store`.
        self.sockets: list[tuple[str, int]] = []
        self._changed = threading.Condition()
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind(str(self.path))
        self._thread = threading.Thread(target=self._listen, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"END", str(self.path))
        self._thread.join()
        self._sock.close()
        self.release()
        for _, fd in self.sockets:
            os.close(fd)

    def release(self) -> None:
        """Close all that is kept, as `systemctl stop` does."""
        with self._changed:
            for _, fd in self.store:
                os.close(fd)
            self.store.clear()

    def listen(self, path: Path) -> None:
        """Have a socket unit that listens at a path."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.bind(str(path))
            sock.listen(8)
            self.sockets.append(("unit.socket", os.dup(sock.fileno())))

    def start(self, *arguments: str | Path) -> Process:
        """Start `vhost-bridge serve` with all that it is to inherit; return when it is ready."""
        with self._changed:
            count = self._ready
        process = self.begin(*arguments)
        try:
            with self._changed:
                assert self._changed.wait_for(lambda: self._ready > count, 30), process.output
        except BaseException:
            process.kill()
            raise
        return process

    def begin(self, *arguments: str | Path) -> Process:
        """The same, and return at once."""
        with self._changed:
            given = [*self.sockets, *self.store]
        names = ":".join(name for name, _ in given)
        fds = [fd for _, fd in given]
        argv: Sequence[str | Path] = [
            *(sys.executable, "-c", LAUNCHER, names, ",".join(map(str, fds))),
            *(COMMAND, "serve", *arguments),
        ]
        env = {**ENVIRONMENT, "NOTIFY_SOCKET": str(self.path), "FDSTORE": "100"}
        return Process(argv, name="vhost-bridge", pass_fds=fds, env=env)

    @property
    def _ready(self) -> int:
        return sum(text.startswith("READY=1") for text in self.said)

    def _listen(self) -> None:
        space = socket.CMSG_SPACE(64 * 4)
        while True:
            data, ancillary, _, _ = self._sock.recvmsg(4096, space)
            fds = array.array("i")
            for _, _, rights in ancillary:
                fds.frombytes(rights)
            with self._changed:
                if not self._take(data.decode(), list(fds)):
                    return
                self._changed.notify_all()

    def _take(self, text: str, fds: list[int]) -> bool:
        fields = dict(line.partition("=")[::2] for line in text.splitlines())
        name = fields.get("FDNAME", "stored")
        if "FDSTORE" in fields:
            for fd in fds:
                self._keep(name, fd)
            return True
        for fd in fds:  # of a barrier: closed, it tells that all before was dealt with
            os.close(fd)
        if "FDSTOREREMOVE" in fields:
            for _, fd in [one for one in self.store if one[0] == name]:
                os.close(fd)
            self.store = [one for one in self.store if one[0] != name]
        elif "BARRIER" not in fields:
            self.said.append(text)
        return text != "END"

    # What is there already is not kept twice.
    def _keep(self, name: str, fd: int) -> None:
        if any(os.path.sameopenfile(fd, kept) for _, kept in self.store):
            os.close(fd)
        else:
            self.store.append((name, fd))
