"""Front-ends that are killed at any point: the daemon loses nothing, and keeps nothing."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path

from . import libblkio
from .blk import BLOCK, IN, OUT, BlockDriver, Request, content
from .devices import BridgeProcess, block_device, serving, wait_until
from .frontend import Frontend, HungUp
from .libblkio import USER
from .memory import Memory
from .vring import SplitRing

ROUNDS = 200 if os.environ.get("VHOST_BRIDGE_SOAK") else 20
BLOCKS = 64
REAL = ("env",)  # the command itself: a fork of ours would start with our memory


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a process holds."""

    files: int
    threads: int
    guest_mappings: int
    mappings: int
    resident: int
    pinned: int


def footprint(pid: int) -> Footprint:
    folder = Path(f"/proc/{pid}")
    maps = (folder / "maps").read_text().splitlines()
    status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
    return Footprint(
        files=len(os.listdir(folder / "fd")),
        threads=int(status["Threads"]),
        guest_mappings=sum("memfd:" in line for line in maps),
        mappings=len(maps),
        resident=int(status["VmRSS"].split()[0]) << 10,
        pinned=int(status["VmPin"].split()[0]) << 10,
    )


def at_rest(bridge: BridgeProcess) -> Footprint:
    """What it holds once it is done with all front-ends that ever connected."""
    with Frontend(bridge.socket) as last:  # it is served after those that wait
        last.negotiate()
    wait_until(lambda: bridge.text().count("connected") == _ended(bridge))
    wait_until(lambda: footprint(bridge.pid).guest_mappings == 0)
    return footprint(bridge.pid)


def _ended(bridge: BridgeProcess) -> int:
    return sum(bridge.text().count(f") {end}") for end in ("left", "cut off"))


def unchanged(before: Footprint, after: Footprint) -> None:
    """No descriptor, thread, guest memory or pinned page more; no memory worth mentioning."""
    what = f"{before} became {after}"
    assert after.files == before.files, what
    assert after.threads <= before.threads, what
    assert after.guest_mappings == before.guest_mappings == 0, what
    assert after.pinned == before.pinned == 0, what
    assert after.mappings <= before.mappings + 4, what
    assert after.resident <= before.resident + (2 << 20), what


class History:
    """For each block the last write that was asked for and that was done, seen by all forks."""

    def __init__(self) -> None:
        shared = mmap.mmap(-1, 8 * BLOCKS)
        self.asked = (ctypes.c_uint32 * BLOCKS).from_buffer(shared)
        self.done = (ctypes.c_uint32 * BLOCKS).from_buffer(shared, 4 * BLOCKS)


def connected(path: str) -> tuple[Frontend, BlockDriver]:
    frontend = Frontend(path)
    driver = BlockDriver(SplitRing(Memory(2 << 20)))
    frontend.negotiate()
    frontend.set_memory([driver.ring.memory])
    frontend.start([driver.ring])
    return frontend, driver


def writer(path: str, history: History, seed: int) -> None:
    """Connect, write random blocks, change memory, stop and start, until killed."""
    chance = random.Random(seed)
    frontend, driver = connected(path)
    extra = Memory(1 << 20, guest=0x1_0000_0000, user=0x7D00_0000_0000)
    while True:
        free = set(range(BLOCKS))
        for _ in range(chance.randint(1, 40)):
            block = chance.choice(sorted(free))
            free.discard(block)
            history.asked[block] += 1
            data = content(history.asked[block], block)
            driver.submit(Request(OUT, block * 8, data))
        while driver.pending:
            for request, status, _ in driver.wait():
                assert status == 0
                history.done[request.sector // 8] = history.asked[request.sector // 8]
        step = chance.randrange(3)
        if step == 0:
            frontend.add_region(extra)
            frontend.remove_region(extra)
        elif step == 1:
            base = frontend.stop_ring(0)
            frontend.set_status(0)
            frontend.start([driver.ring], [base])


def killed_at_some_point(path: str, history: History, chance: random.Random) -> None:
    """A front-end of its own process, killed after up to 0.3 s: in its set-up or later."""
    pid = os.fork()
    if pid == 0:
        try:
            writer(path, history, chance.randrange(1 << 30))
        finally:
            os._exit(1)
    time.sleep(chance.uniform(0, 0.3))
    os.kill(pid, 9)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status), "the front-end had failed by itself"


