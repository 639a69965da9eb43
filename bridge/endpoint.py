"""Where front-ends come from: a socket that we listen on, one that we dial, or an inherited one."""

from __future__ import annotations

import logging
from typing import Protocol

import trio

from vhostbridge.backends.errors import TargetError
from vhostbridge.backends.vhostuser import sockets

from .config import BridgeConfig

_log = logging.getLogger("vhostbridge.endpoint")

# How often a front-end that listens is tried, in seconds.
RETRY = 0.2


class Endpoint(Protocol):
    """A source of connected front-ends, one after the other."""

    async def next(self) -> trio.socket.SocketType | None:
        """The next front-end's socket; ``None`` when there will be no more."""

    def close(self) -> None:
        """Stop; a path of ours is removed."""


class _Listener:
    def __init__(self, sock: trio.socket.SocketType, path: str | None) -> None:
        self._sock = sock
        self._path = path

    async def next(self) -> trio.socket.SocketType | None:
        sock, _ = await self._sock.accept()
        return sock

    def close(self) -> None:
        if self._path is None:
            self._sock.close()
        else:
            sockets.unlisten(self._sock, self._path)


class _Dialer:
    def __init__(self, path: str) -> None:
        self._path = path

    async def next(self) -> trio.socket.SocketType | None:
        told = ""
        while True:
            try:
                return await sockets.connect(self._path)
            except TargetError as error:
                if str(error) != told:
                    told = str(error)
                    _log.info("waiting for a front-end: %s", error.message)
            await trio.sleep(RETRY)

    def close(self) -> None:
        pass


class _Inherited:
    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._sock: trio.socket.SocketType | None = sock

    async def next(self) -> trio.socket.SocketType | None:
        await trio.lowlevel.checkpoint()
        sock, self._sock = self._sock, None
        return sock

    def close(self) -> None:
        if self._sock is not None:
            self._sock.close()


def open_endpoint(config: BridgeConfig) -> Endpoint:
    """The endpoint that a bridge is configured with.

    Raises:
        TargetError: its path is in use or not permitted, or its descriptor is no socket.
    """
    if config.listen is not None:
        return _Listener(sockets.listen(config.listen, mode=config.socket_mode), config.listen)
    if config.connect is not None:
        return _Dialer(config.connect)
    assert config.fd is not None
    sock = sockets.adopt(config.fd)
    return _Listener(sock, None) if sockets.is_listening(sock) else _Inherited(sock)
