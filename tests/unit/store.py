"""A service manager that keeps descriptors from one process to the next."""

from __future__ import annotations

import os

import pytest

from vhostbridge.backends.fds import OwnedFd
from vhostbridge.bridge import keeping
from vhostbridge.bridge.keeping import Keeper
from vhostbridge.bridge.notify import Notifier

# Not at 3, which this process has for itself.
_FIRST = 200


class Store(Notifier):
    """Keeps what it is given by its name; nothing any more once ``full``."""

    keeps = True

    def __init__(self) -> None:
        self.kept: dict[str, OwnedFd] = {}
        self.full = False

    def keep(self, name: str, fd: int) -> bool:
        if not self.full:
            self.kept[name] = OwnedFd(os.dup(fd))
        return not self.full

    def forget(self, name: str) -> None:
        self.kept.pop(name).close()

    def next_process(self) -> Keeper:
        """What a process that begins now is given."""
        for number, fd in enumerate(self.kept.values(), _FIRST):
            os.dup2(fd.fileno(), number)
        environment = {
            "LISTEN_PID": str(os.getpid()),
            "LISTEN_FDS": str(len(self.kept)),
            "LISTEN_FDNAMES": ":".join(self.kept),
        }
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(keeping, "_FIRST", _FIRST)
            return Keeper(self, environment)
