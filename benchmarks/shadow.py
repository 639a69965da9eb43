"""What shadow vrings cost beside the direct path, entering and leaving them, and switches."""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.peers import blkio
from tests.peers.bridge import Bridge
from tests.peers.build import build_peer
from tests.peers.storage import StorageDaemon, make_image

from . import toggle
from .host import BRIDGE, DISK, client, running, storage_daemon
from .measure import distribution, processor_seconds, spread, table

ROUNDS = 5
SECONDS = 1.0
SETTLE = 0.05  # after a client has left, seconds until its processor time is all counted
SWITCHES = 200
DEPTHS, QUEUES = (1, 32, 128), (1, 2, 3, 4)  # requests at once on each queue
COST = "Shadow vrings: libblkio and qemu-storage-daemon, no disk; depth is of each queue"


@dataclass(frozen=True, slots=True)
class Run:
    """What one run of the client told, and the processor time of others, in µs a request."""

    iops: float
    mean: float
    p99: float
    daemon: float
    together: float  # daemon and back-end


@dataclass(frozen=True, slots=True)
class Way:
    """A bridge's socket, and the processes that work for a client there."""

    socket: Path
    daemon: int
    back_end: int

    def run(self, *options: str) -> Run:
        """Read at random for a while."""
        before = self._used()
        told = client(build_peer("blkio_verify"), self.socket, "randread", *options)
        time.sleep(SETTLE)
        daemon, back_end = (
            (now - then) / told["reads"] * 1e6
            for now, then in zip(self._used(), before, strict=True)
        )
        mean, p99 = (told[name] / 1e3 for name in ("mean_ns", "p99_ns"))
        return Run(told["iops"], mean, p99, daemon, daemon + back_end)

    def _used(self) -> tuple[float, float]:
        return processor_seconds(self.daemon), processor_seconds(self.back_end)


def in_turn(direct: Way, shadow: Way, *options: str) -> Iterator[tuple[Run, Run]]:
    """Run both, again and again, the first one first or last."""
    for number in range(ROUNDS):
        if number % 2:
            yield direct.run(*options), shadow.run(*options)
        else:
            late = shadow.run(*options)
            yield direct.run(*options), late


def middles(runs: Sequence[tuple[Run, Run]]) -> list[str]:
    """The columns that are no ratios."""

    def both(name: str) -> list[float]:
        return [statistics.median(getattr(run[way], name) for run in runs) for way in (0, 1)]

    latency = [f"{value:,.1f}" for name in ("mean", "p99") for value in both(name)]
    used = [*both("together"), both("daemon")[1]]
    return [f"{both('iops')[1]:,.0f}", *latency, *(f"{value:.2f}" for value in used)]


def cost(folder: Path) -> str:
    """Shadow vrings over the direct path, in turn: IOPS, latency, and processor time."""
    behind = [folder / "behind0", folder / "behind1"]
    front = [folder / "direct", folder / "shadowed"]
    log = [folder / "direct.log", folder / "shadowed.log"]
    argv = [[BRIDGE, "serve", "--no-control", "--name", "b"] for _ in front]
    for words, listen, target in zip(argv, front, behind, strict=True):
        words += ["--listen", str(listen), "--backend", f"vhost-user:{target}"]
    argv[1].append("--shadow")
    storage = storage_daemon(folder, behind, None, queues=max(QUEUES))
    rows = []
    with (
        running(storage, behind[1], folder / "qsd.log") as disk,
        running(argv[0], front[0], log[0]) as one,
        running(argv[1], front[1], log[1]) as two,
    ):
        direct, shadow = Way(front[0], one.pid, disk.pid), Way(front[1], two.pid, disk.pid)
        for depth, queues in itertools.product(DEPTHS, QUEUES):
            options = ["--depth", str(depth), "--queues", str(queues)]
            options += ["--seconds", f"{SECONDS:g}", "--size", str(DISK)]
            runs = list(in_turn(direct, shadow, *options))
            iops = [b.iops / a.iops for a, b in runs]
            mean = [b.mean / a.mean for a, b in runs]
            many = f", {queues} queues" if queues > 1 else ""
            rows.append([f"randread QD{depth}{many}", spread(iops), spread(mean), *middles(runs)])
    head = ["4 KiB", "IOPS, shadow / direct", "mean latency, shadow / direct", "IOPS, shadow"]
    head += [f"{what}, µs, {way}" for what in ("mean", "p99") for way in ("direct", "shadow")]
    head += [f"daemon and back-end, µs a request, {way}" for way in ("direct", "shadow")]
    return table([*head, "daemon alone, shadow"], rows)


def switches(folder: Path) -> str:
    """The parts of the pause, under a random load of reads and writes."""
    image = make_image(folder / "moving")
    options: dict[str, object] = {"size": 4 << 20, "state": folder / "state", "seed": 5}
    phases: dict[str, list[float]] = {}
    with (
        StorageDaemon(image, folder / "one.sock") as one,
        StorageDaemon(image, folder / "two.sock") as two,
        Bridge(f"vhost-user:{one.socket}", listen=folder / "moving.sock") as bridge,
    ):
        blkio.run(bridge.listen, "fill", **options)
        with blkio.start(bridge.listen, "write-read", depth=8, seconds=600, **options) as load:
            load.wait_for_output(blkio.RUNNING)
            target = two
            for _ in range(SWITCHES):
                done = bridge.command("switch", f"vhost-user:{target.socket}", "-j", check=False)
                if done.returncode == 0:
                    report = json.loads(done.stdout)
                    for name, took in {**report["phases"], "pause": report["pause"]}.items():
                        phases.setdefault(name, []).append(took)
                    target = one if target is two else two
            load.kill()
    rows = [[name, *distribution(took)] for name, took in phases.items()]
    count = len(phases["pause"])
    return table([f"ms, {count} switches", "median", "p99", "max"], rows)


def measure() -> Iterator[tuple[str, str]]:
    """Titles and tables, as they come."""
    with tempfile.TemporaryDirectory(prefix="vhost-bridge-bench-") as name:
        folder = Path(name)
        yield f"{COST} ({ROUNDS} rounds of {SECONDS:g} s)", cost(folder)
        yield toggle.TITLE, toggle.toggling(folder)
        yield "Switching between two storage daemons, under load", switches(folder)
