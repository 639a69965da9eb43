"""What is seen of a bridge from outside while things happen to it."""

from __future__ import annotations

import json
import re
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.peers import blkio
from tests.peers.bridge import COMMAND, Bridge
from tests.peers.process import Process, eventually
from tests.peers.storage import StorageDaemon, make_image


class Follower(Process):
    """`vhost-bridge monitor -j` of a bridge."""

    def __init__(self, bridge: Bridge) -> None:
        super().__init__([COMMAND, "monitor", "-j", "--control", bridge.control], name="monitor")

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.output.splitlines(True) if line.endswith("\n")]

    def wait_for(self, what: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        eventually(lambda: any(map(what, self.events)), f"the event; got {self.output}")
        return next(filter(what, self.events))

    def wait_for_pause(self, reason: str) -> dict[str, Any]:
        """A pause, whose phases make it up."""
        pause = self.wait_for(lambda e: e["event"] == "pause" and e["reason"] == reason)
        assert list(pause["phases"]) == ["suspend", "state", "resume"]
        assert all(took >= 0 for took in pause["phases"].values())
        assert pause["seconds"] == pytest.approx(sum(pause["phases"].values())) and pause["seconds"]
        return pause


def test_all_that_happens_to_a_bridge_is_told_in_its_order(tmp_path: Path) -> None:
    image = make_image(tmp_path / "image")
    first, second = tmp_path / "first.sock", tmp_path / "second.sock"
    disk = StorageDaemon(image, first)
    with (
        Bridge(f"vhost-user:{first}", listen=tmp_path / "vm", arguments=["--shadow"]) as bridge,
        Follower(bridge) as seen,
        StorageDaemon(image, second) as other,
    ):
        seen.wait_for(lambda e: e["event"] == "state" and e["state"] == "reset")
        with blkio.start(bridge.listen, "randread", seconds=60, depth=4) as client:
            client.wait_for_output(blkio.RUNNING)
            seen.wait_for(lambda e: e["event"] == "front-end-connected" and e["pid"] > 0)
            seen.wait_for(lambda e: e["event"] == "state" and e["state"] == "running")
            bridge.operate("Suspend")
            time.sleep(0.1)
            status = bridge.status()
            assert status.paused is not None and status.paused.reason == "operator"
            bridge.operate("Resume")
            held = seen.wait_for_pause("operator")
            assert held["phases"]["state"] > 0.1
            bridge.command("switch", f"vhost-user:{second}")
            seen.wait_for_pause("switch")
            seen.wait_for(lambda e: e["event"] == "switched" and str(second) in e["backend"])
            disk.kill()
            other.kill()
            other.qmp.close()
            seen.wait_for(lambda e: e["event"] == "back-end-failed")
            with StorageDaemon(image, second):
                seen.wait_for_pause("failure")
                status = bridge.status()
                assert {reason: tally.count for reason, tally in status.pauses.items()} == {
                    "operator": 1, "switch": 1, "failure": 1,
                }  # fmt: skip
                longest = status.pauses["operator"].longest
                assert longest is not None and longest.seconds == pytest.approx(held["seconds"])
                assert (status.failures, status.front_ends, status.errors) == (1, 1, 0)
                assert status.front_end == client.pid and status.front_end_since is not None
                client.kill()
                seen.wait_for(lambda e: e["event"] == "front-end-left")
        states = [e["state"] for e in seen.events if e["event"] == "state"]
        assert states[:13] == [
            "reset", "running", "suspended", "running", "suspended", "running",
            "failed", "closed", "reset", "suspended", "running", "suspended", "reset",
        ]  # fmt: skip
        assert {e["bridge"] for e in seen.events} == {"b"}
        times = [e["time"] for e in seen.events]
        assert times == sorted(times)
    disk.qmp.close()


def test_follower_that_stands_still_holds_nothing_up(bridge: Bridge) -> None:
    with Follower(bridge) as seen:
        eventually(lambda: bool(seen.events), "it follows")
        seen.signal(signal.SIGSTOP)
        with blkio.start(bridge.listen, "randread", seconds=60, depth=1) as client:
            eventually(lambda: bridge.status().state == "running", "it runs")
            for _ in range(20):
                bridge.operate("Suspend")
                bridge.operate("Resume")
            assert bridge.status().pauses["operator"].count == 20
            client.kill()
        seen.signal(signal.SIGCONT)
        eventually(lambda: sum(e["event"] == "pause" for e in seen.events) == 20, "it goes on")


def test_script_waits_for_a_state(bridge: Bridge) -> None:
    reached = bridge.command("monitor", "--until", "running", "--timeout", "0.2", check=False)
    assert reached.returncode == 4
    with blkio.start(bridge.listen, "randread", seconds=60, depth=1) as client:
        done = bridge.command("monitor", "--until", "running", "--timeout", "30")
        assert done.stdout.splitlines()[-1].endswith(" b state: running")
        client.kill()
    bridge.command("monitor", "--until", "reset", "--timeout", "30")


def test_rates_and_metrics_are_those_of_the_load(disk: StorageDaemon, tmp_path: Path) -> None:
    """Of a bridge that goes straight and one in shadow vrings, beside what the client counted."""
    for number, arguments in enumerate(([], ["--shadow"])):
        with (
            Bridge(
                f"vhost-user:{disk.socket}",
                listen=tmp_path / f"vm{number}",
                arguments=[*arguments, "--metrics", tmp_path / "metrics"],
            ) as bridge,
            blkio.start(bridge.listen, "randread", seconds=6, depth=1) as client,
        ):
            eventually(lambda one=bridge: one.status().state == "running", "it runs")  # type: ignore[misc]
            # One look may be at the load's first moments. Each may take a second.
            looks = [first_vring(bridge) for _ in range(3)]
            vring = max(looks, key=lambda one: one["rate"]["requests"] or 0)
            result = blkio.finish(client)
            assert result["iops"] / 5 < vring["rate"]["requests"] < result["iops"] * 5
            assert (vring["rate"]["bytes"] is not None) == bool(arguments)
            scraped = scrape(tmp_path / "metrics")
            assert 'vhost_bridge_frontend_connections_total{bridge="b"} 1\n' in scraped
            found = re.search(r'vring_requests_total{bridge="b",vring="0"} (\d+)', scraped)
            assert (found is not None) == bool(arguments)
            if found is not None:
                assert int(found[1]) >= result["reads"]


def test_requests_are_counted_from_the_first_moment_of_shadow_vrings(
    disk: StorageDaemon, tmp_path: Path
) -> None:
    """Those that wait when the vrings begin pass before anybody could look at the counts."""
    with (
        Bridge(
            f"vhost-user:{disk.socket}", listen=tmp_path / "vm", arguments=["--shadow"]
        ) as bridge,
        blkio.start(bridge.listen, "randread", seconds=4, depth=32) as client,
    ):
        client.wait_for_output(blkio.RUNNING)
        for _ in range(20):
            bridge.operate("Suspend")
            bridge.operate("Resume")
        result = blkio.finish(client)
        assert first_vring(bridge)["requests"] == result["reads"]


def first_vring(bridge: Bridge) -> dict[str, Any]:
    (vring, *_) = json.loads(bridge.command("status", "-j").stdout)["bridges"][0]["vrings"]
    assert isinstance(vring, dict)
    return vring


def scrape(path: Path) -> str:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(str(path))
        sock.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        answer = b""
        while data := sock.recv(65536):
            answer += data
    return answer.decode()
