"""Runs in the virtual machine: moves devices under load, and tells how long each pause was.

``python3 -m benchmarks.pauses ROUNDS``: JSON. ``moves`` has, direction by direction, the parts of
every pause as the daemon tells them, in seconds; ``waited`` is what of them was spent in ioctls or
until a back-end answered, ``seen`` the slowest request of the client around the move. ``still`` has
the slowest request within the same time without a move, by the kind of back-end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.vm.guest import libblkio
from tests.vm.guest.checks_model import control
from tests.vm.guest.devices import block_device, net_device, serving, simulator_options
from tests.vm.guest.frontend import ALL, CONFIG, Frontend
from tests.vm.guest.memory import Memory
from tests.vm.guest.net import NetDriver, frame, vhost_user_echo
from tests.vm.guest.vduse import vduse_block, vhost_user_block
from vhostbridge.bridge import bridge

from . import phases

MIB = 1 << 20
LOAD: dict[str, object] = {"size": 4 * MIB, "depth": 8, "seed": 1, "state": "/tmp/blocks"}
BEFORE, AFTER = 0.1, 0.5  # seconds of load around a move

#: Does something under load, and returns the client's slowest request in seconds.
Around = Callable[[Callable[[], object]], float]


@dataclass(slots=True)
class Pauses:
    """What is printed."""

    moves: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    still: dict[str, list[float]] = field(default_factory=dict)


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


def move(pauses: Pauses, name: str, targets: Sequence[str], rounds: int, around: Around) -> None:
    """Move a bridge from each target to the next, again and again, under load."""
    reports: list[Any] = []

    def go(there: str) -> None:
        with control(name) as client:
            reports.append(client.switch(name, there))

    for number in range(rounds * len(targets)):
        here, there = (targets[(number + step) % len(targets)] for step in (0, 1))
        kind = kind_of(here)
        if number // len(targets) % 2 == 0:
            pauses.still.setdefault(kind, []).append(around(lambda: None))
        seen = around(functools.partial(go, there))
        report = reports.pop()
        assert report.moved, report
        direction = f"{kind} to {kind_of(there)}"
        pauses.moves.setdefault(direction, []).append({**report.phases, "seen": seen})


def kind_of(target: str) -> str:
    for prefix, kind in (("vdpa:blk", "vdpa_sim_blk"), ("vdpa:net", "vdpa_sim_net")):
        if target.startswith(prefix):
            return kind
    if target.startswith("vdpa:vd"):
        return "VDUSE"
    return "vhost-user-net" if target.endswith("echo.sock") else "vhost-user-blk"


def blocks(pauses: Pauses, targets: Sequence[str], rounds: int) -> None:
    """libblkio is the client: writes and reads, all of them verified."""
    # What the simulator and VDUSE lack of what qemu-storage-daemon has; and its limit of segments,
    # which each client reads anew.
    without = ["--without-features", "SIZE_MAX,SEG_MAX,CONFIG_WCE,MQ"]
    without += ["--type", "block"] * targets[0].startswith("vhost-user")
    with serving(("blk", targets[0]), more=without) as daemon:

        def around(act: Callable[[], object]) -> float:
            options = LOAD | {"seconds": BEFORE + AFTER}
            with libblkio.running(daemon.socket, **options) as client:
                time.sleep(BEFORE)
                act()
                return float(libblkio.finish(client)["max_ns"]) / 1e9

        fill = {name: value for name, value in LOAD.items() if name != "depth"}
        libblkio.run(libblkio.USER, daemon.socket, "fill", **fill)
        move(pauses, "blk", targets, rounds, around)


def frames(pauses: Pauses, targets: Sequence[str], rounds: int) -> None:
    """A driver in a thread is the client: it sends a frame as soon as the last one came back."""
    driver = NetDriver(Memory(4 * MIB))

    def around(act: Callable[[], object]) -> float:
        with traffic(driver) as slowest:
            time.sleep(BEFORE)
            act()
            time.sleep(AFTER)
        return max(slowest)

    with serving(("net", targets[0])) as daemon, Frontend(daemon.socket) as frontend:
        frontend.negotiate(protocol=ALL & ~CONFIG)
        frontend.set_memory([driver.memory])
        frontend.start(driver.rings)
        move(pauses, "net", targets, rounds, around)
        driver.check()


@contextlib.contextmanager
def traffic(driver: NetDriver) -> Iterator[list[float]]:
    """The seconds that each frame took, for as long as the block lasts."""
    took: list[float] = []
    ended = threading.Event()

    def exchange() -> None:
        while not ended.is_set():
            frame(driver.sent)  # made before the time begins
            began = time.perf_counter()
            driver.exchange(1)
            took.append(time.perf_counter() - began)

    thread = threading.Thread(target=exchange)
    thread.start()
    try:
        yield took
    finally:
        ended.set()
        thread.join()


def main(rounds: int) -> None:
    tell_what_was_waited()
    pauses = Pauses()
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
    print(json.dumps(dataclasses.asdict(pauses)))


if __name__ == "__main__":
    main(int(sys.argv[1]))
