"""The commands that ask a daemon, and those that look at saved states."""

from __future__ import annotations

import json
import os
import re
import socket
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.commands import Ran, Run
from tests.unit.controlled import STATE, FakeBridge, daemon
from vhostbridge.backends.errors import InvalidTransition, TransportLost
from vhostbridge.backends.state import DeviceState, Encoder, VringState
from vhostbridge.backends.virtio import DeviceId
from vhostbridge.bridge import completion
from vhostbridge.cli import common


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where control sockets are found, in these tests."""
    found = tmp_path / "vhost-bridge"
    found.mkdir()
    monkeypatch.setattr("vhostbridge.bridge.control_client.control_folder", lambda: found)
    return found


@pytest.fixture
def bridge(folder: Path) -> Iterator[FakeBridge]:
    fake = FakeBridge()
    with daemon(folder / "many.sock", fake, FakeBridge("vm2", state="suspended")):
        yield fake


# Operations


def test_suspend_resume_and_reset_say_the_state(run: Run, bridge: FakeBridge) -> None:
    assert run("suspend", "vm1") == Ran(0, "vm1: suspended\n", "")
    assert run("resume", "vm1") == Ran(0, "vm1: running\n", "")
    ran = run("reset", "-j", "vm1")
    assert (ran.code, json.loads(ran.out)) == (0, {"name": "vm1", "state": "reset"})
    assert bridge.asked == ["suspend", "resume", "reset"]


def test_refusal_is_one_line_and_a_hint(run: Run, bridge: FakeBridge) -> None:
    bridge.error = InvalidTransition("cannot resume", "allowed now: suspend")
    assert run("resume", "vm1") == Ran(
        1, "", "vhost-bridge: cannot resume\n  hint: allowed now: suspend\n"
    )


def test_lost_back_end_has_the_exit_code_of_lost_connections(run: Run, bridge: FakeBridge) -> None:
    bridge.error = TransportLost("the back-end went away")
    assert run("suspend", "vm1").code == 3


def test_daemon_that_is_not_there_is_one_line(run: Run, tmp_path: Path) -> None:
    ran = run("suspend", "vm1")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.splitlines()[0] == "vhost-bridge: no bridge 'vm1'"
    ran = run("suspend", "vm1", "--control", tmp_path / "x")
    assert ran.code == 1
    assert ran.err.startswith(f"vhost-bridge: no daemon at {tmp_path}/x: there is no such socket\n")


def test_control_names_the_daemon(run: Run, tmp_path: Path) -> None:
    other = FakeBridge()
    with daemon(tmp_path / "other", other):
        assert run("suspend", "vm1", "--control", tmp_path / "other").code == 0
    assert other.asked == ["suspend"]


# status


def test_status_shows_a_bridge_and_where_its_vrings_disagree(run: Run, bridge: FakeBridge) -> None:
    bridge.state = "suspended"
    ran = run("status", "vm1")
    assert ran.code == 0
    assert ran.out.splitlines() == [
        "vm1: suspended, by an operator",
        "  device     block, vdpa:blk0",
        "  front-end  /run/vm1.sock, pid 4711",
        "  features   0x100000200 FLUSH VERSION_1",
        "  can't      dirty log",
        "  VRING  SIZE  STATE    BASE  AVAILABLE  USED  IN FLIGHT",
        "  0      256   stopped  9     12         7     -",
        "  vring 0: used index 7 is not the device's base 9",
    ]


def test_status_without_a_name_shows_all_bridges_of_all_daemons(
    run: Run, bridge: FakeBridge, folder: Path
) -> None:
    with daemon(folder / "vm3.sock", FakeBridge("vm3")):
        report = json.loads(run("status", "-j").out)
        text = run("status").out
    assert [one["name"] for one in report["bridges"]] == ["vm1", "vm2", "vm3"]
    assert re.findall(r"^(\w+): (\w+)", text, re.MULTILINE) == [
        ("vm1", "running"), ("vm2", "suspended"), ("vm3", "running"),
    ]  # fmt: skip


def test_status_as_json_has_what_the_bridge_told(run: Run, bridge: FakeBridge) -> None:
    (report,) = json.loads(run("status", "-j", "vm1").out)["bridges"]
    assert report["features"] == {"mask": "0x100000200", "names": ["FLUSH", "VERSION_1"]}
    assert (report["front_end"], report["held"], report["state"]) == (4711, False, "running")
    assert report["vrings"][0]["used"] == 7
    assert report["capabilities"]["dirty_log"] == {"how": "no", "why": "not offered"}


@pytest.mark.parametrize("device", [None, "type-99", "of the future"])
def test_status_of_a_device_of_unknown_type(
    device: str | None, run: Run, bridge: FakeBridge
) -> None:
    bridge.device = device
    ran = run("status", "vm1")
    assert ran.code == 0
    assert "VERSION_1" in ran.out


def test_status_shows_the_others_when_one_daemon_has_a_problem(
    run: Run, bridge: FakeBridge, folder: Path
) -> None:
    broken = FakeBridge("vm3")
    broken.error = InvalidTransition("no status of vm3")
    with daemon(folder / "broken.sock", broken):
        ran = run("status")
    assert ran.code == 1
    assert "vm1: running" in ran.out and "vm2: suspended" in ran.out
    assert ran.err == "vhost-bridge: no status of vm3\n"


def test_status_of_nothing_is_nothing(run: Run) -> None:
    assert run("status") == Ran(0, "", "")
    assert json.loads(run("status", "-j").out) == {"bridges": []}


# save and load


def test_save_writes_the_file_for_its_user_alone(
    run: Run, bridge: FakeBridge, tmp_path: Path
) -> None:
    file = tmp_path / "s"
    ran = run("save", "vm1", file)
    assert ran == Ran(0, "vm1: 1.7 KiB saved\n", "")
    assert file.read_bytes() == STATE
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    report = json.loads(run("save", "-j", "vm1", file).out)
    assert report == {"name": "vm1", "file": str(file), "bytes": len(STATE)}


def test_save_to_standard_output_writes_nothing_else_there(
    run: Run, bridge: FakeBridge, folder: Path
) -> None:
    assert run("save", "vm1", "-") == Ran(0, STATE.decode(), "vm1: 1.7 KiB saved\n")
    ran = run("save", "-j", "vm1", "-")
    assert ran.out == STATE.decode()
    assert json.loads(ran.err)["bytes"] == len(STATE)


def test_save_that_fails_leaves_the_file_as_it_was(
    run: Run, bridge: FakeBridge, tmp_path: Path
) -> None:
    (tmp_path / "s").write_bytes(b"before")
    bridge.error = InvalidTransition("it runs")
    assert run("save", "vm1", tmp_path / "s").code == 1
    assert (tmp_path / "s").read_bytes() == b"before"
    assert sorted(os.listdir(tmp_path)) == ["s", "vhost-bridge"]


def test_save_to_where_no_file_can_be(run: Run, bridge: FakeBridge, tmp_path: Path) -> None:
    ran = run("save", "vm1", tmp_path / "none" / "s")
    assert ran.code == 1
    assert ran.err.startswith("vhost-bridge: cannot write ")
    assert bridge.asked == []


def test_states_are_not_for_terminals(
    run: Run, bridge: FakeBridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert run("save", "vm1", "-").code == 2
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert run("load", "vm1", "-").code == 2
    assert run("state", "show", "-").code == 2
    assert bridge.asked == []


def test_load_from_a_file(run: Run, bridge: FakeBridge, tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes(STATE)
    assert run("load", "vm1", tmp_path / "s", "--dry-run") == Ran(0, "vm1: the state fits\n", "")
    assert run("load", "vm1", tmp_path / "s") == Ran(0, "vm1: loaded, suspended\n", "")
    assert bridge.asked == ["dry run", "load"]
    assert bridge.loaded == STATE


def test_load_from_standard_input(
    run: Run, bridge: FakeBridge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "s").write_bytes(STATE)
    with open(tmp_path / "s", "rb") as file:
        monkeypatch.setattr(sys, "stdin", file)
        ran = run("load", "-j", "vm1", "-")
    assert json.loads(ran.out) == {
        "name": "vm1", "file": "-", "fits": True, "loaded": True, "reasons": [],
        "state": "suspended",
    }  # fmt: skip
    assert bridge.loaded == STATE


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_load_tells_all_reasons_and_fails(
    options: list[str], run: Run, bridge: FakeBridge, tmp_path: Path
) -> None:
    (tmp_path / "s").write_bytes(STATE)
    bridge.reasons = ["the device is too small", "a feature is missing"]
    ran = run("load", "vm1", tmp_path / "s", *options)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.splitlines() == [
        f"vhost-bridge: vm1 can't take the state of {tmp_path}/s over, for 2 reasons:",
        "  the device is too small",
        "  a feature is missing",
    ]
    report = json.loads(run("load", "-j", "vm1", tmp_path / "s", *options).out)
    assert (report["fits"], report["loaded"]) == (False, False)
    assert report["reasons"] == bridge.reasons


def test_load_of_a_file_that_is_not_there(run: Run, bridge: FakeBridge, tmp_path: Path) -> None:
    ran = run("load", "vm1", tmp_path / "s")
    assert ran.code == 1
    assert ran.err == f"vhost-bridge: cannot read {tmp_path}/s: No such file or directory\n"


# Progress


def test_progress_is_for_terminals_only(capfd: pytest.CaptureFixture[str]) -> None:
    with common.progress_line("saving,") as show:
        show(5000)
    assert capfd.readouterr().err == ""


def test_progress_is_one_line_that_goes(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    clock = iter(range(1, 10))
    monkeypatch.setattr(common, "monotonic", lambda: next(clock))
    with common.progress_line("loading,", 4096) as show:
        show(1024)
        show(4096)
    lines = capfd.readouterr().err.split("\r")
    assert [line.rstrip() for line in lines] == [
        "", "loading, 1.0 KiB (25 %)", "loading, 4.0 KiB (100 %)", "", "",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1024, "1.0 KiB"), (5 << 30, "5.0 GiB")],
)
def test_sizes_for_people(count: int, text: str) -> None:
    assert common.size_text(count) == text


# Completion


def test_names_of_bridges_are_completed(bridge: FakeBridge, folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(folder / "dead.sock"))
    assert completion.bridges("", None) == ["vm1", "vm2"]
    assert completion.bridges("vm2", None) == ["vm2"]
    assert completion.bridges("", folder / "none") == []


# Saved states


def write_state(path: Path, internal: bytes = b"", **changes: Any) -> Path:
    """A state of a block device, or what differs."""
    values = {
        "transport": "vdpa",
        "device_id": int(DeviceId.BLOCK),
        "features": 1 << 32,
        "queue_num": 1,
        "config": bytes(60),
        "vrings": (VringState(0, 256, 17, True, 0x1000, 0x2000, 0x3000),),
        "internal_owner": "test" if internal else None,
    }
    state = DeviceState(**{**values, **changes})
    encoder = Encoder()
    chunks = [encoder.begin(state), *([encoder.internal(internal)] if internal else [])]
    path.write_bytes(b"".join([*chunks, encoder.end()]))
    return path


def test_state_show_tells_what_is_in_it(run: Run, tmp_path: Path) -> None:
    file = write_state(tmp_path / "s", b"internal")
    ran = run("state", "show", file)
    assert ran.code == 0
    assert f"{file}: block, saved on vdpa by vhost-bridge" in ran.out
    assert "8 bytes of test" in ran.out
    assert re.search(r"^  0 +request0 +256 +17 +yes +0 +0x1000$", ran.out, re.MULTILINE)
    report = json.loads(run("state", "show", "-j", file).out)
    assert report["vrings"][0]["base"] == 17
    assert report["bytes"] == file.stat().st_size
    assert report["internal"]["bytes"] == 8


def test_state_show_reads_standard_input(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open(write_state(tmp_path / "s")) as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert run("state", "show", "-").out.startswith("-: block, saved on vdpa")


def test_state_diff_tells_what_differs_and_fails(run: Run, tmp_path: Path) -> None:
    a = write_state(tmp_path / "a")
    moved = (VringState(0, 256, 18, True, 0x1000, 0x2000, 0x3000),)
    b = write_state(tmp_path / "b", b"x", vrings=moved, transport="vhost-user")
    assert run("state", "diff", a, a) == Ran(0, "", "")
    ran = run("state", "diff", a, b)
    assert ran.code == 1
    assert ran.out.splitlines()[:2] == ["transport: vdpa -> vhost-user", "vring.0.base: 17 -> 18"]
    report = json.loads(run("state", "diff", "-j", a, b).out)
    assert {"what": "vring.0.base", "a": 17, "b": 18} in report["differences"]


def test_state_diff_sees_other_internal_state(run: Run, tmp_path: Path) -> None:
    a, b = write_state(tmp_path / "a", b"x"), write_state(tmp_path / "b", b"y")
    ran = run("state", "diff", a, b)
    assert ran.code == 1
    assert re.fullmatch(r"internal\.sha256: \w{64} -> \w{64}\n", ran.out)


def test_state_verify_checks_all_and_fails_if_one_is_damaged(run: Run, tmp_path: Path) -> None:
    good, bad = write_state(tmp_path / "good"), tmp_path / "bad"
    bad.write_bytes(good.read_bytes()[:-1])
    assert run("state", "verify", good).code == 0
    ran = run("state", "verify", bad, tmp_path / "none", good)
    assert ran.code == 1
    assert f"{bad}: the device state is cut short" in ran.err
    assert f"cannot read {tmp_path}/none" in ran.err
    assert ran.out == f"{good}: whole, {good.stat().st_size} bytes\n"
    report = json.loads(run("state", "verify", "-j", bad, good).out)
    assert [one["ok"] for one in report["files"]] == [False, True]


@pytest.mark.parametrize("command", ["show", "diff", "verify"])
def test_every_state_command_explains_itself_with_examples(command: str, run: Run) -> None:
    ran = run("state", command, "--help")
    assert ran.code == 0
    assert f"state {command} " in ran.out.partition("Examples:")[2]


def test_state_without_a_command_prints_help_on_standard_error(run: Run) -> None:
    ran = run("state")
    assert (ran.code, ran.out) == (2, "") and "verify" in ran.err
    ran = run("state", "verfy")
    assert ran.code == 2
    assert ran.err == ("vhost-bridge: there is no command 'verfy'\n  hint: did you mean verify?\n")
