"""On the host: libblkio and qemu-storage-daemon, with and without the bridge between them.

One qemu-storage-daemon exports the same kind of disk on two sockets; one goes through the bridge.
The two are measured in turn, so that the machine's moods hit both.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.peers.build import build_peer
from tests.rig.root import peer_argv

from .measure import memory_kib, processor_seconds, spread, table

BRIDGE = str(Path(sys.executable).with_name("vhost-bridge"))
ROUNDS = 7
SECONDS = 2
DISK = 64 << 20
MANY = 256


@contextmanager
def running(argv: list[str], ready: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is up when the socket ``ready`` is there."""
    with log.open("wb") as stream:
        process = subprocess.Popen(argv, stdout=stream, stderr=stream)
    try:
        deadline = time.monotonic() + 30
        while not ready.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{argv[0]} did not start:\n{log.read_text()}")
            time.sleep(0.002)
        yield process
    finally:
        process.terminate()
        process.wait(60)


def storage_daemon(
    folder: Path, sockets: list[Path], image: Path | None, *, queues: int = 1
) -> list[str]:
    """qemu-storage-daemon with one vhost-user-blk export, and one disk, for every socket."""
    argv = ["qemu-storage-daemon"]
    for number, socket in enumerate(sockets):
        if image is None:
            disk = f"driver=null-co,read-zeroes=on,size={DISK},node-name=d{number}"
        else:
            own = folder / f"{number}.img"
            shutil.copy2(image, own)
            disk = f"driver=file,filename={own},node-name=d{number}"
        argv += ["--blockdev", disk]
        argv += [
            "--export",
            f"type=vhost-user-blk,id=e{number},node-name=d{number},writable=on,"
            f"addr.type=unix,addr.path={socket},num-queues={queues}",
        ]
    return peer_argv(argv)


