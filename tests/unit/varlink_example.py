"""A varlink server with an interface to try things on, and its clients."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from vhostbridge.backends.fds import OwnedFd
from vhostbridge.backends.vhostuser.sockets import listen
from vhostbridge.bridge.varlink import (
    Answering,
    Call,
    Frame,
    Framer,
    Interface,
    Method,
    Parameter,
    Reply,
    Service,
    Values,
    VarlinkError,
    decode_reply,
    sent_fds,
)
from vhostbridge.bridge.varlink_server import Server

DESCRIPTION = """\
interface org.example.Test

method Echo(text: string, count: ?int, loud: ?bool) -> (text: string)
method Wait() -> ()
method Count() -> (count: int)
method Take() -> (sizes: []int)
method Fail() -> ()
method Break() -> ()
method Later() -> ()
error Failed(why: string)
"""


class Example:
    """An interface with a method for everything that a server has to do."""

    def __init__(self) -> None:
        self.gate = trio.Event()
        self.waiting = trio.Event()
        self.cancelled = trio.Event()
        self.echoed: list[object] = []
        optional = {"count": Parameter(int, True), "loud": Parameter(bool, True)}
        methods = {
            "Echo": Method({"text": Parameter(str), **optional}, self.echo),
            "Wait": Method({}, self.wait),
            "Count": Method({}, self.count),
            "Take": Method({}, self.take),
            "Fail": Method({}, self.fail),
            "Break": Method({}, self.broken),
        }
        self.interface = Interface("org.example.Test", DESCRIPTION, methods)

    async def echo(self, answering: Answering) -> Values:
        self.echoed.append(answering.call.parameters["text"])
        return {"text": answering.call.parameters["text"]}

    async def wait(self, answering: Answering) -> Values:
        self.waiting.set()
        try:
            await self.gate.wait()
        except trio.Cancelled:
            self.cancelled.set()
            raise
        return {}

    async def count(self, answering: Answering) -> Values:
        for number in range(1000):
            answering.progress({"count": number})
        await self.wait(answering)
        return {"count": 1000}

    async def take(self, answering: Answering) -> Values:
        return {"sizes": [os.fstat(fd.fileno()).st_size for fd in answering.call.fds]}

    async def fail(self, answering: Answering) -> Values:
        raise VarlinkError("org.example.Test.Failed", {"why": "it was asked to"})

    async def broken(self, answering: Answering) -> Values:
        raise ZeroDivisionError


class Client:
    """A client that says what it is told to."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self.sock = sock
        self._framer = Framer()
        self._frames: list[Frame] = []

    async def say(self, method: str, fds: list[OwnedFd] | None = None, /, **rest: Any) -> None:
        flags = {key: rest.pop(key) for key in ("more", "oneway") if key in rest}
        data = Call(f"org.example.Test.{method}", rest, **flags).encode()
        await self.sock.sendmsg([data], sent_fds(fds or []))

    async def hear(self) -> Reply | None:
        """The next reply; None when the server hung up."""
        while not self._frames:
            try:
                data = await self.sock.recv(65536)
            except ConnectionResetError:
                return None
            if not data:
                return None
            self._frames = self._framer.feed(data)
        return decode_reply(self._frames.pop(0))

    async def ask(self, method: str, /, **rest: Any) -> Reply | None:
        await self.say(method, **rest)
        return await self.hear()


class Running:
    """A server on a socket, and its clients."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.example = Example()
        self.server = Server(
            Service([self.example.interface], {"vendor": "v", "product": "p", "version": "1"})
        )
        self.clients: list[Client] = []

    async def connect(self) -> Client:
        sock = trio.socket.socket(socket.AF_UNIX)
        await sock.connect(str(self.path))
        self.clients.append(Client(sock))
        return self.clients[-1]


@asynccontextmanager
async def served(path: Path) -> AsyncIterator[Running]:
    """One that listens at ``path``."""
    one = Running(path)
    listener = listen(str(one.path))
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.server.serve, listener)
            yield one
            nursery.cancel_scope.cancel()
    for client in one.clients:
        client.sock.close()
    listener.close()
