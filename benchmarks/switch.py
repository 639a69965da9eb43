"""In the virtual machine: the pause of moving a device under load, for each direction."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.rig.product import build_wheel
from tests.rig.vm import Vm
from tests.vm.checks import GuestChecks

from .measure import distribution, table

ROUNDS = 50
PARTS = ("suspend", "state", "resume")


def whole(found: Sequence[dict[str, float]]) -> list[float]:
    """The pauses as the daemon tells them."""
    return [sum(one[part] for part in PARTS) for one in found]


def seen(pauses: dict[str, Any]) -> Iterator[list[str]]:
    """The pause as the client sees it, beside what it sees without."""
    for direction, found in pauses["moves"].items():
        here = direction.partition(" to ")[0]
        still = middle(pauses["still"][here])
        yield [direction, *distribution([one["seen"] for one in found], 1), still]


def told(pauses: dict[str, Any]) -> Iterator[list[str]]:
    """The pause as the daemon tells it, in its parts, and how much of it is ours."""
    for direction, found in pauses["moves"].items():
        all_of_it = whole(found)
        ours = [pause - one["waited"] for pause, one in zip(all_of_it, found, strict=True)]
        yield [
            direction,
            *(middle([one[part] for one in found]) for part in PARTS),
            *distribution(all_of_it, 1),
            middle([one["waited"] for one in found]),
            *distribution(ours, 1),
        ]


def middle(seconds: Sequence[float]) -> str:
    """The median, in ms."""
    return f"{statistics.median(seconds) * 1e3:.1f}"


def measure() -> Iterator[tuple[str, str]]:
    """Titles and tables, as they come."""
    with Vm(wheel=build_wheel()) as vm:
        GuestChecks(vm, {})  # brings its modules
        (vm.share_host / "benchmarks").mkdir()
        for name in ("__init__.py", "phases.py", "pauses.py"):
            shutil.copy2(Path(__file__).with_name(name), vm.share_host / "benchmarks" / name)
        path = f"/run/checks:{vm.share_guest}:$PYTHONPATH"
        command = f"PYTHONPATH={path} python3 -m benchmarks.pauses {ROUNDS}"
        done = vm.run(command, timeout=3600, memlock=True)
        pauses = json.loads(done.stdout.splitlines()[-1])
    where = f"in an emulated machine, {ROUNDS} times each direction"
    yield (
        f"A client's slowest request around a switch, {where}",
        table(["ms", "median", "p99", "max", "without a switch, median"], list(seen(pauses))),
    )
    head = ["ms", *(f"{part}, median" for part in PARTS), "pause, median", "p99", "max"]
    head += ["devices' part, median", "our own part, median", "p99", "max"]
    yield (
        f"What the daemon tells of its pause, {where}",
        table(head, list(told(pauses))),
    )
