"""Downtime of a guest under load that migrates, with and without bridges on its disk."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from tests.host.test_live_migration import MEMORY, MIB, begin_load, check_load
from tests.peers import migration
from tests.peers.bridge import Bridge
from tests.peers.guest import Guest, vhost_user_blk
from tests.peers.storage import StorageDaemon, make_image

from .measure import spread, table

ROUNDS = 10
WAYS = {
    "no bridge": None,
    "bridged, the back-end's own log": ["--dirty-log", "auto"],
    "bridged, shadow vrings": ["--dirty-log", "shadow"],
    "bridged, all memory": ["--dirty-log", "all"],
}


def downtimes(folder: Path, options: list[str] | None) -> tuple[list[float], list[float]]:
    """Milliseconds that QEMU reports, of downtime and in all, there and back."""
    folder.mkdir()
    down, total = [], []
    with ExitStack() as stack:
        image = make_image(folder / "image")
        sockets = []
        for side in "ab":
            disk = stack.enter_context(StorageDaemon(image, folder / f"{side}.sock"))
            sockets.append(disk.socket)
            if options is not None:
                front = folder / f"{side}.bridge"
                stack.enter_context(
                    Bridge(f"vhost-user:{disk.socket}", listen=front, arguments=options)
                )
                sockets[-1] = front

        def start(socket: Path, *, incoming: bool) -> Guest:
            guest = Guest(vhost_user_blk(socket), memory_mib=MEMORY, incoming=incoming)
            return stack.enter_context(guest)

        guest = start(sockets[0], incoming=False)
        for turn in range(1, 1 + ROUNDS):
            begin_load(guest)
            there = start(sockets[turn % 2], incoming=True)
            told = migration.migrate(guest, there, folder / "m", bandwidth=64 * MIB)
            down.append(float(told["downtime"]))
            total.append(float(told["total-time"]))
            guest = there
            check_load(guest, image)
    return down, total


def measure() -> Iterator[tuple[str, str]]:
    """Titles and tables, as they come."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="vhost-bridge-bench-") as name:
        for number, (title, options) in enumerate(WAYS.items()):
            down, total = downtimes(Path(name, str(number)), options)
            rows.append([title, spread(down, 0), spread(total, 0)])
    head = [f"{ROUNDS} migrations each", "downtime, ms, median (least-greatest)", "in all, ms"]
    yield "Migration of a guest under load, vhost-user-blk", table(head, rows)
