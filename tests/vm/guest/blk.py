"""A virtio-blk driver for tests: many requests in flight, data checked by the caller."""

from __future__ import annotations

import functools
import random
import struct
from collections.abc import Iterable
from dataclasses import dataclass

from .memory import Memory
from .vring import Buffer, DriverRing

IN, OUT, FLUSH, GET_ID = 0, 1, 4, 8
SECTOR = 512
BLOCK = 4096


@functools.lru_cache(4096)  # most is compared soon after it is written
def content(seed: object, block: int, size: int = BLOCK) -> bytes:
    """What a block holds after the write that `seed` stands for."""
    return random.Random(f"{seed}/{block}").randbytes(size)


@dataclass(frozen=True, slots=True)
class Request:
    kind: int
    sector: int = 0
    data: bytes = b""
    size: int = 0


class BlockDriver:
    """Requests on one vring; buffers of `span` bytes each lie in `buffers`."""

    def __init__(
        self, ring: DriverRing, buffers: Memory | None = None, *, span: int = BLOCK
    ) -> None:
        self.ring = ring
        self._memory = buffers if buffers is not None else ring.memory
        slots = min(ring.size // 3, (self._memory.size - (64 << 10)) // (span + 64))
        self._slots = [self._memory.take(span + 64, 64) for _ in range(slots)]
        #: Where the requests' buffers lie: header, status, and data 64 bytes after it.
        self.slots = tuple(self._slots)
        self._span = span
        self._busy: dict[int, tuple[int, Request]] = {}

    @property
    def window(self) -> int:
        """How many requests can be in flight."""
        return len(self._slots) + len(self._busy)

    @property
    def room(self) -> int:
        """How many more requests can be in flight."""
        return len(self._slots)

    def submit(self, request: Request, *, kick: bool = True) -> int:
        """Offer one request and return its name; there must be a slot."""
        at = self._slots.pop()
        memory = self._memory
        memory.map[at : at + 16] = struct.pack("<IIQ", request.kind, 0, request.sector)
        memory.map[at + 16] = 0xFF
        data = at + 64
        size = len(request.data) or request.size
        assert size <= self._span
        memory.map[data : data + len(request.data)] = request.data
        chain = [Buffer(memory, at, 16)]
        if size:
            chain.append(Buffer(memory, data, size, writable=not request.data))
        chain.append(Buffer(memory, at + 16, 1, writable=True))
        head = self.ring.add(chain, kick=kick)
        self._busy[head] = (at, request)
        return head

    def wait(self, timeout: float = 20.0) -> list[tuple[Request, int, bytes]]:
        """Requests that are done: each with its status and what was read."""
        return self._reap(self.ring.wait_used(timeout))

    def take(self) -> list[tuple[Request, int, bytes]]:
        """The same, without waiting."""
        return self._reap(self.ring.take_used())

    def _reap(self, used: list[tuple[int, int]]) -> list[tuple[Request, int, bytes]]:
        done = []
        for head, _ in used:
            at, request = self._busy.pop(head)
            data = bytes(self._memory.map[at + 64 : at + 64 + request.size])
            done.append((request, self._memory.map[at + 16], data))
            self._slots.append(at)
        return done

    @property
    def pending(self) -> int:
        return len(self._busy)

    def run(self, requests: Iterable[Request]) -> list[tuple[Request, bytes]]:
        """Do all, as many at a time as there is room for; every status must be 0."""
        results = []
        for request in requests:
            while not self._slots:
                results += self.wait()
            self.submit(request)
        while self._busy:
            results += self.wait()
        for request, status, _ in results:
            assert status == 0, f"status {status} for {request.kind} at {request.sector}"
        return [(request, data) for request, _, data in results]

    def write_blocks(self, seed: object, blocks: Iterable[int]) -> None:
        """Write `content(seed, block)` to each block."""
        per = BLOCK // SECTOR
        self.run(Request(OUT, block * per, content(seed, block)) for block in blocks)

    def check_blocks(self, seed: object, blocks: Iterable[int]) -> None:
        """Read the blocks and compare each with `content(seed, block)`."""
        per = BLOCK // SECTOR
        results = self.run(Request(IN, block * per, size=BLOCK) for block in blocks)
        wrong = [r.sector // per for r, data in results if data != content(seed, r.sector // per)]
        assert not wrong, f"blocks {wrong[:20]} of {len(results)} differ"
