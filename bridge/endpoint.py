"""Where front-ends come from: a socket that we listen on, one that we dial, or an inherited one."""

from __future__ import annotations

import logging
import os
from typing import Protocol

import trio

from vhostbridge.backends.errors import TargetError
from vhostbridge.backends.pace import Pace
from vhostbridge.backends.vhostuser import sockets
from vhostbridge.backends.vhostuser.sockets import EXHAUSTED

from .config import BridgeConfig
from .keeping import Keeper

_log = logging.getLogger("vhostbridge.endpoint")

# How often a front-end that listens is tried, in seconds.
RETRY = 0.2

# How many front-ends a bridge serves a second for long, one after the other, and how many at once.
CONNECTIONS = 10
BURST = 20


class Endpoint(Protocol):
    """A source of connected front-ends, one after the other."""

    async def next(self) -> trio.socket.SocketType | None:
        """The next front-end's socket; ``None`` when there will be no more."""

    def close(self, *, keep: bool = False) -> None:
        """Stop; a path of ours is removed, unless another process listens on there.

        Nothing happens if it has stopped.
        """


class _Listener:
    def __init__(self, sock: trio.socket.SocketType, path: str | None) -> None:
        self._sock = sock
        self._path = path
        self._pace = Pace(CONNECTIONS, BURST)

    async def next(self) -> trio.socket.SocketType | None:
        await self._pace.take()
        while True:
            try:
                sock, _ = await self._sock.accept()
            except OSError as error:
                if error.errno not in EXHAUSTED:
                    raise
                _log.error("no front-end can connect: %s", os.strerror(error.errno))
                await trio.sleep(RETRY)
            else:
                return sock

    def close(self, *, keep: bool = False) -> None:
        if self._path is None or keep or self._sock.fileno() < 0:
            self._sock.close()
        else:
            sockets.unlisten(self._sock, self._path)


class _Dialer:
    def __init__(self, path: str) -> None:
        self._path = path
        self._pace = Pace(CONNECTIONS, BURST)

    async def next(self) -> trio.socket.SocketType | None:
        await self._pace.take()
        told = ""
        while True:
            try:
                return await sockets.connect(self._path)
            except TargetError as error:
                if str(error) != told:
                    told = str(error)
                    _log.info("waiting for a front-end: %s", error.message)
            await trio.sleep(RETRY)

    def close(self, *, keep: bool = False) -> None:
        pass


class _Inherited:
    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._sock: trio.socket.SocketType | None = sock

    async def next(self) -> trio.socket.SocketType | None:
        await trio.lowlevel.checkpoint()
        sock, self._sock = self._sock, None
        return sock

    def close(self, *, keep: bool = False) -> None:
        if self._sock is not None:
            self._sock.close()


def open_endpoint(config: BridgeConfig, keeper: Keeper | None = None) -> Endpoint:
    """The endpoint that a bridge is configured with; a socket that was inherited for it is used.

    Raises:
        TargetError: its path is in use or not permitted, or its descriptor is no socket.
    """
    if config.listen is not None:
        return _listener(config, config.listen, keeper)
    if config.connect is not None:
        return _Dialer(config.connect)
    assert config.fd is not None
    sock = sockets.adopt(config.fd)
    return _Listener(sock, None) if sockets.is_listening(sock) else _Inherited(sock)


def _listener(config: BridgeConfig, path: str, keeper: Keeper | None) -> Endpoint:
    sock, ours = listen_at(path, config.socket_mode, keeper)
    return _Listener(sock, path if ours else None)


def listen_at(path: str, mode: int, keeper: Keeper | None) -> tuple[trio.socket.SocketType, bool]:
    """Listen at a path, with the socket that was inherited for it, or a new one.

    Returns it, and whether its path is ours to remove. One of ours is kept for the process after
    this one.

    Raises:
        TargetError: the path is in use or not permitted.
    """
    given = None if keeper is None else keeper.listening(path)
    if given is None:
        sock, ours = sockets.listen(path, mode=mode), True
    else:
        sock, ours = sockets.adopt(given.fd.detach()), given.ours
    if ours and keeper is not None:
        keeper.keep_listening(path, sock.fileno())
    return sock, ours
