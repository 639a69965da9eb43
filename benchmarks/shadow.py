"""What shadow vrings cost beside the direct path, entering and leaving them, and switches."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.peers import blkio
from tests.peers.bridge import Bridge
from tests.peers.build import build_peer
from tests.peers.storage import StorageDaemon, make_image
from tests.vm.guest.frontend import ALL, LOG_SHMFD, VERSION_1, Frontend
from tests.vm.guest.memory import Memory
from tests.vm.guest.vring import SplitRing

from .host import BRIDGE, DISK, client, running, storage_daemon
from .measure import distribution, processor_seconds, spread, table

ROUNDS = 7
SECONDS = 1.0
TOGGLES = 200
LOADS = ((1, 1), (32, 1), (128, 1), (1, 2), (32, 2), (32, 4))  # requests at once, and queues


def cost(folder: Path) -> str:
    """IOPS and latency through shadow vrings over those of the direct path, alternating."""
    binary = build_peer("blkio_verify")
    behind = [folder / "behind0", folder / "behind1"]
    front = [folder / "direct", folder / "shadowed"]
    log = [folder / "direct.log", folder / "shadowed.log"]
    argv = [[BRIDGE, "serve", "--no-control", "--name", "b"] for _ in front]
    for words, listen, target in zip(argv, front, behind, strict=True):
        words += ["--listen", str(listen), "--backend", f"vhost-user:{target}"]
    argv[1].append("--shadow")
    rows = []
    with (
        running(storage_daemon(folder, behind, None, queues=4), behind[1], folder / "qsd.log"),
        running(argv[0], front[0], log[0]),
        running(argv[1], front[1], log[1]) as daemon,
    ):
        for depth, queues in LOADS:
            options = ["--depth", str(depth), "--queues", str(queues)]
            options += ["--seconds", f"{SECONDS:g}", "--size", str(DISK)]
            pairs, busy = [], []
            for number in range(ROUNDS):
                result = {}
                for which in (0, 1) if number % 2 else (1, 0):
                    before = processor_seconds(daemon.pid)
                    result[which] = client(binary, front[which], "randread", *options)
                    if which:
                        used = processor_seconds(daemon.pid) - before
                        busy.append(used / (result[which]["iops"] * SECONDS) * 1e6)
                pairs.append((result[1], result[0]))
            iops = [shadow["iops"] / direct["iops"] for shadow, direct in pairs]
            mean = [shadow["mean_ns"] / direct["mean_ns"] for shadow, direct in pairs]
            absolute = statistics.median(shadow["iops"] for shadow, _ in pairs)
            cells = [spread(iops), spread(mean), f"{absolute:,.0f}", spread(busy, 1)]
            many = f", {queues} queues" if queues > 1 else ""
            rows.append([f"randread QD{depth}{many}", *cells])
    head = ["4 KiB", "IOPS, shadow / direct", "mean latency, shadow / direct", "IOPS, shadow"]
    return table([*head, "daemon's µs of processor a request"], rows)


def toggling(folder: Path) -> str:
    """SET_FEATURES with and without LOG_ALL, from the message to its acknowledgement."""
    times: dict[bool, list[float]] = {True: [], False: []}
    image = make_image(folder / "image")
    memory = Memory()
    with (
        StorageDaemon(image, folder / "disk.sock") as disk,
        Bridge(
            f"vhost-user:{disk.socket}",
            listen=folder / "vm.sock",
            arguments=["--dirty-log", "shadow"],
        ) as bridge,
        Frontend(str(bridge.listen)) as frontend,
    ):
        frontend.negotiate(VERSION_1, ALL | LOG_SHMFD)
        frontend.set_memory([memory])
        frontend.start([SplitRing(memory)])
        size = (memory.guest + memory.size) // 4096 // 8
        with tempfile.TemporaryFile() as log:
            log.truncate(size)
            frontend.log_to(log.fileno(), size)
            for number in range(2 * TOGGLES):
                began = time.perf_counter()
                frontend.log_writes(number % 2 == 0)
                times[number % 2 == 0].append(time.perf_counter() - began)
    rows = [["enter", *distribution(times[True])], ["leave", *distribution(times[False])]]
    return table(["ms", "median", "p99", "max"], rows)


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
            for _ in range(TOGGLES):
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
        yield "Shadow vrings: libblkio and qemu-storage-daemon, no disk", cost(folder)
        yield "Entering and leaving shadow vrings", toggling(folder)
        yield "Switching between two storage daemons", switches(folder)
