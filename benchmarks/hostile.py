"""What a hostile front-end costs another bridge of the same daemon.

The attacker takes a processor wherever it attacks. So the victim is measured, in turn, with the
attacker at another bridge of its own daemon and with it at another daemon. The victim's daemon,
back-end and clients have one processor, the attacker and the other daemon have the other one. What
differs is what the victim's daemon lets the attacker take.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from tests.peers.build import build_peer
from vhostbridge.bridge.control_client import ControlClient

from .attacker import KINDS
from .host import BRIDGE, client, running, storage_daemon
from .measure import processor_seconds, table

ROUNDS = int(os.environ.get("VHOST_BRIDGE_ROUNDS", "7"))
SECONDS = 1.0
OPERATIONS = ("status, a second", "suspend and resume, a second", "connections, a second", "IOPS")


def _config(folder: Path, name: str) -> list[str]:
    path = folder / f"{name}.toml"
    path.write_text(
        f'control = "{folder / name}.control"\n'
        + "".join(
            f'[[bridge]]\nname = "{one}"\nlisten = "{folder / name}.{one}"\n'
            f'backend = "vhost-user:{folder / name}.{one}.disk"\nshadow = {shadow}\n'
            for one, shadow in (("good", "false"), ("bad", "true"))
        )
    )
    return [BRIDGE, "serve", "--config", str(path)]


def _daemon(
    folder: Path, name: str, processor: int
) -> AbstractContextManager[subprocess.Popen[bytes]]:
    argv = ["taskset", "-c", str(processor), *_config(folder, name)]
    return running(argv, folder / f"{name}.control", folder / f"{name}.log")


@contextmanager
def _attacker(kind: str, path: Path, processor: int) -> Iterator[None]:
    argv = ["taskset", "-c", str(processor), sys.executable, "-m", "benchmarks.attacker"]
    process = subprocess.Popen([*argv, kind, str(path)])
    try:
        time.sleep(3)  # until bursts are used up
        yield
    finally:
        process.kill()
        process.wait()


def _status(control: ControlClient) -> float:
    began, count = time.monotonic(), 0
    while time.monotonic() - began < SECONDS:
        control.status("good")
        count += 1
    return count / (time.monotonic() - began)


def _rounds(control: ControlClient) -> float:
    began, count = time.monotonic(), 0
    while time.monotonic() - began < SECONDS:
        control.operate("Suspend", "good")
        control.operate("Resume", "good")
        count += 1
    return count / (time.monotonic() - began)


def _connections(binary: Path, socket: Path) -> float:
    times = [
        client(binary, socket, "randread", "--rounds", "1", "--size", "4096")["first_ns"]
        for _ in range(5)
    ]
    return float(1e9 / statistics.median(times))


def _measure(folder: Path, binary: Path) -> dict[str, float]:
    socket, found = folder / "one.good", {}
    with ControlClient(folder / "one.control") as control:
        found[OPERATIONS[0]] = _status(control)
        guest = subprocess.Popen(
            [sys.executable, "-c", _GUEST, str(binary), str(socket)], stdout=subprocess.PIPE
        )
        assert guest.stdout is not None
        while control.status("good")[0].state != "running":
            time.sleep(0.01)
        found[OPERATIONS[1]] = _rounds(control)
        guest.wait(60)
    found[OPERATIONS[2]] = _connections(binary, socket)
    options = ("--depth", "32", "--seconds", "1")
    found[OPERATIONS[3]] = client(binary, socket, "randread", *options)["iops"]
    return found


# A front-end of the victim's whose device is there to be suspended.
_GUEST = """
import sys
from pathlib import Path
from benchmarks.host import client
client(Path(sys.argv[1]), Path(sys.argv[2]), "randread", "--depth", "1", "--seconds", "2.5")
"""


def _row(folder: Path, binary: Path, kind: str, pid: int) -> list[object]:
    ratios: dict[str, list[float]] = {name: [] for name in OPERATIONS}
    used = []
    for number in range(ROUNDS):
        found = {}
        for target in ("one", "two") if number % 2 else ("two", "one"):
            with _attacker(kind, folder / f"{target}.bad", 1):
                before, began = processor_seconds(pid), time.monotonic()
                found[target] = _measure(folder, binary)
                if target == "one":
                    used.append((processor_seconds(pid) - before) / (time.monotonic() - began))
        for name in OPERATIONS:
            ratios[name].append(found["one"][name] / found["two"][name])
    middle = [f"{statistics.median(ratios[name]):.3f}" for name in OPERATIONS]
    return [kind, *middle, f"{statistics.median(used):.0%}"]


def measure() -> Iterator[tuple[str, str]]:
    """One table: each attack, and how much of each of its operations the victim keeps."""
    kinds = os.environ.get("VHOST_BRIDGE_ATTACKS", "").split() or list(KINDS)
    everywhere = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {0})
    try:
        yield "Another bridge under attack", _table(kinds)
    finally:
        os.sched_setaffinity(0, everywhere)


def _table(kinds: list[str]) -> str:
    with tempfile.TemporaryDirectory(prefix="vhost-bridge-bench-") as name:
        folder, binary = Path(name), build_peer("blkio_verify")
        disks = [folder / f"{d}.{b}.disk" for d in ("one", "two") for b in ("good", "bad")]
        with (
            running(storage_daemon(folder, disks, None), disks[-1], folder / "disks.log"),
            _daemon(folder, "one", 0) as one,
            _daemon(folder, "two", 1),
        ):
            rows = [_row(folder, binary, kind, one.pid) for kind in kinds]
    head = ["attack", *(f"{name}: kept" for name in OPERATIONS), "the daemon's processor time"]
    return table(head, rows)
