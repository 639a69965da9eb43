"""Requests to a block device: reads, and writes to a scratch area if that was allowed."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vhostbridge.backends.virtio import BlockFeature

from .driver import Driver, Memory, Ring, Segment
from .outcome import Breach

IN, OUT, FLUSH, GET_ID = 0, 1, 4, 8
SECTOR = 512
BLOCK = 4096
_PER_BLOCK = BLOCK // SECTOR

# The bits that this driver knows how to live with.
FEATURES = BlockFeature.FLUSH.mask | BlockFeature.MQ.mask

# Offsets in a request's slot: header, status, data.
_STATUS, _DATA = 16, 64
_UNWRITTEN = 0xFF
# How many blocks are read in turn, and how many the scratch area has.
_SPOTS, SCRATCH_BLOCKS = 16, 64

Check = Callable[[int, bytes], None]


@dataclass(slots=True)
class BlockPlan:
    """What is known of the disk, for all drivers of one run."""

    sectors: int | None
    flush: bool
    #: Where the scratch area begins; ``None`` when nothing may be written.
    scratch: int | None = None
    #: Reads go here: sector and size.
    spots: list[tuple[int, int]] = field(default_factory=list)
    #: Whether the spots are known to be readable.
    settled: bool = False
    #: Which write each scratch block had last; its content follows from that.
    versions: dict[int, int] = field(default_factory=dict)
    #: Blocks with a write on its way. One that is lost by a reset may still arrive: such a block
    #: is not used again.
    writing: set[int] = field(default_factory=set)
    writes: int = 0

    def __post_init__(self) -> None:
        blocks = (self.sectors or 0) // _PER_BLOCK
        if blocks:
            spread = {i * (blocks - 1) // (_SPOTS - 1) for i in range(_SPOTS)}
            self.spots = [(block * _PER_BLOCK, BLOCK) for block in sorted(spread)]
        elif self.sectors != 0:
            self.spots = [(0, SECTOR)]

    @property
    def scratch_blocks(self) -> range:
        """First sectors of the scratch area's blocks."""
        if self.scratch is None:
            return range(0)
        return range(self.scratch, self.scratch + SCRATCH_BLOCKS * _PER_BLOCK, _PER_BLOCK)


def scratch_start(sectors: int) -> int | None:
    """First sector of the scratch area, the disk's end; ``None`` for a disk too small for one."""
    start = sectors // _PER_BLOCK - SCRATCH_BLOCKS
    return start * _PER_BLOCK if start >= 0 else None


def content(sector: int, version: int) -> bytes:
    """What a scratch block holds after it was written that often."""
    return random.Random(f"{sector}/{version}").randbytes(BLOCK)


@dataclass(frozen=True, slots=True)
class _Request:
    slot: int
    size: int
    check: Check


