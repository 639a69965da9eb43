"""``vhost-bridge switch``, against a daemon whose bridge does as it is told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.commands import Ran, Run
from tests.unit.controlled import FakeBridge, daemon
from vhostbridge.backends.errors import TargetError

BACKEND = "vhost-user:/run/disk.sock"


@pytest.fixture
def socket(tmp_path: Path) -> Path:
    return tmp_path / "control"


@pytest.fixture
def bridge(socket: Path) -> Iterator[FakeBridge]:
    fake = FakeBridge()
    with daemon(socket, fake):
        yield fake


def test_switch_tells_the_pause_and_its_parts(run: Run, bridge: FakeBridge, socket: Path) -> None:
    assert run("switch", "--control", socket, "vm1", BACKEND) == Ran(
        0,
        f"vm1: {BACKEND}, running, after a pause of 3.5 ms (suspend 1.0, state 0.5, resume 2.0)\n",
        "",
    )
    assert bridge.asked == [f"switch to {BACKEND}"]


def test_switch_as_json(run: Run, bridge: FakeBridge, socket: Path) -> None:
    report = json.loads(run("switch", "-j", "--control", socket, "vm1", BACKEND).out)
    assert report.pop("pause") == pytest.approx(0.0035)
    assert report == {
        "name": "vm1",
        "backend": BACKEND,
        "fits": True,
        "reasons": [],
        "switched": True,
        "state": "running",
        "prepare": 0.01,
        "phases": {"suspend": 0.001, "state": 0.0005, "resume": 0.002},
    }


def test_dry_run_says_that_it_would_work(run: Run, bridge: FakeBridge, socket: Path) -> None:
    ran = run("switch", "--control", socket, "--dry-run", "vm1", BACKEND)
    assert ran == Ran(0, f"vm1: {BACKEND} can take over\n", "")
    assert bridge.asked == [f"switch to {BACKEND} (dry run)"]


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_all_reasons_are_told(
    options: list[str], run: Run, bridge: FakeBridge, socket: Path
) -> None:
    bridge.reasons = ["its capacity is 1", "it lacks RING_PACKED"]
    ran = run("switch", "--control", socket, *options, "vm1", BACKEND)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.splitlines() == [
        f"vhost-bridge: {BACKEND} can't take vm1 over, for 2 reasons:",
        "  its capacity is 1",
        "  it lacks RING_PACKED",
    ]


def test_failure_is_one_line(run: Run, bridge: FakeBridge, socket: Path) -> None:
    bridge.error = TargetError("there is no socket /run/disk.sock", "start it")
    ran = run("switch", "--control", socket, "vm1", BACKEND)
    assert ran == Ran(1, "", "vhost-bridge: there is no socket /run/disk.sock\n  hint: start it\n")
