"""A block driver whose front-end keeps all that it shares while the daemon behind it is killed."""

from __future__ import annotations

import time

from .blk import IN, OUT, SECTOR, BlockDriver, Request, content
from .frontend import ALL, INFLIGHT_SHMFD, RING_PACKED, VERSION_1, Frontend, InflightBuffer
from .memory import Memory
from .packed import PackedRing
from .vring import SplitRing


class Keeper:
    """Writes `depth` sectors at a time. Request number n writes sector n modulo `sectors`, with
    content of its own, and has to come back once: its vring sees to that.
    """

    def __init__(self, sectors: int, *, depth: int = 24, packed: bool = False) -> None:
        memory = Memory(2 << 20)
        ring = PackedRing(memory, 100) if packed else SplitRing(memory, 128)
        self.driver = BlockDriver(ring, span=SECTOR)
        self.sectors = sectors
        self.depth = depth
        self.features = VERSION_1 | (RING_PACKED if packed else 0)
        self.buffer: InflightBuffer | None = None
        self.frontend: Frontend | None = None
        #: Requests that were sent, and those that came back.
        self.sent = 0
        self.done: set[int] = set()
        #: What was in flight when a daemon ended, once for each time.
        self.in_doubt: list[set[int]] = []
        self._flying: dict[int, int] = {}

    def connect(self, path: str) -> None:
        """Go on, as QEMU does after the loss of its back-end."""
        frontend = self.frontend = Frontend(path)
        ring = self.driver.ring
        frontend.negotiate(self.features, ALL | INFLIGHT_SHMFD)
        frontend.set_memory([ring.memory])
        if self.buffer is None:
            self.buffer = frontend.get_inflight(1, ring.size)
        frontend.set_inflight(self.buffer)
        frontend.start([ring], [ring.restart])

    def work(self, seconds: float) -> None:
        """Write for a while, up to the depth at any time."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            while len(self._flying) < self.depth:
                self._send()
            self._reap(self.driver.take())

    def lose(self) -> None:
        """The daemon is gone."""
        self.close()
        self._reap(self.driver.take())
        self.in_doubt.append(set(self._flying.values()))

    def finish(self) -> None:
        """Wait for all; then every request came back once, and the last writes can be read."""
        while self._flying:
            self._reap(self.driver.wait())
        assert self.done == set(range(self.sent))
        assert self.driver.ring.used_index == self.sent & 0xFFFF
        first = max(0, self.sent - self.sectors)
        for request, data in self.driver.run(
            Request(IN, number % self.sectors, size=SECTOR) for number in range(first, self.sent)
        ):
            number = first + (request.sector - first) % self.sectors
            assert data == content("keeper", number, SECTOR), f"write {number} is not there"

    def close(self) -> None:
        """Leave the daemon."""
        assert self.frontend is not None
        self.frontend.close()

    def _send(self) -> None:
        number, self.sent = self.sent, self.sent + 1
        data = content("keeper", number, SECTOR)
        self._flying[number % self.sectors] = number
        self.driver.submit(Request(OUT, number % self.sectors, data))

    def _reap(self, done: list[tuple[Request, int, bytes]]) -> None:
        for request, status, _ in done:
            assert status == 0, f"status {status} for sector {request.sector}"
            number = self._flying.pop(request.sector)
            assert number not in self.done, f"write {number} came back twice"
            self.done.add(number)