class BlockDriver(Driver):
    """Offers requests on all vrings in turn; a third of a ring's descriptors can wait."""

    makes_requests = must_complete = True

    def __init__(self, memory: Memory, rings: Sequence[Ring], plan: BlockPlan) -> None:
        super().__init__(memory, rings)
        self._plan = plan
        name = "buffers of vring {}"
        self._slots = [
            [memory.take(_DATA + BLOCK, 64, name.format(r.index)) for _ in range(r.size // 3)]
            for r in rings
        ]
        self._waiting: list[dict[int, _Request]] = [{} for _ in rings]
        self._count = 0
        self._bad: set[tuple[int, int]] = set()
        self._unchecked = list(plan.versions)

    @property
    def outstanding(self) -> int:
        return sum(map(len, self._waiting))

    def submit(self, count: int) -> int:
        return sum(self._submit_next() for _ in range(count))

    # Reads, with an identity or a flush now and then; every second one a write if allowed.
    def _submit_next(self) -> bool:
        number = self._count
        if self._plan.scratch is not None and number % 2:
            return self._submit_write()
        if number % 8 == 6 and self._plan.flush:
            return self._offer(FLUSH)
        if number % 8 == 4 or not self._plan.spots:
            return self._offer(GET_ID, size=20)
        spot = self._plan.spots[number % len(self._plan.spots)]

        def check(status: int, data: bytes) -> None:
            if status and self._plan.settled:
                raise Breach(
                    f"a read of sector {spot[0]}, which worked before, ended with status {status}"
                )
            if status:
                self._bad.add(spot)

        return self._offer(IN, spot[0], size=spot[1], check=check)

    def _submit_write(self) -> bool:
        plan, blocks = self._plan, self._plan.scratch_blocks
        plan.writes += 1
        version = plan.writes
        turn = [blocks[(version + i) % SCRATCH_BLOCKS] for i in range(SCRATCH_BLOCKS)]
        sector = next((one for one in turn if one not in plan.writing), None)
        if sector is None:
            return False

        def check(status: int, data: bytes) -> None:
            plan.writing.discard(sector)
            if status:
                raise Breach(f"a write to sector {sector} ended with status {status}")
            plan.versions[sector] = version
            self._unchecked.append(sector)

        offered = self._offer(OUT, sector, data=content(sector, version), check=check)
        if offered:
            plan.versions.pop(sector, None)
            plan.writing.add(sector)
        return offered

    def submit_checks(self) -> int:
        offered = 0
        for sector in sorted(set(self._unchecked) & self._plan.versions.keys()):
            if not self._offer(IN, sector, size=BLOCK, check=self._expect(sector)):
                break
            offered += 1
            self._unchecked = [one for one in self._unchecked if one != sector]
        return offered

    def _expect(self, sector: int) -> Check:
        version = self._plan.versions[sector]

        def check(status: int, data: bytes) -> None:
            if status:
                raise Breach(f"a read of sector {sector} ended with status {status}")
            if data == content(sector, version):
                return
            older = any(data == content(sector, v) for v in range(1, version))
            what = "what an earlier write" if older else "other data than what the last write"
            raise Breach(f"sector {sector} has {what} brought")

        return check

    def read(self, sector: int, check: Check) -> bool:
        """Offer a read of one block; false if there is no room."""
        return self._offer(IN, sector, size=BLOCK, check=check)

    def write(self, sector: int, data: bytes, check: Check) -> bool:
        """Offer a write of one block; false if there is no room."""
        return self._offer(OUT, sector, data=data, check=check)

    def flush(self) -> bool:
        return self._plan.flush and self._offer(FLUSH)

    def _offer(
        self,
        kind: int,
        sector: int = 0,
        *,
        size: int = 0,
        data: bytes = b"",
        check: Check = lambda status, data: None,
    ) -> bool:
        place = self._count % len(self.rings)
        if not self._slots[place]:
            return False
        self._count += 1
        at = self._slots[place].pop(0)
        memory = self.memory.bytes
        memory[at : at + 16] = struct.pack("<IIQ", kind, 0, sector)
        memory[at + _STATUS] = _UNWRITTEN
        memory[at + _DATA : at + _DATA + len(data)] = data
        segments = [Segment(at, 16), Segment(at + _STATUS, 1, writable=True)]
        if data or size:
            payload = Segment(at + _DATA, len(data) or size, writable=not data)
            segments.insert(1, payload)
        head = self.rings[place].add(segments)
        self._waiting[place][head] = _Request(at, size, check)
        return True

    def reap(self) -> None:
        for place, ring in enumerate(self.rings):
            for head, _ in ring.take_used():
                request = self._waiting[place].pop(head)
                self._slots[place].append(request.slot)
                self._finish(ring, head, request)

    def _finish(self, ring: Ring, head: int, request: _Request) -> None:
        memory, at = self.memory.bytes, request.slot
        status = memory[at + _STATUS]
        if status == _UNWRITTEN:
            raise Breach(f"vring {ring.index}: request {head} was completed without a status")
        request.check(status, bytes(memory[at + _DATA : at + _DATA + request.size]))

    def settle(self) -> None:
        """Leave out what can't be read from the start: a bad disk is no breach."""
        self._plan.spots = [spot for spot in self._plan.spots if spot not in self._bad]
        self._plan.settled = True
