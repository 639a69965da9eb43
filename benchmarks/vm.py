"""In the virtual machine: libblkio on vdpa_sim_blk, straight and through the bridge, in turn.

Two devices of the same kind, because a vhost-vdpa node has one user at a time.
"""

from __future__ import annotations

import json
import shutil
import signal
import statistics
from collections.abc import Iterator
from typing import Any

from tests.peers.build import build_peer
from tests.rig.product import build_wheel
from tests.rig.vm import Vm

from .measure import spread, table

ROUNDS = 5
SECONDS = 2


def client(vm: Vm, driver: str, path: str, *options: str) -> dict[str, Any]:
    argv = [f"{vm.share_guest}/blkio_verify", driver, path, *options]
    done = vm.run(argv, timeout=120)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def compare(vm: Vm, node: str) -> str:
    """Bridged over direct, in turn, at two depths."""
    rows = []
    direct = ("virtio-blk-vhost-vdpa", node)
    bridged = ("virtio-blk-vhost-user", "/run/bench.sock")
    for depth in (1, 32):
        options = ("randread", "--depth", str(depth), "--seconds", str(SECONDS))
        pairs = []
        for number in range(ROUNDS):
            order = [direct, bridged] if number % 2 else [bridged, direct]
            result = {way: client(vm, *way, *options) for way in order}
            pairs.append((result[bridged], result[direct]))
        iops = [with_["iops"] / without["iops"] for with_, without in pairs]
        mean = [with_["mean_ns"] / without["mean_ns"] for with_, without in pairs]
        absolute = statistics.median(with_["iops"] for with_, _ in pairs)
        rows.append([f"randread QD{depth}", spread(iops), spread(mean), f"{absolute:,.0f}"])
    head = ["4 KiB", "IOPS, bridged / direct", "mean latency, bridged / direct", "IOPS bridged"]
    return table(head, rows)


def measure() -> Iterator[tuple[str, str]]:
    """Titles and tables, as they come."""
    with Vm(wheel=build_wheel()) as vm:
        shutil.copy2(build_peer("blkio_verify"), vm.share_host / "blkio_verify")
        vm.run("vdpa dev add name direct mgmtdev vdpasim_blk")
        vm.run("vdpa dev add name bridged mgmtdev vdpasim_blk")
        node = vm.run("ls /sys/bus/vdpa/devices/direct | grep vhost-vdpa").stdout.strip()
        argv = ["vhost-bridge", "serve", "--name", "bench", "--listen", "/run/bench.sock"]
        job = vm.start([*argv, "--backend", "vdpa:bridged"], memlock=True)
        job.wait_for_output("serving", 60)
        yield "I/O: libblkio and vdpa_sim_blk (emulated machine)", compare(vm, f"/dev/{node}")
        job.kill(signal.SIGTERM)
        job.wait(30)
