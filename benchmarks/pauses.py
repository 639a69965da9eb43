"""Runs in the virtual machine: moves devices under load, and prints what each pause was made of.

``python3 -m benchmarks.pauses ROUNDS``: JSON, direction by direction, with the parts of every pause
in seconds; ``waited`` is what of them was spent in ioctls or until a back-end answered.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from tests.vm.guest.checks_model import arrive, control
from tests.vm.guest.checks_switch import BLOCKS, MIB, Load
from tests.vm.guest.devices import block_device, net_device, serving, simulator_options
from tests.vm.guest.frontend import ALL, CONFIG, Frontend
from tests.vm.guest.memory import Memory
from tests.vm.guest.net import NetDriver, vhost_user_echo
from tests.vm.guest.vduse import vduse_block, vhost_user_block
from vhostbridge.bridge import bridge

from . import phases

Pauses = dict[str, list[dict[str, float]]]


def tell_what_was_waited() -> None:
    """In daemons that are forked from now on."""
    phases.count_waiting()
    names = vars(bridge)
    plain = names["switch"]

    async def telling(old: Any, new: Any, session: Any, report: Any) -> None:
        before = phases.waited
        await plain(old, new, session, report)
        report.phases["waited"] = phases.waited - before

    names["switch"] = telling


def move(
    pauses: Pauses, name: str, targets: Sequence[str], rounds: int, work: Callable[[], None]
) -> None:
    """Move a bridge from each target to the next, again and again, while there is work."""
    kinds = [kind_of(target) for target in targets]
    for number in range(rounds * len(targets)):
        here, there = number % len(targets), (number + 1) % len(targets)
        work()
        with control(name) as client:
            report = client.switch(name, targets[there])
        assert report.moved, report
        pauses.setdefault(f"{kinds[here]} to {kinds[there]}", []).append(dict(report.phases))


def kind_of(target: str) -> str:
    for prefix, kind in (("vdpa:blk", "vdpa_sim_blk"), ("vdpa:net", "vdpa_sim_net")):
        if target.startswith(prefix):
            return kind
    return "VDUSE" if target.startswith("vdpa:vd") else "vhost-user"


def blocks(pauses: Pauses, targets: Sequence[str], rounds: int) -> None:
    load = Load()

    def work() -> None:
        load.compare(load.driver.take())
        load.submit(20)

    with serving(("blk", targets[0])) as daemon, Frontend(daemon.socket) as frontend:
        arrive(frontend, load.driver, [0])
        load.driver.write_blocks(0, range(BLOCKS))
        move(pauses, "blk", targets, rounds, work)
        load.settle()


def frames(pauses: Pauses, targets: Sequence[str], rounds: int) -> None:
    driver = NetDriver(Memory(4 * MIB))
    with serving(("net", targets[0])) as daemon, Frontend(daemon.socket) as frontend:
        frontend.negotiate(protocol=ALL & ~CONFIG)
        frontend.set_memory([driver.memory])
        frontend.start(driver.rings)
        move(pauses, "net", targets, rounds, lambda: driver.exchange(20, window=16))
        driver.exchange(20, window=16)
        driver.check()


def main(rounds: int) -> None:
    tell_what_was_waited()
    pauses: Pauses = {}
    with (
        simulator_options("", block="shared_backend=1"),
        block_device("blk1"),
        block_device("blk2"),
    ):
        blocks(pauses, ["vdpa:blk1", "vdpa:blk2"], rounds)
    with vduse_block() as device, vhost_user_block(device.file) as socket:
        blocks(pauses, [f"vhost-user:{socket}", "vdpa:vd0"], rounds)
    with net_device("net1"), net_device("net2"), vhost_user_echo() as socket:
        frames(pauses, ["vdpa:net1", "vdpa:net2"], rounds)
        frames(pauses, ["vdpa:net1", f"vhost-user:{socket}"], rounds)
    print(json.dumps(pauses))


if __name__ == "__main__":
    main(int(sys.argv[1]))
