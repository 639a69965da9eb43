"""What suspending, saving, loading and resuming cost, and how fast internal state streams."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tests.host.test_model_internal import suspended
from tests.peers import stateful
from tests.peers.bridge import COMMAND
from tests.peers.storage import StorageDaemon, make_image
from tests.rig.product import build_wheel
from tests.rig.vm import Vm

from . import phases
from .measure import memory_kib, table

ROUNDS = 200
MIB = 1 << 20
SIZES = (0, 64 * MIB, 1024 * MIB, 4096 * MIB)
SCRIPT = Path(phases.__file__)

Took = Sequence[Mapping[str, Sequence[float]]]


def distribution(took: Took) -> str:
    """Median, p99 and maximum of each phase, and what of it is ours."""
    rows = []
    for phase in phases.PHASES:
        total = sorted(one[phase][0] for one in took)
        own = statistics.median(one[phase][0] - one[phase][1] for one in took)
        p99 = total[int(len(total) * 0.99) - 1]
        ours = "" if phase == "pause" else f"{own:.2f}"
        middle = statistics.median(total)
        rows.append([phase, f"{middle:.2f}", f"{p99:.2f}", f"{total[-1]:.2f}", ours])
    return table(["ms", "median", "p99", "max", "our own part, median"], rows)


def vhost_user(folder: Path) -> str:
    image = make_image(folder / "image")
    with StorageDaemon(image, folder / "disk.sock") as daemon:
        argv = [sys.executable, "-m", "benchmarks.phases", f"vhost-user:{daemon.socket}"]
        done = subprocess.run([*argv, str(ROUNDS)], check=True, capture_output=True, text=True)
    return distribution(json.loads(done.stdout))


def vdpa() -> Iterator[tuple[str, str]]:
    with Vm(wheel=build_wheel()) as vm:
        shutil.copy2(SCRIPT, vm.share_host / SCRIPT.name)
        vm.run("vdpa dev add name blk0 mgmtdev vdpasim_blk")
        argv = ["python3", f"{vm.share_guest}/{SCRIPT.name}", "vdpa:blk0", str(ROUNDS)]
        done = vm.run(argv, timeout=300)
        yield "Phases on vdpa_sim_blk (emulated machine)", distribution(json.loads(done.stdout))


def rate(argv: Sequence[str | Path], size: int) -> float:
    """Seconds until a program has written all of that into a pipe."""
    began = time.perf_counter()
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as program:
        assert program.stdout is not None
        buffer = memoryview(bytearray(MIB))
        count = 0
        while got := program.stdout.readinto(buffer):  # type: ignore[attr-defined]
            count += got
    assert program.returncode == 0 and count >= size
    return time.perf_counter() - began


PLAIN = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from tests.peers.stateful import Backend
Backend(int(sys.argv[1])).save(1)
"""


def internal() -> str:
    """Through the back-end's pipe, the daemon and the command's, beside one plain pipe."""
    rows = []
    for size in SIZES:
        with (
            tempfile.TemporaryDirectory(prefix="vhost-bridge-bench-") as name,
            suspended(Path(name), size) as (bridge, _),
        ):
            argv: list[str | Path] = [COMMAND, "save", "--control", bridge.control, "b", "-"]
            seconds = rate(argv, size)
            peak = memory_kib(bridge.pid, "VmHWM")
        plain = rate([sys.executable, "-c", PLAIN, str(size)], size)
        gib = size / (1 << 30)
        cells = [f"{gib / t:.2f}" for t in (seconds, plain)] if size else ["", ""]
        rows.append([f"{gib:g} GiB", f"{seconds:.2f}", *cells, f"{peak / 1024:.0f}"])
    head = ["state", "save, s", "GiB/s", "plain pipe, GiB/s", "daemon's peak memory, MiB"]
    return table(head, rows)


def measure() -> Iterator[tuple[str, str]]:
    """Titles and tables, as they come."""
    assert stateful.PIECE == MIB
    with tempfile.TemporaryDirectory(prefix="vhost-bridge-bench-") as name:
        yield "Phases on qemu-storage-daemon's vhost-user-blk", vhost_user(Path(name))
    yield from vdpa()
    yield "Internal state of a back-end", internal()
