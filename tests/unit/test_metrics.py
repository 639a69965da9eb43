"""Metrics in Prometheus' text format, by its own parser, and the endpoint against its clients."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families

from tests.unit.commands import Run
from tests.unit.controlled import FakeBridge, daemon
from vhostbridge.backends.errors import ConfigError, TargetError
from vhostbridge.bridge import scrape
from vhostbridge.bridge.config import load_config, parse_address
from vhostbridge.bridge.control_client import ControlClient
from vhostbridge.bridge.metrics import Metrics, families, merged
from vhostbridge.bridge.pauses import Pause, Tally
from vhostbridge.bridge.scrape import serve_metrics
from vhostbridge.bridge.status import BridgeStatus


class Bridge(FakeBridge):
    """One that tells a status of a test's own."""

    def __init__(self, name: str, **changes: object) -> None:
        super().__init__(name)
        self.changes = changes
        self.asked_for_status = 0

    def status(self) -> BridgeStatus:
        self.asked_for_status += 1
        return replace(super().status(), **self.changes)  # type: ignore[arg-type]


def parsed(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Samples by name and labels; none is there twice, and each family has help and a type."""
    found: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation and family.type in ("gauge", "counter"), family
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in found
            assert (family.type == "counter") == sample.name.endswith("_total"), sample.name
            found[key] = sample.value
    return found


def value(text: str, name: str, **labels: str) -> float | None:
    return parsed(text).get((name, frozenset(labels.items())))


def text_of(*bridges: FakeBridge) -> str:
    return "".join(family.text() for family in families([one.status() for one in bridges]))


def test_state_is_one_of_all() -> None:
    text = text_of(Bridge("vm1"), Bridge("vm2", state="failed", front_end=None))
    assert value(text, "vhost_bridge_state", bridge="vm1", state="running") == 1
    assert value(text, "vhost_bridge_state", bridge="vm2", state="failed") == 1
    assert sum(v for (name, _), v in parsed(text).items() if name == "vhost_bridge_state") == 2
    assert value(text, "vhost_bridge_frontend_connected", bridge="vm1") == 1
    assert value(text, "vhost_bridge_frontend_connected", bridge="vm2") == 0
    assert value(text, "vhost_bridge_bridges") == 2


def test_pauses_are_told_by_reason_and_phase() -> None:
    pause = Pause("switch", 1e9, {"suspend": 0.25, "state": 0.5, "resume": 0.125})
    tally = Tally()
    tally.add(pause)
    tally.add(pause)
    text = text_of(Bridge("vm1", pauses={"switch": tally}, paused=pause))
    labels = {"bridge": "vm1", "reason": "switch"}
    assert value(text, "vhost_bridge_pauses_total", **labels) == 2
    assert value(text, "vhost_bridge_pause_seconds_total", **labels, phase="state") == 1
    assert value(text, "vhost_bridge_pause_longest_seconds", **labels) == 0.875
    assert value(text, "vhost_bridge_pause_current_seconds", bridge="vm1") == 0.875


def test_counts_of_vrings_are_there_where_they_are_known() -> None:
    (plain,) = FakeBridge().status().vrings
    shadow = replace(plain, index=1, requests=1 << 60, bytes=9, kicks=3, calls=2, in_flight=5)
    text = text_of(Bridge("vm1", vrings=(plain, shadow)))
    of = {"bridge": "vm1", "vring": "1"}
    assert value(text, "vhost_bridge_vring_requests_total", **of) == 1 << 60
    assert value(text, "vhost_bridge_vring_bytes_total", **of) == 9
    assert value(text, "vhost_bridge_vring_in_flight", **of) == 5
    assert value(text, "vhost_bridge_vring_used_index", bridge="vm1", vring="0") == 7
    for name in ("requests_total", "in_flight"):
        assert value(text, f"vhost_bridge_vring_{name}", bridge="vm1", vring="0") is None


def test_labels_may_have_any_characters() -> None:
    name = 'a"b\\c\nd}'
    text = text_of(Bridge(name))
    assert value(text, "vhost_bridge_shadowed", bridge=name) == 0


def test_process_tells_of_itself() -> None:
    text = text_of()
    assert value(text, "process_resident_memory_bytes") > 1 << 20  # type: ignore[operator]
    assert value(text, "process_start_time_seconds") > 1e9  # type: ignore[operator]
    assert value(text, "process_open_fds") < value(text, "process_max_fds")  # type: ignore[operator]


def test_texts_of_daemons_merge_into_one_that_is_right() -> None:
    text = merged([text_of(Bridge("vm1")), text_of(Bridge("vm2"), Bridge("vm3"))])
    assert {dict(labels)["bridge"] for name, labels in parsed(text) if name.endswith("_held")} == {
        "vm1", "vm2", "vm3",
    }  # fmt: skip
    assert "process_" not in text
    assert "vhost_bridge_build_info" in text


async def test_text_is_made_once_for_many_who_ask() -> None:
    bridge = Bridge("vm1")
    metrics = Metrics({"vm1": bridge})
    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(metrics.text)
    assert bridge.asked_for_status == 1


# The endpoint


@asynccontextmanager
async def endpoint(path: Path, *bridges: FakeBridge) -> AsyncIterator[None]:
    metrics = Metrics({bridge.name: bridge for bridge in bridges})
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_metrics, str(path), metrics)
        yield
        nursery.cancel_scope.cancel()


async def ask(path: Path, request: bytes) -> bytes:
    async with await trio.open_unix_socket(str(path)) as stream:
        if request:
            await stream.send_all(request)
        answer = b""
        try:
            while data := await stream.receive_some():
                answer += data
        except trio.BrokenResourceError:
            pass
        return answer


async def test_scrape_is_answered_with_the_text_and_its_length(tmp_path: Path) -> None:
    async with endpoint(tmp_path / "m", Bridge("vm1")):
        answer = await ask(tmp_path / "m", b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4;")
        assert f"Content-Length: {len(body)}".encode() in head.splitlines()
        assert value(body.decode(), "vhost_bridge_held", bridge="vm1") == 0
        head_only = await ask(tmp_path / "m", b"HEAD /metrics?x=1 HTTP/1.0\n\n")
        assert head_only.startswith(b"HTTP/1.1 200 OK") and head_only.endswith(b"\r\n\r\n")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", b"404"),
        (b"GET /metrics/.. HTTP/1.1\r\n\r\n", b"404"),
        (b"POST /metrics HTTP/1.1\r\nContent-Length: 9\r\n\r\n", b"405"),
        (b"nonsense\r\n\r\n", b"400"),
        (b"GET /metrics HTTP/2.0\r\n\r\n", b"400"),
        (b"\0" * 100 + b"\r\n\r\n", b"400"),
        (b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 20000, b"400"),
    ],
)
async def test_other_requests_are_refused(tmp_path: Path, request_: bytes, status: bytes) -> None:
    async with endpoint(tmp_path / "m"):
        answer = await ask(tmp_path / "m", request_)
        # A peer that still sends when it is hung up on may not see the answer.
        assert answer.split()[1:2] == [status] or len(request_) > scrape.REQUEST_MAX


async def test_those_who_stall_are_cut_off_and_hold_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scrape, "PATIENCE", 0.3)
    async with endpoint(tmp_path / "m", Bridge("vm1")):
        stalled = [
            await trio.open_unix_socket(str(tmp_path / "m")) for _ in range(scrape.CONNECTIONS - 1)
        ]
        for stream in stalled:
            await stream.send_all(b"GET /metr")
        answer = await ask(tmp_path / "m", b"GET /metrics HTTP/1.1\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 200")
        with trio.fail_after(20):
            for stream in stalled:
                assert await stream.receive_some() == b""
                await stream.aclose()


async def test_more_connections_than_there_may_be_are_closed_at_once(tmp_path: Path) -> None:
    async with endpoint(tmp_path / "m", Bridge("vm1")):
        held = []
        for _ in range(scrape.CONNECTIONS):
            held.append(await trio.open_unix_socket(str(tmp_path / "m")))
            await held[-1].send_all(b"G")
            await trio.testing.wait_all_tasks_blocked()
        assert await ask(tmp_path / "m", b"") == b""
        for stream in held:
            await stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        answer = await ask(tmp_path / "m", b"GET /metrics HTTP/1.1\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 200")


async def test_answer_that_takes_long_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the peer has to be quick."""
    monkeypatch.setattr(scrape, "PATIENCE", 0.05)
    text = Metrics.text

    async def slow(metrics: Metrics) -> str:
        await trio.sleep(0.2)
        return await text(metrics)

    monkeypatch.setattr(Metrics, "text", slow)
    async with endpoint(tmp_path / "m", Bridge("vm1")):
        answer = await ask(tmp_path / "m", b"GET /metrics HTTP/1.1\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200")


async def test_peer_that_does_not_read_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scrape, "PATIENCE", 0.3)
    async with endpoint(tmp_path / "m", *(Bridge(f"vm{n}") for n in range(300))):
        async with await trio.open_unix_socket(str(tmp_path / "m")) as stream:
            await stream.send_all(b"GET /metrics HTTP/1.1\r\n\r\n")
            whole = len(await stream.receive_some(1))
            await trio.sleep(1)
            while data := await stream.receive_some():
                whole += len(data)
            assert whole < 400_000
        answer = await ask(tmp_path / "m", b"GET /metrics HTTP/1.1\r\n\r\n")
        assert len(answer) > whole


