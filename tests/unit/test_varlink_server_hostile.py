"""Clients of the varlink server that break its rules, go away, or do not read."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import pytest
import trio
import trio.lowlevel

from tests.unit.controlled import some_fds
from tests.unit.varlink_example import Running, served
from vhostbridge.backends.fds import OwnedFd, close_all
from vhostbridge.bridge import varlink_server
from vhostbridge.bridge.varlink import MESSAGE_MAX, Answering, Method, Reply, Values
from vhostbridge.bridge.varlink_server import Peer


def pipe() -> tuple[OwnedFd, OwnedFd]:
    reader, writer = os.pipe2(os.O_CLOEXEC)
    return OwnedFd(reader), OwnedFd(writer)


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    async with served(tmp_path / "c") as one:
        yield one


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
