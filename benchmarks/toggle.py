"""Entering and leaving shadow vrings while requests are in flight.

The front-end is ours: of no other can one say when it logs. Its driver is a process of its own, so
that the front-end's clock is not held up by it: it offers each request again as soon as it is done.
"""

from __future__ import annotations

import os
import select
import signal
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from tests.peers.bridge import Bridge
from tests.peers.process import eventually
from tests.peers.storage import StorageDaemon, make_image
from tests.vm.guest.blk import BLOCK, IN, SECTOR, BlockDriver, Request
from tests.vm.guest.frontend import ALL, LOG_SHMFD, VERSION_1, Frontend
from tests.vm.guest.memory import PAGE, Memory
from tests.vm.guest.vring import SplitRing

from .measure import distribution, table

TOGGLES = 200  # each way
DEPTH = 32
PAUSE = 0.005  # between two of them
TITLE = (
    f"Entering and leaving shadow vrings, {TOGGLES} times each: qemu-storage-daemon, "
    f"idle, and with {DEPTH} reads of 4 KiB at a time"
)


@dataclass(slots=True)
class Took:
    """Seconds of each toggle, and the requests in flight when it began."""

    seconds: list[float] = field(default_factory=list)
    in_flight: list[int] = field(default_factory=list)


def in_flight(ring: SplitRing) -> int:
    """Requests that are offered and not done, as the memory has them."""
    return (ring.memory.u16[ring.avail // 2 + 1] - ring.used_index) & 0xFFFF


def offer_again(ring: SplitRing) -> None:
    """Give back to the device whatever it is done with, for ever."""
    memory, seen, offered = ring.memory, 0, ring.avail_index
    available, used = ring.avail // 2 + 2, ring.used // 4 + 1
    poll = select.poll()
    poll.register(ring.call_fd, select.POLLIN)
    ring.kick()
    while poll.poll(10_000):
        os.eventfd_read(ring.call_fd)
        while (done := ring.used_index) != seen:
            while seen != done:
                head = memory.u32[used + 2 * (seen % ring.size)]
                memory.u16[available + offered % ring.size] = head
                seen, offered = (seen + 1) & 0xFFFF, (offered + 1) & 0xFFFF
            memory.u16[available - 1] = offered
            ring.kick()


@contextmanager
def reading(ring: SplitRing) -> Iterator[None]:
    """Reads of as many blocks are in flight for the block's length, but for what is just done."""
    driver = BlockDriver(ring)
    for number in range(DEPTH):
        request = Request(IN, number * BLOCK // SECTOR, size=BLOCK)
        driver.submit(request, kick=False)
    pid = os.fork()
    if pid == 0:
        try:
            offer_again(ring)
        finally:
            os._exit(1)
    try:
        yield
        # Each is done many times.
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), "an interrupt was lost"
        assert {ring.memory.map[at + 16] for at in driver.slots[-DEPTH:]} <= {0}, "a read failed"
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def toggles(frontend: Frontend, ring: SplitRing, *, load: bool) -> dict[bool, Took]:
    """Set LOG_ALL and clear it, again and again: each from the message to its acknowledgement."""
    took = {True: Took(), False: Took()}
    before = 0

    def reads_go_on() -> bool:
        return ring.used_index != before and in_flight(ring) > 0

    for number in range(2 * TOGGLES):
        on = number % 2 == 0
        before = ring.used_index
        time.sleep(PAUSE)
        if load:
            eventually(reads_go_on, "reads are done, and others in flight")
        took[on].in_flight.append(in_flight(ring))
        began = time.perf_counter()
        frontend.log_writes(on)
        took[on].seconds.append(time.perf_counter() - began)
    return took


def toggling(folder: Path) -> str:
    """Idle, and while a driver reads as fast as it can."""
    memory = Memory()
    ring = SplitRing(memory)
    rows = []
    with (
        StorageDaemon(make_image(folder / "image"), folder / "disk.sock") as disk,
        Bridge(
            f"vhost-user:{disk.socket}",
            listen=folder / "vm.sock",
            arguments=["--dirty-log", "shadow"],
        ) as bridge,
        Frontend(str(bridge.listen)) as frontend,
        tempfile.TemporaryFile() as log,
    ):
        frontend.negotiate(VERSION_1, ALL | LOG_SHMFD)
        frontend.set_memory([memory])
        frontend.start([ring])
        size = (memory.guest + memory.size) // PAGE // 8
        log.truncate(size)
        frontend.log_to(log.fileno(), size)
        for load in (False, True):
            with reading(ring) if load else nullcontext():
                took = toggles(frontend, ring, load=load)
            for name, one in (("enter", took[True]), ("leave", took[False])):
                flying = f"{statistics.median(one.in_flight):.0f}"
                flying += f" ({min(one.in_flight)}-{max(one.in_flight)})"
                rows.append([name, flying, *distribution(one.seconds)])
    head = ["ms, from SET_FEATURES to its answer", "in flight then, median (least-greatest)"]
    return table([*head, "median", "p99", "max"], rows)