def client(binary: Path, socket: Path, mode: str, *options: str) -> dict[str, Any]:
    argv = [str(binary), "virtio-blk-vhost-user", str(socket), mode, *options]
    done = subprocess.run(peer_argv(argv), capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise RuntimeError(f"{mode} on {socket} failed: {done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def io(folder: Path) -> str:
    """IOPS and latency through the bridge over those without it, and the bridge's own cost."""
    binary = build_peer("blkio_verify")
    image = folder / "image"
    with image.open("wb") as file:
        file.truncate(DISK)
    direct, behind, bridged = folder / "direct", folder / "behind", folder / "bridged"
    rows = []
    daemon = storage_daemon(folder, [direct, behind], image)
    bridge = [BRIDGE, "serve", "--name", "bench", "--listen", str(bridged)]
    bridge += ["--backend", f"vhost-user:{behind}"]
    with (
        running(daemon, behind, folder / "qsd.log"),
        running(bridge, bridged, folder / "bridge.log") as process,
    ):
        for mode, depth in (("randread", 1), ("randread", 32), ("randwrite", 1), ("randwrite", 32)):
            options = ("--depth", str(depth), "--seconds", str(SECONDS), "--size", str(DISK))
            pairs = []
            for number in range(ROUNDS):
                order = [direct, bridged] if number % 2 else [bridged, direct]
                result = {socket: client(binary, socket, mode, *options) for socket in order}
                pairs.append((result[bridged], result[direct]))
            iops = [with_["iops"] / without["iops"] for with_, without in pairs]
            mean = [with_["mean_ns"] / without["mean_ns"] for with_, without in pairs]
            absolute = statistics.median(with_["iops"] for with_, _ in pairs)
            rows.append([f"{mode} QD{depth}", spread(iops), spread(mean), f"{absolute:,.0f}"])
        used = idle_while_busy(binary, bridged, process.pid)
        peak = memory_kib(process.pid, "VmHWM")
    head = ["4 KiB", "IOPS, bridged / direct", "mean latency, bridged / direct", "IOPS bridged"]
    return (
        table(head, rows)
        + f"\n\nDaemon processor time during {SECONDS} s of randread QD32, connection included: "
        + f"{used * 1000:.0f} ms. Peak memory of the daemon: {peak / 1024:.1f} MiB."
    )


def idle_while_busy(binary: Path, socket: Path, pid: int) -> float:
    before = processor_seconds(pid)
    client(binary, socket, "randread", "--depth", "32", "--seconds", str(SECONDS))
    return processor_seconds(pid) - before


def first_request(folder: Path) -> str:
    """From the client's start to its exit with one completed request, against no bridge."""
    binary = build_peer("blkio_verify")
    direct, behind, bridged = folder / "direct1", folder / "behind1", folder / "bridged1"
    daemon = storage_daemon(folder, [direct, behind], None)
    bridge = [BRIDGE, "serve", "--name", "first", "--listen", str(bridged)]
    bridge += ["--backend", f"vhost-user:{behind}"]
    times: dict[Path, list[float]] = {direct: [], bridged: []}
    with (
        running(daemon, behind, folder / "qsd1.log"),
        running(bridge, bridged, folder / "bridge1.log"),
    ):
        for _ in range(20):
            for socket, taken in times.items():
                result = client(
                    binary, socket, "randread", "--rounds", "1", "--depth", "1", "--size", "4096"
                )
                taken.append(result["first_ns"] / 1e6)
    return table(
        ["connect to first completed request", "ms, median (least-greatest) of 20"],
        [["direct", spread(times[direct], 2)], ["through the bridge", spread(times[bridged], 2)]],
    )


def many_bridges(folder: Path) -> str:
    """One daemon with many bridges: start, memory, and processor time when idle."""
    back = [folder / f"many{number}" for number in range(MANY)]
    front = [folder / f"front{number}" for number in range(MANY)]
    config = folder / "many.toml"
    config.write_text(
        "".join(
            f'[[bridge]]\nname = "b{n}"\nlisten = "{front[n]}"\nbackend = "vhost-user:{back[n]}"\n'
            for n in range(MANY)
        )
    )
    binary = build_peer("blkio_verify")
    with running(storage_daemon(folder, back, None), back[-1], folder / "many.log"):
        began = time.monotonic()
        argv = [BRIDGE, "serve", "--config", str(config)]
        with running(argv, front[-1], folder / "many-bridge.log") as process:
            while not all(socket.exists() for socket in front):
                time.sleep(0.002)
            start = time.monotonic() - began
            fresh = memory_kib(process.pid, "VmRSS")
            for socket in front:
                client(binary, socket, "randread", "--rounds", "1", "--size", "4096")
            resident = memory_kib(process.pid, "VmRSS")
            before = processor_seconds(process.pid)
            time.sleep(5)
            idle = processor_seconds(process.pid) - before
            ending = time.monotonic()
        end = time.monotonic() - ending
    with running(storage_daemon(folder, [folder / "one"], None), folder / "one", folder / "o.log"):
        argv = [BRIDGE, "serve", "--name", "o", "--listen", str(folder / "f")]
        argv += ["--backend", f"vhost-user:{folder / 'one'}"]
        with running(argv, folder / "f", folder / "one-bridge.log") as process:
            single = memory_kib(process.pid, "VmRSS")
    return table(
        [f"{MANY} bridges in one daemon", "value"],
        [
            ["start until the last one listens", f"{start:.2f} s"],
            ["resident memory, no bridge used yet", f"{fresh / 1024:.1f} MiB"],
            ["of that for each further bridge", f"{(fresh - single) / (MANY - 1):.0f} KiB"],
            ["resident memory, every bridge used once", f"{resident / 1024:.1f} MiB"],
            ["of that for each further bridge", f"{(resident - single) / (MANY - 1):.0f} KiB"],
            ["processor time in 5 idle seconds", f"{idle * 1000:.0f} ms"],
            ["SIGTERM until the end", f"{end:.2f} s"],
        ],
    )


def command_start() -> str:
    """The command line's start-up beside the interpreter's own."""
    rows = []
    for name, argv in (
        ("python -c pass", [sys.executable, "-c", "pass"]),
        ("vhost-bridge --version", [BRIDGE, "--version"]),
        ("vhost-bridge --help", [BRIDGE, "--help"]),
        ("vhost-bridge list -j", [BRIDGE, "list", "-j"]),
    ):
        taken = []
        for _ in range(15):
            began = time.monotonic()
            subprocess.run(argv, capture_output=True, check=True, timeout=30)
            taken.append((time.monotonic() - began) * 1000)
        rows.append([f"`{name}`", spread(taken, 0)])
    return table(["command", "ms, median (least-greatest) of 15"], rows)


def measure() -> Iterator[tuple[str, str]]:
    """Titles and tables, as they come."""
    with tempfile.TemporaryDirectory(prefix="vhost-bridge-bench-") as name:
        folder = Path(name)
        yield "I/O: libblkio and qemu-storage-daemon", io(folder)
        yield "Connecting", first_request(folder)
        yield "Many bridges", many_bridges(folder)
        yield "Command line", command_start()
