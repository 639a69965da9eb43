"""In the virtual machine: the pause of moving a device under load, for each direction."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path

from tests.rig.product import build_wheel
from tests.rig.vm import Vm
from tests.vm.checks import GuestChecks

from .measure import table

ROUNDS = 50
PARTS = ("suspend", "state", "resume")


def rows(pauses: dict[str, list[dict[str, float]]]) -> Iterator[list[str]]:
    for direction, found in pauses.items():
        whole = sorted(sum(one[part] for part in PARTS) for one in found)
        ours = [sum(one[part] for part in PARTS) - one["waited"] for one in found]
        values = [
            *(statistics.median(one[part] for one in found) for part in PARTS),
            *(statistics.median(whole), whole[int(len(whole) * 0.99)], whole[-1]),
            statistics.median(ours),
        ]
        yield [direction, *(f"{value * 1e3:.1f}" for value in values)]


def measure() -> Iterator[tuple[str, str]]:
    """Titles and tables, as they come."""
    with Vm(wheel=build_wheel()) as vm:
        GuestChecks(vm, {})  # brings its modules
        (vm.share_host / "benchmarks").mkdir()
        for name in ("__init__.py", "phases.py", "pauses.py"):
            shutil.copy2(Path(__file__).with_name(name), vm.share_host / "benchmarks" / name)
        path = f"/run/checks:{vm.share_guest}:$PYTHONPATH"
        command = f"PYTHONPATH={path} python3 -m benchmarks.pauses {ROUNDS}"
        done = vm.run(command, timeout=900, memlock=True)
        pauses = json.loads(done.stdout.splitlines()[-1])
        head = ["ms", *(f"{part}, median" for part in PARTS), "pause, median", "p99", "max"]
        yield (
            f"Switching in an emulated machine, {ROUNDS} times each direction",
            table([*head, "our own part, median"], list(rows(pauses))),
        )
