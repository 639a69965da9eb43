"""Guest memory copied by the dirty log alone, as a VMM does that migrates a guest on vDPA."""

from __future__ import annotations

import contextlib
import mmap
import os
import random
from collections.abc import Iterator

from .blk import BLOCK, IN, OUT, BlockDriver, Request, content
from .checks_model import control
from .devices import block_device, net_device, serving, sh, simulator_options
from .frontend import ALL, LOG_SHMFD, VERSION_1, Frontend
from .memory import PAGE, Memory
from .net import NetDriver
from .vring import SplitRing

MIB = 1 << 20
SOAK = bool(os.environ.get("VHOST_BRIDGE_SOAK"))
TOGGLES = 1000 if SOAK else 100
FRAME_TOGGLES = 400 if SOAK else 40
BLOCKS = 200
# Bytes of one read: most of a request's pages are the device's alone.
SPAN = 4 * BLOCK
PER_BLOCK = BLOCK // 512


class Log:
    """A dirty log in a file of its own, for one bit a page up to the end of a memory."""

    def __init__(self, memory: Memory) -> None:
        self.size = -(-((memory.guest + memory.size) // PAGE) // 8)
        self.fd = os.memfd_create("dirty-log", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, self.size)
        self.map = mmap.mmap(self.fd, self.size)
        self._first = memory.guest // PAGE

    def take(self) -> set[int]:
        """Pages of the memory that were marked; the log is empty then. Nobody may write to it."""
        bits = int.from_bytes(self.map[:], "little")
        self.map[:] = bytes(self.size)
        assert not bits & ((1 << self._first) - 1), "pages below guest memory are marked"
        bits >>= self._first
        return {page for page in range(bits.bit_length()) if bits >> page & 1}


class Migration:
    """Copies a guest's memory while its block device reads into it."""

    def __init__(self, frontend: Frontend, driver: BlockDriver) -> None:
        self.frontend, self.driver = frontend, driver
        self.memory = driver.ring.memory
        self.copy = bytearray(self.memory.size)
        self.marked: set[int] = set()
        self._chance = random.Random(41)
        # The logs take turns: one that was replaced is not written to any more.
        self._logs = [Log(self.memory), Log(self.memory)]

    @property
    def by_the_driver(self) -> set[int]:
        """Pages that the driver writes too, which a VMM learns from its processors."""
        first = min(self.driver.slots) // PAGE
        used = self.driver.ring.used // PAGE
        headers = {at // PAGE for at in self.driver.slots}
        return {page for page in range(first) if page != used} | headers

    def begin(self) -> None:
        self.frontend.log_to(self._logs[0].fd, self._logs[0].size)
        self.frontend.log_used(0, self.driver.ring)
        self.frontend.log_writes(True)
        self.copy[:] = self.memory.map[:]

    def submit(self, count: int) -> None:
        """Reads of blocks by chance."""
        for _ in range(min(count, self.driver.room)):
            block = self._chance.randrange(BLOCKS - 3)
            self.driver.submit(Request(IN, block * PER_BLOCK, size=SPAN))

    def compare(self, done: list[tuple[Request, int, bytes]]) -> None:
        """Each read brought what the disk holds."""
        for request, status, data in done:
            block = request.sector // PER_BLOCK
            assert status == 0
            assert data == b"".join(content("disk", block + i) for i in range(4)), block

    def settle(self) -> None:
        """Wait for what is in flight."""
        while self.driver.pending:
            self.compare(self.driver.wait())

    def copy_pages(self, pages: set[int]) -> None:
        for page in pages:
            self.copy[page * PAGE : (page + 1) * PAGE] = self.memory.map[
                page * PAGE : (page + 1) * PAGE
            ]

    def round(self) -> None:
        """Replace the log, and copy what the one before has, with the device at work."""
        self.submit(8)
        old, new = self._logs
        self.frontend.log_to(new.fd, new.size)
        self._logs.reverse()
        self.copy_pages(self._take(old))
        self.compare(self.driver.take())

    def _take(self, log: Log) -> set[int]:
        pages = log.take()
        self.marked |= pages
        return pages

    def finish(self, *, drop: int | None = None) -> int:
        """Stop the device, copy what is left, without page ``drop``; returns the vring's base."""
        self.submit(20)
        base = self.frontend.stop_ring(0)
        self.copy_pages(self._take(self._logs[0]) - {drop})
        self.copy_pages(self.by_the_driver)
        return base

    @property
    def wrong(self) -> list[int]:
        """Pages whose copy is not what they are."""
        memory, copy = bytes(self.memory.map), bytes(self.copy)
        return [
            at // PAGE
            for at in range(0, len(memory), PAGE)
            if memory[at : at + PAGE] != copy[at : at + PAGE]
        ]


@contextlib.contextmanager
def migrating(path: str) -> Iterator[Migration]:
    memory = Memory(8 * MIB)
    ring = SplitRing(memory, used_align=PAGE)
    memory.take(PAGE, PAGE)
    with Frontend(path) as frontend:
        frontend.negotiate(VERSION_1, ALL | LOG_SHMFD)
        frontend.set_memory([memory])
        frontend.start([ring])
        driver = BlockDriver(ring, span=SPAN)
        driver.write_blocks("disk", range(BLOCKS))
        yield Migration(frontend, driver)


def check_memory_copied_by_the_log_alone() -> None:
    """Every byte; and the device goes on at the destination, on the same store."""
    with (
        simulator_options("", block="shared_backend=1"),
        block_device("blk1"),
        block_device("blk2"),
        serving(("one", "vdpa:blk1")) as source,
        serving(("two", "vdpa:blk2")) as destination,
    ):
        with migrating(source.socket) as guest:
            guest.begin()
            for _ in range(30):
                guest.round()
            base = guest.finish()
            assert guest.wrong == []
            data = guest.marked - guest.by_the_driver - {guest.driver.ring.used // PAGE}
            assert len(data) > 50, f"the log has {len(data)} pages of data"
        # From here on the copy is the guest's memory.
        guest.memory.map[:] = bytes(guest.memory.size)
        guest.memory.map[:] = bytes(guest.copy)
        with Frontend(destination.socket) as frontend:
            frontend.negotiate()
            frontend.set_memory([guest.memory])
            frontend.start([guest.driver.ring], [base])
            guest.settle()
            guest.driver.check_blocks("disk", range(BLOCKS))


def check_the_log_goes_on_over_a_switch() -> None:
    with (
        simulator_options("", block="shared_backend=1"),
        block_device("blk1"),
        block_device("blk2"),
        serving(("blk", "vdpa:blk1")) as bridge,
        migrating(bridge.socket) as guest,
    ):
        guest.begin()
        guest.round()
        with control("blk") as client:
            assert client.switch("blk", "vdpa:blk2").moved
        # Into the log that was told to the device before.
        guest.submit(guest.driver.room)
        guest.settle()
        guest.finish()
        assert guest.wrong == []


def check_a_page_left_out_of_the_log_is_noticed() -> None:
    with (
        block_device(),
        serving(("blk", "vdpa:blk0")) as bridge,
        migrating(bridge.socket) as guest,
    ):
        guest.begin()
        # Every slot is used, this one too.
        guest.submit(guest.driver.room)
        drop = guest.driver.slots[0] // PAGE + 2
        guest.settle()
        guest.finish(drop=drop)
        assert guest.wrong == [drop]


def check_nothing_is_marked_when_logging_has_ended() -> None:
    with (
        block_device(),
        serving(("blk", "vdpa:blk0")) as bridge,
        migrating(bridge.socket) as guest,
    ):
        guest.begin()
        guest.round()
        guest.frontend.log_writes(False)
        # What was marked before the end.
        guest.round()
        guest.round()
        guest.marked.clear()
        for _ in range(5):
            guest.round()
        guest.settle()
        guest.round()
        assert guest.marked == set()


def check_shadow_vrings_come_and_go_under_load() -> None:
    """Reads and writes with LOG_ALL switched on and off: each done once, with the right data."""
    chance = random.Random(43)
    memory = Memory(8 * MIB)
    driver = BlockDriver(SplitRing(memory))
    log = Log(memory)
    versions = dict.fromkeys(range(BLOCKS), -1)
    busy: dict[int, int] = {}
    done = 0

    def reap(finished: list[tuple[Request, int, bytes]]) -> None:
        nonlocal done
        for request, status, data in finished:
            block = request.sector // PER_BLOCK
            done += 1
            assert status == 0
            if request.kind == OUT:
                versions[block] = busy.pop(block)
            else:
                busy.pop(block)
                assert data == content(versions[block], block), block

    with (
        block_device(),
        serving(("blk", "vdpa:blk0")) as bridge,
        Frontend(bridge.socket) as frontend,
    ):
        frontend.negotiate(VERSION_1, ALL | LOG_SHMFD)
        frontend.set_memory([memory])
        frontend.start([driver.ring])
        frontend.log_to(log.fd, log.size)
        driver.write_blocks(-1, range(BLOCKS))
        for number in range(TOGGLES):
            for _ in range(chance.randrange(min(20, driver.room + 1))):
                block = chance.choice([b for b in range(BLOCKS) if b not in busy])
                busy[block] = number
                if chance.random() < 0.5:
                    driver.submit(Request(OUT, block * PER_BLOCK, content(number, block)))
                else:
                    driver.submit(Request(IN, block * PER_BLOCK, size=BLOCK))
            frontend.log_writes(number % 2 == 0)
            reap(driver.take())
        while driver.pending:
            reap(driver.wait())
        assert done > 2 * TOGGLES
        for version in set(versions.values()):
            driver.check_blocks(version, [b for b, v in versions.items() if v == version])


def check_numbered_frames_while_shadow_vrings_come_and_go() -> None:
    """None is lost. The simulator drops a frame that it has no buffer for, and counts it."""
    driver = NetDriver(Memory(4 * MIB))
    log = Log(driver.memory)
    with (
        net_device(),
        serving(("net", "vdpa:net0")) as bridge,
        Frontend(bridge.socket) as frontend,
    ):
        frontend.negotiate(VERSION_1, ALL | LOG_SHMFD)
        frontend.set_memory([driver.memory])
        frontend.start(driver.rings)
        frontend.log_to(log.fd, log.size)
        for number in range(FRAME_TOGGLES):
            driver.send_numbered(9)
            frontend.log_writes(number % 2 == 0)
            try:
                driver.receive(driver.sent)
            except TimeoutError as error:
                counted = sh("vdpa dev vstats show net0 qidx 0")
                raise AssertionError(f"toggle {number}: {error}; {counted}") from error
        driver.check()
        assert "rx overruns 0 " in sh("vdpa dev vstats show net0 qidx 0")
        assert log.take(), "received frames are not in the log"
