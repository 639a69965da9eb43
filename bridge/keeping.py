"""Descriptors that outlive this process: kept by the service manager, given to the next one.

There are three kinds. A socket unit's listening sockets have its name for them and stay its own.
Listening sockets of ours are kept from the moment that they are there, so that front-ends which
connect while no process runs wait instead of being turned away. And a front-end's session
(``handover``), or a state that waits for one (``waiting``), is kept while one process ends and
another begins.
"""

from __future__ import annotations

import hashlib
import logging
import os
import socket
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from vhostbridge.backends.fds import OwnedFd

from .notify import Notifier

_log = logging.getLogger("vhostbridge.daemon")

_FIRST = 3  # sd_listen_fds(3)
_LISTEN, _SESSION, _STATE = "listen.", "session.", "state."


@dataclass(frozen=True, slots=True)
class Listening:
    """A listening socket that was inherited; ``ours``: its path is ours to remove."""

    name: str
    fd: OwnedFd
    ours: bool


class Keeper:
    """What this process was given, and what it leaves behind. ``close`` ends it.

    Attributes:
        sessions: by bridge, what ``handover`` reads.
        states: by bridge, what ``waiting`` reads: where a state came from, and its stream.
    """

    def __init__(self, notifier: Notifier, environment: Mapping[str, str] | None = None) -> None:
        self._notifier = notifier
        self._listening: dict[str, Listening] = {}  # by path
        self.sessions: dict[str, OwnedFd] = {}
        self.states: dict[str, tuple[str, OwnedFd]] = {}
        for name, fd in _inherited(os.environ if environment is None else environment):
            self._take(name, fd)
        #: Whether the process before left anything that a front-end waits for.
        self.succeeds = bool(self.sessions or self.states)

    def _take(self, name: str, fd: OwnedFd) -> None:
        if name.startswith(_SESSION):
            self.sessions[name.removeprefix(_SESSION)] = fd
        elif name.startswith(_STATE):
            origin, _, bridge = name.removeprefix(_STATE).partition(".")
            self.states[bridge] = (origin, fd)
        else:
            self._take_listening(name, fd)
            return
        # It is read once, whatever becomes of it.
        self._notifier.forget(name)

    def _take_listening(self, name: str, fd: OwnedFd) -> None:
        path = _listening_at(fd)
        ours = name.startswith(_LISTEN)
        if path is None or (ours and not Path(path).is_socket()):
            # One of ours whose path somebody removed is out of reach.
            if ours:
                self._notifier.forget(name)
            else:
                _log.warning("%s: not used: no listening UNIX stream socket", name)
            fd.close()
            return
        if path in self._listening:
            self._listening.pop(path).fd.close()
        self._listening[path] = Listening(name, fd, ours)

    @property
    def keeps(self) -> bool:
        """Whether there is somebody to keep anything."""
        return self._notifier.keeps

    def listening(self, path: str) -> Listening | None:
        """The inherited socket that listens at ``path``; the caller's from now on."""
        return self._listening.pop(os.path.abspath(path), None)

    def keep_listening(self, path: str, number: int) -> None:
        """Let the socket that listens at a path outlive this process."""
        if self.keeps:
            self._notifier.keep(_name(path), number)

    def forget_listening(self, path: str) -> None:
        """It is not wanted any more."""
        if self.keeps:
            self._notifier.forget(_name(path))

    def keep_session(self, name: str, fd: OwnedFd) -> bool:
        """Let a bridge's session outlive this process; False if it can't."""
        return self._notifier.keep(_SESSION + name, fd.fileno())

    def keep_state(self, name: str, origin: str, fd: OwnedFd) -> bool:
        """Let a state that waits for a front-end outlive this process; False if it can't."""
        return self._notifier.keep(f"{_STATE}{origin}.{name}", fd.fileno())

    def keep_again(self) -> None:
        """Let what no bridge has asked for yet outlive this process too; no bridge gets it here."""
        for name, fd in self.sessions.items():
            with fd:
                self.keep_session(name, fd)
        for name, (origin, fd) in self.states.items():
            with fd:
                self.keep_state(name, origin, fd)
        self.sessions.clear()
        self.states.clear()

    def drop_unused(self, bridges: Collection[str]) -> None:
        """Close what is for none of the ``bridges``, those that could not start included."""
        for path, one in self._listening.items():
            if one.ours:
                Path(path).unlink(missing_ok=True)
                self._notifier.forget(one.name)
            else:
                _log.warning("%s: inherited, but no bridge listens there", path)
            one.fd.close()
        for name in self.sessions.keys() - bridges:
            _log.warning("%s: a front-end was left here, but there is no such bridge now", name)
            self.sessions.pop(name).close()
        for name in self.states.keys() - bridges:
            _log.warning("%s: a state was left here, but there is no such bridge now", name)
            self.states.pop(name)[1].close()
        self._listening.clear()

    def close(self) -> None:
        for one in self._listening.values():
            one.fd.close()
        for fd in self.sessions.values():
            fd.close()
        for _, fd in self.states.values():
            fd.close()
        self._listening.clear()
        self.sessions.clear()
        self.states.clear()


# A path may be longer than a name, and have other characters.
def _name(path: str) -> str:
    return _LISTEN + hashlib.sha256(os.fsencode(os.path.abspath(path))).hexdigest()[:16]


def _inherited(environment: Mapping[str, str]) -> list[tuple[str, OwnedFd]]:
    count = environment.get("LISTEN_FDS", "")
    if environment.get("LISTEN_PID") != str(os.getpid()) or not count.isdecimal():
        return []
    names = environment.get("LISTEN_FDNAMES", "").split(":")
    found = []
    for index in range(int(count)):
        number = _FIRST + index
        os.set_inheritable(number, False)
        name = names[index] if index < len(names) else "unknown"
        found.append((name, OwnedFd(number)))
    return found


# Where it listens; None if it is something else.
def _listening_at(fd: OwnedFd) -> str | None:
    try:
        sock = socket.socket(fileno=fd.fileno())
    except OSError:
        return None
    try:
        if (sock.family, sock.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
            return None
        if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return None
        name = sock.getsockname()
    finally:
        sock.detach()
    return os.path.abspath(name) if isinstance(name, str) and name else None
