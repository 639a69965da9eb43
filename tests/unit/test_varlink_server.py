"""The varlink server: what clients get, and that none of them can hurt it."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import pytest
import trio
import trio.lowlevel

from tests.unit.controlled import some_fds
from vhostbridge.backends.fds import OwnedFd, close_all
from vhostbridge.backends.vhostuser.sockets import listen
from vhostbridge.bridge import varlink_server
from vhostbridge.bridge.varlink import (
    MESSAGE_MAX,
    SERVICE,
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
from vhostbridge.bridge.varlink_server import Peer, Server


def pipe() -> tuple[OwnedFd, OwnedFd]:
    reader, writer = os.pipe2(os.O_CLOEXEC)
    return OwnedFd(reader), OwnedFd(writer)


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


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    one = Running(tmp_path / "c")
    listener = listen(str(one.path))
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.server.serve, listener)
            yield one
            nursery.cancel_scope.cancel()
    for client in one.clients:
        client.sock.close()
    listener.close()


async def test_calls_of_one_client_are_answered_in_order(running: Running) -> None:
    client = await running.connect()
    texts = [str(number) for number in range(100)]
    async with trio.open_nursery() as nursery:

        async def say_all() -> None:
            for text in texts:
                await client.say("Echo", text=text)

        nursery.start_soon(say_all)
        replies = [await client.hear() for _ in texts]
    assert replies == [Reply({"text": text}) for text in texts]


async def test_clients_do_not_wait_for_each_other(running: Running) -> None:
    slow, quick = await running.connect(), await running.connect()
    await slow.say("Wait")
    await running.example.waiting.wait()
    assert await quick.ask("Echo", text="x") == Reply({"text": "x"})
    running.example.gate.set()
    assert await slow.hear() == Reply({})


@pytest.mark.parametrize(
    ("method", "parameters", "error", "named"),
    [
        ("org.example.Test.Nothing", {}, "MethodNotFound", "org.example.Test.Nothing"),
        ("org.example.Test.Later", {}, "MethodNotImplemented", "org.example.Test.Later"),
        ("org.example.Other.Echo", {}, "InterfaceNotFound", "org.example.Other"),
        ("Echo", {}, "InterfaceNotFound", ""),
        ("org.example.Test.Echo", {}, "InvalidParameter", "text"),
        ("org.example.Test.Echo", {"text": None}, "InvalidParameter", "text"),
        ("org.example.Test.Echo", {"text": 3}, "InvalidParameter", "text"),
        ("org.example.Test.Echo", {"text": "x", "count": True}, "InvalidParameter", "count"),
        ("org.example.Test.Echo", {"text": "x", "count": 1.5}, "InvalidParameter", "count"),
        ("org.example.Test.Echo", {"text": "x", "loud": 1}, "InvalidParameter", "loud"),
        ("org.example.Test.Echo", {"text": "x", "other": 1}, "InvalidParameter", "other"),
        (f"{SERVICE}.GetInterfaceDescription", {"interface": "x"}, "InterfaceNotFound", "x"),
    ],
)
async def test_wrong_calls_get_the_standard_errors(
    method: str, parameters: dict[str, object], error: str, named: str, running: Running
) -> None:
    client = await running.connect()
    await client.sock.send(Call(method, parameters).encode())
    reply = await client.hear()
    assert reply is not None
    assert reply.error == f"org.varlink.service.{error}"
    assert list(reply.parameters.values()) == [named]
    assert await client.ask("Echo", text="still here", count=None) is not None


async def test_service_tells_what_it_is_and_has(running: Running) -> None:
    client = await running.connect()
    await client.sock.send(Call("org.varlink.service.GetInfo", {}).encode())
    info = await client.hear()
    assert info is not None
    assert info.parameters["interfaces"] == ["org.example.Test", "org.varlink.service"]
    for name in ("org.example.Test", "org.varlink.service"):
        method = "org.varlink.service.GetInterfaceDescription"
        await client.sock.send(Call(method, {"interface": name}).encode())
        told = await client.hear()
        assert told is not None and f"interface {name}\n" in str(told.parameters["description"])


async def test_errors_of_methods_reach_the_caller(running: Running) -> None:
    client = await running.connect()
    failed = Reply({"why": "it was asked to"}, "org.example.Test.Failed")
    assert await client.ask("Fail") == failed
    assert await client.ask("Fail", more=True) == failed


async def test_a_bug_costs_its_caller_the_connection_and_nobody_else(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    client, other = await running.connect(), await running.connect()
    assert await client.ask("Break") is None
    assert "ZeroDivisionError" in caplog.text
    assert await other.ask("Echo", text="x") is not None


async def test_more_tells_progress_and_then_the_result(running: Running) -> None:
    client = await running.connect()
    await client.say("Count", more=True)
    assert await client.hear() == Reply({"count": 999}, continues=True)
    running.example.gate.set()
    assert await client.hear() == Reply({"count": 1000})


async def test_without_more_there_is_the_result_only(running: Running) -> None:
    client = await running.connect()
    running.example.gate.set()
    assert await client.ask("Count") == Reply({"count": 1000})


async def test_oneway_is_done_and_not_answered(running: Running) -> None:
    client = await running.connect()
    running.example.gate.set()
    await client.say("Echo", oneway=True, text="x")
    for method in ("Fail", "Nothing", "Count"):
        await client.say(method, oneway=True, more=True)
    assert await client.ask("Echo", text="y") == Reply({"text": "y"})
    assert running.example.echoed == ["x", "y"]


async def test_descriptors_are_the_methods_for_its_time(running: Running, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"12345")
    client = await running.connect()
    with OwnedFd(os.open(tmp_path / "f", os.O_RDONLY | os.O_CLOEXEC)) as file:
        await client.say("Take", [file, file])
        assert await client.hear() == Reply({"sizes": [5, 5]})


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\n\0",
        b"\0",
        b"[]\0",
        b"{}\0",
        b"[" * 100_000 + b"\0",
        b"x" * (MESSAGE_MAX + 1),
    ],
    ids=["http", "empty", "array", "no-call", "deep", "long"],
)
async def test_garbage_ends_the_connection_with_a_log_line(
    garbage: bytes, running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    client, other = await running.connect(), await running.connect()

    async def send() -> None:
        left = garbage
        with suppress(OSError):
            while left:
                left = left[await client.sock.send(left) :]

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        assert await client.hear() is None
    (record,) = caplog.records
    assert f"(pid {os.getpid()}, uid {os.geteuid()}) cut off: it sent" in record.getMessage()
    assert await other.ask("Echo", text="x") is not None


async def test_too_many_descriptors_end_the_connection(running: Running) -> None:
    client = await running.connect()
    fds = some_fds(40)
    await client.say("Take", fds)
    close_all(fds)
    assert await client.hear() is None


async def test_descriptors_of_calls_that_wait_are_closed_with_the_connection(
    running: Running,
) -> None:
    client = await running.connect()
    await client.say("Wait")
    reader, writer = pipe()
    for _ in range(6):
        await client.say("Take", [writer])
    writer.close()
    client.sock.close()
    # The pipe ends when its last writer, here or there, is closed.
    await trio.lowlevel.wait_readable(reader.fileno())
    assert os.read(reader.fileno(), 1) == b""
    reader.close()


async def test_caller_that_goes_away_has_its_operation_cancelled(running: Running) -> None:
    client = await running.connect()
    await client.say("Wait", more=True)
    await running.example.waiting.wait()
    client.sock.close()
    await running.example.cancelled.wait()


async def test_oneway_operation_goes_on_without_its_caller(running: Running) -> None:
    client = await running.connect()
    await client.say("Wait", oneway=True)
    await client.say("Fail")
    await client.say("Echo", oneway=True, text="last")
    client.sock.close()
    await running.example.waiting.wait()
    running.example.gate.set()
    other = await running.connect()
    while "last" not in running.example.echoed:
        assert await other.ask("Echo", text="x") is not None
    assert not running.example.cancelled.is_set()


async def test_caller_that_has_said_all_still_gets_its_answer(running: Running) -> None:
    client = await running.connect()
    await client.say("Wait")
    client.sock.shutdown(socket.SHUT_WR)
    await running.example.waiting.wait()
    running.example.gate.set()
    assert await client.hear() == Reply({})
    assert await client.hear() is None


async def test_client_that_does_not_read_is_cut_off(
    running: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(varlink_server, "PATIENCE", 0.05)
    client = await running.connect()

    async def talk() -> NoReturn:
        while True:
            await client.say("Echo", text="x" * 60_000)

    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        await talk()
    assert "did not take a reply for 0.05 s" in caplog.text


async def test_progress_does_not_wait_for_a_client_that_does_not_read(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlink_server, "PATIENCE", 0.05)
    monkeypatch.setattr(varlink_server, "INTERVAL", 0)
    told = 0

    async def tell(answering: Answering) -> Values:
        nonlocal told
        # Far more than a socket takes.
        while told < 1000:
            told += 1
            answering.progress({"text": "x" * 10_000})
            await trio.lowlevel.checkpoint()
        return {}

    running.example.interface.methods["Wait"] = Method({}, tell)  # type: ignore[index]
    client = await running.connect()
    await client.say("Wait", more=True)
    replies = []
    while (reply := await client.hear()) is not None:
        replies.append(reply)
        if not reply.continues:
            break
        await trio.sleep(0.001)
    assert told == 1000
    assert replies[-1] == Reply({})


async def test_another_users_client_is_hung_up_on(
    running: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stranger = Peer(1234, os.geteuid() + 1000)
    monkeypatch.setattr(varlink_server, "peer_of", lambda sock: stranger)
    client = await running.connect()
    assert await client.hear() is None
    assert "(pid 1234, uid" in caplog.text and "neither root nor our user" in caplog.text


@pytest.mark.parametrize(("uid", "allowed"), [(0, True), (1000, True), (1001, False)])
def test_root_and_the_daemons_user_are_allowed(
    uid: int, allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert Peer(1, uid).allowed is allowed


async def test_peer_is_who_connected(running: Running) -> None:
    client = await running.connect()
    assert varlink_server.peer_of(client.sock) == Peer(os.getpid(), os.geteuid())


async def test_one_connection_too_many_ends_the_idlest(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlink_server, "CONNECTIONS", 3)
    busy, first, second = [await running.connect() for _ in range(3)]
    await busy.say("Wait")
    await running.example.waiting.wait()
    for client in (first, second, first):
        assert await client.ask("Echo", text="x") is not None
    third = await running.connect()
    assert await third.ask("Echo", text="x") is not None
    assert await second.hear() is None
    assert await first.ask("Echo", text="x") is not None
    running.example.gate.set()
    assert await busy.hear() == Reply({})


async def test_when_all_connections_are_busy_one_more_is_refused(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlink_server, "CONNECTIONS", 1)
    busy = await running.connect()
    await busy.say("Wait")
    await running.example.waiting.wait()
    assert await (await running.connect()).hear() is None
    running.example.gate.set()
    assert await busy.hear() == Reply({})