async def test_tcp_address_is_served_and_one_in_use_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(TargetError, match=f"cannot listen on 127.0.0.1 port {port}: "):
            await serve_metrics(f"127.0.0.1:{port}", Metrics({}))
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_metrics, f"127.0.0.1:{port}", Metrics({}))
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(b"GET /metrics HTTP/1.1\r\n\r\n")
            assert (await stream.receive_some()).startswith(b"HTTP/1.1 200")
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("text", "address"),
    [("127.0.0.1:9273", ("127.0.0.1", 9273)), ("[::1]:1", ("::1", 1)), ("/run/m", "/run/m")],
)
def test_addresses(text: str, address: object) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize("text", ["", "9273", ":9273", "x:", "x:0", "x:65536", "x:y", "run/m"])
def test_what_is_no_address(text: str, tmp_path: Path) -> None:
    config = tmp_path / "x.toml"
    config.write_text(
        f'metrics = "{text}"\n[[bridge]]\nname = "a"\nlisten = "/x"\nbackend = "vhost-user:/y"\n'
    )
    with pytest.raises(ConfigError, match=r"x\.toml: '.*' is no address for metrics"):
        load_config(config)


# On the control socket


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr("vhostbridge.bridge.control_client.control_folder", lambda: tmp_path)
    many = [FakeBridge(f"vm{n}") for n in range(300)]
    with daemon(tmp_path / "a.sock", *many):
        yield tmp_path


def test_long_text_comes_whole(folder: Path) -> None:
    with ControlClient(folder / "a.sock") as client:
        text = client.metrics()
    assert len(text) > 1 << 17
    assert value(text, "vhost_bridge_bridges") == 300


def test_command_prints_metrics_of_one_daemon_and_of_several(run: Run, folder: Path) -> None:
    text = run("metrics").out
    assert value(text, "vhost_bridge_bridges") == 300
    assert "process_" not in text, "node_exporter, which reads it, has these of itself"
    assert "process_" in run("metrics", "--control", folder / "a.sock").out
    with daemon(folder / "b.sock", FakeBridge("other")):
        text = run("metrics").out
        assert value(text, "vhost_bridge_held", bridge="other") == 0
        assert value(text, "vhost_bridge_held", bridge="vm99") == 0
        assert (
            value(run("metrics", "--control", folder / "b.sock").out, "vhost_bridge_bridges") == 1
        )
