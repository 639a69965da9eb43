"""What tracing costs: the same daemon twice over, one of them with ``--trace``, in turn."""

from __future__ import annotations

import signal
import statistics
import tempfile
import time
import timeit
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from tests.peers import blkio
from tests.peers.bridge import Bridge
from tests.peers.build import build_peer
from tests.peers.storage import StorageDaemon, make_image
from vhostbridge.backends.trace import Tracer

from .host import client
from .measure import processor_seconds, spread, table

ROUNDS = 7
PAIRS = 50
CONNECTS = 10
SECONDS = 2


class Bench:
    """Two bridges on disks of their own; the second one traces."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.bridges: list[Bridge] = []
        self.trace = folder / "trace"
        options: dict[str, list[str | Path]] = {"off": [], "on": ["--trace", self.trace]}
        for name, more in options.items():
            image = make_image(folder / f"{name}.img", 64 << 20)
            disk = stack.enter_context(StorageDaemon(image, folder / f"{name}.disk"))
            bridge = Bridge(
                f"vhost-user:{disk.socket}", name=name, listen=folder / name, arguments=more
            )
            self.bridges.append(stack.enter_context(bridge))

    def in_turn(self, number: int) -> list[Bridge]:
        return self.bridges if number % 2 else self.bridges[::-1]


def ratios(found: dict[Bridge, list[float]], bench: Bench) -> tuple[str, str]:
    """The middle value without, and what it is with, as a ratio for each round."""
    off, on = (found[bridge] for bridge in bench.bridges)
    return f"{statistics.median(off):,.2f}", spread([b / a for a, b in zip(off, on, strict=True)])


def operations(bench: Bench) -> list[tuple[str, ...]]:
    """Suspend and resume of a device that runs, whose front-end is quiet."""
    rate: dict[Bridge, list[float]] = {bridge: [] for bridge in bench.bridges}
    used: dict[Bridge, list[float]] = {bridge: [] for bridge in bench.bridges}
    with ExitStack() as stack:
        for bridge in bench.bridges:
            load = stack.enter_context(
                blkio.start(bridge.listen, "randread", seconds=600, depth=1, size=4096)
            )
            load.wait_for_output(blkio.RUNNING)
            bridge.wait_for_output("running vrings")
            # With requests in flight libvhost-user may break when it is stopped.
            load.signal(signal.SIGSTOP)
            stack.callback(load.kill)
        for number in range(ROUNDS):
            for bridge in bench.in_turn(number):
                before, began = processor_seconds(bridge.pid), time.monotonic()
                for _ in range(PAIRS):
                    bridge.operate("Suspend")
                    bridge.operate("Resume")
                rate[bridge].append(2 * PAIRS / (time.monotonic() - began))
                used[bridge].append((processor_seconds(bridge.pid) - before) * 1000 / PAIRS / 2)
    return [
        ("operations a second (suspend, resume)", *ratios(rate, bench)),
        ("daemon's processor time for one, ms", *ratios(used, bench)),
    ]


def connecting(bench: Bench) -> tuple[str, ...]:
    binary = build_peer("blkio_verify")
    found: dict[Bridge, list[float]] = {bridge: [] for bridge in bench.bridges}
    for number in range(ROUNDS):
        for bridge in bench.in_turn(number):
            took = []
            for _ in range(CONNECTS):
                options = ("--rounds", "1", "--depth", "1", "--size", "4096")
                took.append(client(binary, bridge.listen, "randread", *options)["first_ns"] / 1e6)
                time.sleep(0.15)  # connections are accepted at a bounded rate
            found[bridge].append(statistics.median(took))
    return ("connect to first completed request, ms", *ratios(found, bench))


def requests(bench: Bench, depth: int) -> tuple[str, ...]:
    binary = build_peer("blkio_verify")
    found: dict[Bridge, list[float]] = {bridge: [] for bridge in bench.bridges}
    for number in range(ROUNDS):
        for bridge in bench.in_turn(number):
            options = ("--depth", str(depth), "--seconds", str(SECONDS))
            found[bridge].append(client(binary, bridge.listen, "randread", *options)["iops"])
    return (f"randread QD{depth}, IOPS", *ratios(found, bench))


def idle(bench: Bench) -> str:
    """Processor time, in ms, and bytes of trace while nothing but requests happens."""
    found = []
    for bridge in bench.bridges:
        with blkio.start(bridge.listen, "randread", seconds=600, depth=32) as load:
            load.wait_for_output(blkio.RUNNING)
            time.sleep(SECONDS)  # the set-up is over
            before, size = processor_seconds(bridge.pid), bench.trace.stat().st_size
            time.sleep(SECONDS)
            used = (processor_seconds(bridge.pid) - before) * 1000
            found.append(f"{used:.0f} ms, {bench.trace.stat().st_size - size} bytes of trace")
            load.kill()
    return f"During {SECONDS} s of randread QD32 the daemon used: off {found[0]}; on {found[1]}."


def flag() -> str:
    """Nanoseconds of the look that it costs when nobody traces."""
    tracer, count = Tracer(), 1_000_000
    plain = timeit.timeit("pass", number=count)
    looked = timeit.timeit("if tracer.on: pass", number=count, globals={"tracer": tracer})
    return f"{(looked - plain) / count * 1e9:.0f}"


def measure() -> Iterator[tuple[str, str]]:
    """Titles and tables, as they come."""
    with tempfile.TemporaryDirectory(prefix="vhost-bridge-bench-") as name, ExitStack() as stack:
        folder = Path(name)
        bench = Bench(folder, stack)
        rows = [*operations(bench), connecting(bench), requests(bench, 1), requests(bench, 32)]
        data_path = idle(bench)
        size = bench.trace.stat().st_size / 1024
    head = ["", "off", f"on / off, median (least-greatest) of {ROUNDS}"]
    yield (
        "Tracing",
        table(head, rows)
        + f"\n\nOff, it is one look at a flag for each message: {flag()} ns. "
        + f"What was traced here is {size:,.0f} KiB.\n\n{data_path}",
    )
