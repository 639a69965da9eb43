"""The varlink server: what clients get."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from tests.unit.varlink_example import Running, served
from vhostbridge.backends.fds import OwnedFd
from vhostbridge.bridge.varlink import SERVICE, Call, Reply


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    async with served(tmp_path / "c") as one:
        yield one


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
