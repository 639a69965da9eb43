"""In the virtual machine, on vdpa_sim_net: our shadow vrings beside QEMU's own (x-svq=on).

Both are driven through QEMU's virtio-net by the same driver; see ``qtest_net``. Without KVM that
driver's kicks go through QEMU's own thread, which serves QEMU's shadow vrings anyway; with KVM they
go past it, as a VM's do. The emulated machine has a KVM of its own.
"""

from __future__ import annotations

import json
import shutil
import signal
import statistics
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.rig.product import build_wheel
from tests.rig.vm import Vm

from . import qtest_net
from .measure import distribution, spread, table

ROUNDS = 7
SECONDS = 2.0
DEPTHS = (1, 32, 128)
MIGRATIONS = 7
SCRIPT = Path(qtest_net.__file__)
PROGRAM = SCRIPT.with_name("exchange.S")

#: What ``qtest_net`` told of ours and of QEMU's, round by round.
Pairs = list[tuple[dict[str, Any], dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class Way:
    """How QEMU gets at the device, and the daemons whose processor time counts."""

    netdev: list[str]
    daemons: list[int]


def script(vm: Vm, what: str, *arguments: object) -> Any:
    """What ``qtest_net`` prints in the machine."""
    argv = ["python3", f"{vm.share_guest}/{SCRIPT.name}", *map(json.dumps, (what, *arguments))]
    return json.loads(vm.run(argv, timeout=120, memlock=True).stdout.splitlines()[-1])


def own(vm: Vm, device: str, *, svq: bool) -> Way:
    """QEMU's own vhost-vdpa."""
    node = vm.run(f"ls /sys/bus/vdpa/devices/{device} | grep vhost-vdpa").stdout.strip()
    shadow = ",x-svq=on" if svq else ""
    return Way(["-netdev", f"vhost-vdpa,id=net,vhostdev=/dev/{node}{shadow}"], [])


@contextmanager
def bridged(vm: Vm, device: str, *options: str) -> Iterator[Way]:
    """vhost-user and a bridge."""
    path = f"/run/{device}.sock"
    argv = ["vhost-bridge", "serve", "--name", device, "--listen", path, *options]
    job = vm.start([*argv, "--backend", f"vdpa:{device}"], memlock=True)
    job.wait_for_output("serving", 60)
    pid = int(vm.run(f"pgrep -f 'serve --name {device}' | head -n 1").stdout)
    yield Way(
        ["-chardev", f"socket,id=c,path={path}", "-netdev", "vhost-user,id=net,chardev=c"], [pid]
    )
    job.kill(signal.SIGTERM)
    job.wait(30)


def in_turn(vm: Vm, ours: Way, theirs: Way, depth: int) -> Pairs:
    """What both told, again and again, ours first or last."""
    pairs = []
    for number in range(ROUNDS):
        order = [theirs, ours] if number % 2 else [ours, theirs]
        took = [script(vm, "pace", way.netdev, way.daemons, depth, SECONDS) for way in order]
        pairs.append((took[0], took[1]) if order[0] is ours else (took[1], took[0]))
    return pairs


def build_program(rom: Path) -> None:
    """Assemble the guest that exchanges frames, to lie below 4 GiB as a firmware does."""
    made = rom.with_suffix(".o")
    subprocess.run(["as", "--32", "-o", made, PROGRAM], check=True)
    place = ["--oformat", "binary", "-Ttext", "0xffff0000"]
    subprocess.run(["ld", "-m", "elf_i386", *place, "-o", rom, made], check=True)


def of_guest(vm: Vm, ours: Way, theirs: Way) -> str:
    """Frames a second of a guest under KVM, which looks for them all the time."""
    program = vm.share_host / "exchange.rom"
    build_program(program)
    vm.run("modprobe kvm_amd")
    rows = []
    for depth in DEPTHS:
        found: dict[int, list[float]] = {0: [], 1: []}
        for number in range(ROUNDS):
            for way in (0, 1) if number % 2 else (1, 0):
                netdev = (ours, theirs)[way].netdev
                rom = f"{vm.share_guest}/{program.name}"
                found[way].append(script(vm, "guest_pace", netdev, depth, SECONDS, rom))
        ratio = spread([a / b for a, b in zip(found[0], found[1], strict=True)])
        rows.append([str(depth), ratio, *(f"{statistics.median(found[n]):,.0f}" for n in (0, 1))])
    head = ["frames at once", "frames/s, ours / QEMU's", "frames/s, ours", "QEMU's"]
    return table(head, rows)


def compare(found: Mapping[int, Pairs]) -> str:
    """Our frames a second and processor time a frame over theirs, and both."""
    rows = []
    for depth, pairs in found.items():
        ratio = {key: spread([a[key] / b[key] for a, b in pairs]) for key in ("pace", "processor")}
        cells = [f"{value:,.0f}" for value in medians(pairs, "pace")]
        cells += [f"{value * 1e6:,.0f}" for value in medians(pairs, "processor")]
        rows.append([str(depth), ratio["pace"], ratio["processor"], *cells])
    head = ["frames at once", "frames/s, ours / QEMU's", "processor time a frame, ours / QEMU's"]
    head += ["frames/s, ours", "QEMU's", "µs of processor a frame, ours", "QEMU's"]
    return table(head, rows)


def medians(pairs: Pairs, key: str) -> list[float]:
    """Ours and QEMU's."""
    return [statistics.median(pair[way][key] for pair in pairs) for way in (0, 1)]


def alone(pairs: Pairs) -> str:
    """How long one frame takes when no other is on its way."""
    rows = []
    for way, name in enumerate(("ours", "QEMU's")):
        took = [one for pair in pairs for one in pair[way]["took"]]
        rows.append([name, str(len(took)), *distribution(took)])
    return table(["shadow vrings", "frames", "ms for one, median", "p99", "max"], rows)


def downtimes(vm: Vm) -> str:
    """What QEMU reports for a migration from one device to another."""
    rows = []
    with bridged(vm, "net0") as here, bridged(vm, "net1") as there:
        took = [script(vm, "downtime", here.netdev, there.netdev) for _ in range(MIGRATIONS)]
        rows.append(["vhost-user and bridges", spread(took, 0)])
    ways = [own(vm, name, svq=False).netdev for name in ("net0", "net1")]
    took = [script(vm, "downtime", *ways) for _ in range(MIGRATIONS)]
    rows.append(["QEMU's own vhost-vdpa", spread(took, 0)])
    return table([f"{MIGRATIONS} migrations", "downtime, ms, median (least-greatest)"], rows)


def measure() -> Iterator[tuple[str, str]]:
    """Titles and tables, as they come."""
    with Vm(wheel=build_wheel()) as vm:
        shutil.copy2(SCRIPT, vm.share_host / SCRIPT.name)
        for name in ("net0", "net1"):
            vm.run(f"vdpa dev add name {name} mgmtdev vdpasim_net mac 52:54:00:11:22:33")
        with bridged(vm, "net1", "--shadow") as ours:
            theirs = own(vm, "net0", svq=True)
            guest = of_guest(vm, ours, theirs)
            found = {depth: in_turn(vm, ours, theirs, depth) for depth in DEPTHS}
        where = "vdpa_sim_net (emulated machine)"
        yield f"Shadow vrings beside QEMU's, a guest under KVM: {where}", guest
        yield f"Shadow vrings beside QEMU's: {where}", compare(found)
        yield f"One frame there and back, alone: {where}", alone(found[1])
        yield "Downtime over vdpa_sim_net (emulated machine)", downtimes(vm)