def verify_history(path: str, history: History) -> None:
    """Every block is whole, and as new as its last write that was done."""
    frontend, driver = connected(path)
    with frontend:
        for request, data in driver.run(
            Request(IN, block * 8, size=BLOCK) for block in range(BLOCKS)
        ):
            block = request.sector // 8
            done, asked = history.done[block], history.asked[block]
            possible = {content(turn, block): turn for turn in range(max(done, 1), asked + 1)}
            if done == 0:
                possible[bytes(BLOCK)] = 0
            assert data in possible, f"block {block} is none of writes {done} to {asked}"
            history.asked[block] = history.done[block] = possible[data]


def check_front_ends_killed_at_any_point() -> None:
    chance, history = random.Random(20), History()
    with block_device(), serving(("kill", "vdpa:blk0"), prefix=REAL) as bridge:
        before = None
        for turn in range(ROUNDS + 3):
            killed_at_some_point(bridge.socket, history, chance)
            verify_history(bridge.socket, history)
            if turn == 2:  # warm: every path was gone, every thread was there
                before = at_rest(bridge)
        assert before is not None
        unchanged(before, at_rest(bridge))


def check_libblkio_killed_at_any_point() -> None:
    """Its record of completed and issued writes outlives it: nothing completed is lost."""
    chance = random.Random(21)
    state = Path("/tmp/reconnect.state")
    state.unlink(missing_ok=True)
    options = {"size": 4 << 20, "depth": 16, "state": state}
    with block_device(), serving(("kill", "vdpa:blk0"), prefix=REAL) as bridge:
        # Clients that are all killed before they write leave a record too.
        libblkio.run(USER, bridge.socket, "fill", seed=1, **options)
        before = None
        for turn in range(ROUNDS + 3):
            client = libblkio.start(
                USER, bridge.socket, "write-read", seconds=60, seed=1, **options
            )
            time.sleep(chance.uniform(0, 0.3))
            libblkio.kill(client)
            if turn == 2:
                before = at_rest(bridge)
        libblkio.run(USER, bridge.socket, "verify", seed=1, **options)
        assert before is not None
        unchanged(before, at_rest(bridge))


def check_connections_that_never_say_anything() -> None:
    """One front-end at a time; those that only connect and leave cost nothing."""
    with block_device(), serving(("kill", "vdpa:blk0"), prefix=REAL) as bridge:
        before = None
        for turn in range(60):
            with Frontend(bridge.socket) as frontend:
                if turn % 2:
                    frontend.send("GET_FEATURES")
            if turn % 5 == 4:  # more than a few would be turned away
                after = at_rest(bridge)
                before = before or after
        assert before is not None
        unchanged(before, after)
        frontend, driver = connected(bridge.socket)
        with frontend:
            driver.write_blocks("after", range(5))


def check_daemon_killed_and_started_anew() -> None:
    """kill -9 of the daemon frees the device at once; its socket is replaced."""
    with block_device():
        with contextlib.suppress(AssertionError), serving(("kill", "vdpa:blk0")) as bridge:
            frontend, driver = connected(bridge.socket)
            driver.write_blocks("first", range(20))
            bridge.stop(9)
            try:
                frontend.ask("GET_FEATURES")
            except HungUp:
                pass
            else:
                raise RuntimeError("it answers after its death")
        assert os.path.exists("/tmp/kill.sock")
        with serving(("kill", "vdpa:blk0")) as bridge:
            frontend, driver = connected(bridge.socket)
            driver.check_blocks("first", range(20))
            frontend.close()
        assert not os.path.exists("/tmp/kill.sock")
