"""A virtio-blk driver whose memory outlives it: killed at any point, the next one goes on.

    python -m tests.vm.guest.survivor SOCKET FILE SEED [SECONDS]

FILE has the guest's memory: vring, buffers and the driver's own notes. Everything is written there
in such an order that another process can take over after any instruction: the vring's indices, as
the device sees them, say what was offered and what is done, the notes say what each request was.
Blocks are written and read at random for SECONDS, or for ever; then all requests are waited for and
all blocks compared. Every used entry must name a request that is in flight, once.
"""

from __future__ import annotations

import os
import random
import select
import struct
import sys
import time
import traceback
from dataclasses import dataclass

from .frontend import ALL, STATUS, VERSION_1, Frontend
from .memory import Memory
from .vring import NEXT, WRITE

SIZE = 2 << 20
RING, SLOTS, BLOCKS, BLOCK, SECTOR = 64, 16, 256, 4096, 512
IN, OUT = 0, 1
# Offsets in the memory.
DESCRIPTORS, AVAIL, USED = 0x0000, 0x1000, 0x2000
NOTES, HISTORY, BUFFERS = 0x3000, 0x4000, 0x10000
# A slot's notes: kind, block, generation, at which position it was offered and, plus one, reaped.
KIND, NUMBER, GENERATION, OFFERED, REAPED, FIELDS = range(6)
SEEN = NOTES // 8 + SLOTS * FIELDS
OFFERS = SEEN + 1


class Wrong(Exception):
    """Something was lost, done twice, or is not what was written."""


def content(block: int, generation: int) -> bytes:
    """What a block holds after so many writes; zeros before the first one."""
    if generation == 0:
        return bytes(BLOCK)
    head = struct.pack("<QQ", block, generation)
    return head + random.Random(block << 32 | generation).randbytes(BLOCK - len(head))


