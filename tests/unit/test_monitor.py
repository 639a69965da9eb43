"""The events of a daemon on its control socket, and the command that follows them."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.unit.commands import Run
from tests.unit.controlled import FakeBridge, daemon
from vhostbridge.backends.errors import BridgeError, TransportLost
from vhostbridge.bridge.control_client import ControlClient
from vhostbridge.bridge.events import QUEUE, Event, Kind
from vhostbridge.bridge.following import FOLLOWERS
from vhostbridge.bridge.monitoring import Monitor
from vhostbridge.bridge.varlink import Call

Tell = Callable[[Event], None]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    found = tmp_path / "vhost-bridge"
    found.mkdir()
    monkeypatch.setattr("vhostbridge.bridge.control_client.control_folder", lambda: found)
    return found


@pytest.fixture
def tell(folder: Path) -> Iterator[Tell]:
    with daemon(folder / "a.sock", FakeBridge("vm1"), FakeBridge("vm2")) as told:
        yield told


def test_states_come_first_and_then_what_happens(tell: Tell) -> None:
    with Monitor(["vm1"], None) as monitor:
        events = monitor.events(20)
        first = next(events)
        assert (first.bridge, first.kind, first.text) == ("vm1", "state", "running")
        tell(Event("vm2", Kind.SAVED, "not of interest"))
        tell(Event("vm1", Kind.PAUSE, "short", {"seconds": 0.5}, 1234.5))
        assert next(events) == Event("vm1", Kind.PAUSE, "short", {"seconds": 0.5}, 1234.5)


def test_all_daemons_are_followed_at_once(tell: Tell, folder: Path) -> None:
    with (
        daemon(folder / "b.sock", FakeBridge("vm3")) as tell_other,
        Monitor([], None) as monitor,
    ):
        events = monitor.events(20)
        assert {next(events).bridge for _ in range(3)} == {"vm1", "vm2", "vm3"}
        tell_other(Event("vm3", Kind.ERROR, "x"))
        assert next(events).bridge == "vm3"
        tell(Event("vm1", Kind.ERROR, "x"))
        assert next(events).bridge == "vm1"


def test_end_of_one_daemon_is_told_and_that_of_the_last_is_an_error(folder: Path) -> None:
    with ExitStack() as first, ExitStack() as second:
        first.enter_context(daemon(folder / "a.sock", FakeBridge("vm1")))
        second.enter_context(daemon(folder / "b.sock", FakeBridge("vm2")))
        with Monitor([], None) as monitor:
            events = monitor.events(20)
            assert {next(events).bridge for _ in range(2)} == {"vm1", "vm2"}
            first.close()
            assert "a.sock closed the connection" in next(events).text
            second.close()
            with pytest.raises(TransportLost, match="no daemon is left"):
                next(events)


def test_follower_that_does_not_read_holds_nobody_up_and_is_told_what_it_lost(
    tell: Tell, folder: Path
) -> None:
    count = 20 * QUEUE
    with (
        ControlClient(folder / "a.sock") as stuck,
        ControlClient(folder / "a.sock") as other,
    ):
        stuck.start("Monitor", names=["vm1"])
        assert stuck.take().parameters["event"]
        for number in range(count):
            tell(Event("vm1", Kind.STATE, str(number), {"padding": "x" * 200}))
        assert other.operate("Suspend", "vm1") == "suspended"
        seen, lost = 0, 0
        while seen + lost < count:
            event: dict[str, dict[str, int]] = stuck.take().parameters["event"]  # type: ignore[assignment]
            if str(event["event"]) == "lost":
                lost += event["details"]["count"]
            else:
                assert str(event["text"]) == str(seen + lost)
                seen += 1
        assert lost > 0 and seen >= QUEUE


def test_followers_are_limited_and_leave_room_when_they_go(tell: Tell, folder: Path) -> None:
    with ExitStack() as stack:
        for _ in range(FOLLOWERS):
            client = stack.enter_context(ControlClient(folder / "a.sock"))
            client.start("Monitor")
            client.take()
        with ControlClient(folder / "a.sock") as late:
            late.start("Monitor")
            with pytest.raises(BridgeError, match=f"{FOLLOWERS} followers of events are all"):
                late.take()
            assert late.bridges() == ["vm1", "vm2"]
    with ControlClient(folder / "a.sock") as client:
        client.start("Monitor")
        client.take()


@pytest.mark.parametrize(
    ("parameters", "more", "error"),
    [
        ({}, False, "ExpectedMore"),
        ({"names": "vm1"}, True, "InvalidParameter"),
        ({"names": ["vm1", 2]}, True, "InvalidParameter"),
        ({"names": ["vm3"]}, True, "NoSuchBridge"),
    ],
)
def test_calls_that_make_no_sense_are_refused(
    tell: Tell, folder: Path, parameters: dict[str, object], more: bool, error: str
) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(str(folder / "a.sock"))
        sock.sendall(Call("io.vhostbridge.Control.Monitor", parameters, more=more).encode())
        assert json.loads(sock.recv(65536)[:-1])["error"].endswith(f".{error}")


# The command


def test_event_is_a_line_or_a_json_object(run: Run, tell: Tell) -> None:
    ran = run("monitor", "vm1", "--until", "state")
    assert ran.code == 0 and ran.out.endswith(" vm1 state: running\n")
    ran = run("monitor", "-j", "vm1", "--until", "running")
    found = json.loads(ran.out)
    assert found.pop("time") > 1e9
    assert found == {
        "bridge": "vm1", "event": "state", "text": "running",
        "state": "running", "before": "running", "failure": "",
    }  # fmt: skip


def test_until_ends_at_an_event(run: Run, tell: Tell) -> None:
    timer = threading.Timer(0.1, tell, [Event("vm1", Kind.PAUSE, "x")])
    timer.start()
    ran = run("monitor", "--until", "pause", "--timeout", "20")
    timer.join()
    assert (ran.code, len(ran.out.splitlines())) == (0, 3)


def test_time_that_passes_is_an_exit_code_of_its_own(run: Run, tell: Tell) -> None:
    assert run("monitor", "--until", "failed", "--timeout", "0.05").code == 4
    assert run("monitor", "--timeout", "0.05").code == 0


def test_unknown_event_is_wrong_usage(run: Run, tell: Tell) -> None:
    ran = run("monitor", "--until", "runing")
    assert (ran.code, ran.err.splitlines()) == (
        2,
        ["vhost-bridge: there is no event or state 'runing'", "  hint: did you mean running?"],
    )


def test_no_daemon_is_one_line(run: Run) -> None:
    ran = run("monitor")
    assert (ran.code, ran.err.splitlines()[0]) == (
        1, "vhost-bridge: no daemon runs that this user may control",
    )  # fmt: skip


def test_daemon_that_ends_is_a_lost_connection(run: Run, folder: Path) -> None:
    with ExitStack() as stack:
        stack.enter_context(daemon(folder / "a.sock", FakeBridge()))
        timer = threading.Timer(0.2, stack.close)
        timer.start()
        assert run("monitor", "--timeout", "20").code == 3
        timer.join()