class Driver:
    """One life of the driver."""

    def __init__(self, path: str) -> None:
        self.memory = Memory(SIZE, path=path)
        self.size = RING
        self.descriptors, self.avail, self.used = DESCRIPTORS, AVAIL, USED
        self.kick_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.call_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._words = self.memory.u64
        # A death between two notes is made up for once.
        self._first = True
        offered = self._words[OFFERS]
        if offered & 0xFFFF != self.memory.u16[AVAIL // 2 + 1]:
            self._words[OFFERS] = offered + 1
        for slot in range(SLOTS):
            if self._note(slot, OFFERED) > self._words[OFFERS]:
                self._write(slot, OFFERED, self._note(slot, REAPED))
        self.busy = {
            slot for slot in range(SLOTS) if self._note(slot, REAPED) != self._note(slot, OFFERED)
        }
        self.taken = {self._note(slot, NUMBER) for slot in self.busy}

    def _note(self, slot: int, field: int) -> int:
        return self._words[NOTES // 8 + slot * FIELDS + field]

    def _write(self, slot: int, field: int, value: int) -> None:
        self._words[NOTES // 8 + slot * FIELDS + field] = value

    @property
    def used_index(self) -> int:
        return self.memory.u16[USED // 2 + 1]

    # For each block the writes that were asked for and that are done.
    def asked(self, block: int) -> int:
        return self._words[HISTORY // 8 + 2 * block]

    def done(self, block: int) -> int:
        return self._words[HISTORY // 8 + 2 * block + 1]

    def offer(self, kind: int, block: int) -> None:
        """Offer one request: one for a block at a time."""
        slot = min(set(range(SLOTS)) - self.busy)
        generation = self.done(block) + (kind == OUT)
        at = BUFFERS + slot * 2 * BLOCK
        memory = self.memory
        memory.map[at : at + 17] = struct.pack("<IIQB", kind, 0, block * (BLOCK // SECTOR), 0xFF)
        if kind == OUT:
            memory.map[at + BLOCK : at + 2 * BLOCK] = content(block, generation)
            self._words[HISTORY // 8 + 2 * block] = generation
        data = (at + BLOCK, BLOCK, NEXT | (WRITE if kind == IN else 0))
        for number, (where, size, flags) in enumerate(((at, 16, NEXT), data, (at + 16, 1, WRITE))):
            entry = struct.pack("<QIHH", memory.guest + where, size, flags, 3 * slot + number + 1)
            start = DESCRIPTORS + 16 * (3 * slot + number)
            memory.map[start : start + 16] = entry
        position = self._words[OFFERS]
        for field, value in ((KIND, kind), (NUMBER, block), (GENERATION, generation)):
            self._write(slot, field, value)
        self._write(slot, OFFERED, position + 1)
        memory.u16[AVAIL // 2 + 2 + position % RING] = 3 * slot
        # From here on it is the device's.
        memory.u16[AVAIL // 2 + 1] = (position + 1) & 0xFFFF
        self._words[OFFERS] = position + 1
        os.eventfd_write(self.kick_fd, 1)
        self.busy.add(slot)
        self.taken.add(block)

    def reap(self) -> None:
        """Look at every request that is done."""
        while self._words[SEEN] & 0xFFFF != self.used_index:
            seen = self._words[SEEN]
            head = self.memory.u32[USED // 4 + 1 + 2 * (seen % RING)]
            slot = head // 3
            if slot in self.busy:
                self._finish(slot)
            elif not self._first:
                raise Wrong(f"used entry {seen} names {head}, which is not in flight")
            self._words[SEEN] = seen + 1
            self._first = False

    def _finish(self, slot: int) -> None:
        kind, block, generation = (self._note(slot, f) for f in (KIND, NUMBER, GENERATION))
        at = BUFFERS + slot * 2 * BLOCK
        if self.memory.map[at + 16] != 0:
            raise Wrong(f"status {self.memory.map[at + 16]} of a request for block {block}")
        if kind == OUT:
            self._words[HISTORY // 8 + 2 * block + 1] = generation
        elif self.memory.map[at + BLOCK : at + 2 * BLOCK] != content(block, generation):
            raise Wrong(f"block {block} is not as its write {generation} left it")
        self._write(slot, REAPED, self._note(slot, OFFERED))
        self.busy.discard(slot)
        self.taken.discard(block)

    def wait(self, seconds: float = 30.0) -> None:
        """Sleep until something is done; an interrupt that does not come is a failure."""
        poll = select.poll()
        poll.register(self.call_fd, select.POLLIN)
        if not poll.poll(seconds * 1000):
            raise Wrong(
                f"no interrupt in {seconds:g} s: {len(self.busy)} in flight, "
                f"used {self.used_index}, seen {self._words[SEEN]}, offered {self._words[OFFERS]}"
            )
        os.eventfd_read(self.call_fd)
        self.reap()

    def settle(self) -> None:
        """Wait for all requests."""
        self.reap()
        while self.busy:
            self.wait()


def connect(path: str, driver: Driver) -> Frontend:
    """Connect, and go on where the vring is: at its used index, as QEMU does."""
    frontend = Frontend(path)
    frontend.negotiate(VERSION_1, ALL & ~STATUS)
    frontend.set_memory([driver.memory])
    frontend.set_ring(0, driver, base=driver.used_index)
    frontend.enable(0)
    return frontend


def main(path: str, file: str, seed: str, seconds: str = "") -> None:
    driver, chance = Driver(file), random.Random(int(seed))
    deadline = time.monotonic() + float(seconds) if seconds else float("inf")
    with connect(path, driver):
        print("running", flush=True)
        driver.reap()
        while time.monotonic() < deadline:
            for _ in range(chance.randint(1, SLOTS)):
                block = chance.randrange(BLOCKS)
                if len(driver.busy) < SLOTS and block not in driver.taken:
                    driver.offer(chance.choice((IN, OUT)), block)
            driver.wait()
        if seconds:
            driver.settle()
            for block in range(BLOCKS):
                driver.offer(IN, block)
                driver.settle()
            print("verified", flush=True)


@dataclass(frozen=True, slots=True)
class Life:
    """A driver that runs in a process of its own; what it writes can be read."""

    pid: int
    output: int

    def wait(self) -> int:
        """Its status when it has ended."""
        _, status = os.waitpid(self.pid, 0)
        os.close(self.output)
        return status


def start(path: str, file: str, seed: int, seconds: float | None = None) -> Life:
    """Start one that goes on in the memory of the one before, in a fork of this process."""
    output, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.dup2(theirs, 1)
            main(path, file, str(seed), "" if seconds is None else str(seconds))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(theirs)
    return Life(pid, output)


def kill(life: Life) -> None:
    """End it as a crash would; it must be running."""
    os.kill(life.pid, 9)
    assert os.WIFSIGNALED(life.wait()), "the front-end had failed by itself"


def verified(life: Life) -> None:
    """Wait for its end; all that it read was right."""
    assert life.wait() == 0, "the front-end failed"


if __name__ == "__main__":
    main(*sys.argv[1:])
