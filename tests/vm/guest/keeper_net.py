"""A network driver with packed vrings, whose front-end keeps all that it shares while the daemon
behind it is killed."""

from __future__ import annotations

import time
from collections.abc import Callable

from .frontend import ALL, INFLIGHT_SHMFD, RING_PACKED, VERSION_1, Frontend, InflightBuffer
from .memory import Memory
from .net import HEADER, SPAN, frame
from .packed import PackedRing
from .vring import Buffer

RX, TX = 0, 1
NUMBER = slice(14, 18)  # of a frame


class PacketKeeper:
    """Sends numbered frames to whoever sends them back. Every buffer is two descriptors or one, in
    turn, and has to come back once: its vring sees to that.
    """

    def __init__(self, size: int = 100) -> None:
        self.memory = Memory((1 << 20) + 4096 * size)
        self.rx, self.tx = (PackedRing(self.memory, size) for _ in range(2))
        self.buffer: InflightBuffer | None = None
        self.frontend: Frontend | None = None
        #: How often each frame came back.
        self.received: dict[int, int] = {}
        self.sent = 0
        #: Frames whose buffers were not given back when a daemon ended, once for each time.
        self.in_doubt: list[set[int]] = []
        self._at: dict[int, int] = {}  # of receive buffers, by their ids
        self._flying: dict[int, tuple[int, int]] = {}  # frame and buffer, by id
        self._free = [self.memory.take(SPAN, 64) for _ in range(size)]
        self._spare = [self.memory.take(SPAN, 64) for _ in range(size)]
        self._offered = 0
        self.offer()

    def _chain(self, at: int, size: int, *, writable: bool) -> list[Buffer]:
        self._offered += 1
        cuts = [(0, HEADER), (HEADER, size - HEADER)] if self._offered % 2 else [(0, size)]
        return [Buffer(self.memory, at + begin, part, writable) for begin, part in cuts]

    def offer(self) -> None:
        """Receive into all buffers that there is room for."""
        while self._spare and self.rx.room >= 2:
            at = self._spare.pop()
            self._at[self.rx.add(self._chain(at, SPAN, writable=True), kick=False)] = at
        self.rx.kick()

    def connect(self, path: str, protocol: int = ALL | INFLIGHT_SHMFD) -> None:
        """Go on, as QEMU does after the loss of its back-end."""
        frontend = self.frontend = Frontend(path)
        frontend.negotiate(VERSION_1 | RING_PACKED, protocol)
        frontend.set_memory([self.memory])
        if protocol & INFLIGHT_SHMFD:
            self.buffer = self.buffer or frontend.get_inflight(2, self.rx.size)
            frontend.set_inflight(self.buffer)
        frontend.start([self.rx, self.tx], [self.rx.restart, self.tx.restart])

    def send(self) -> None:
        """The next frame."""
        data = bytes(HEADER) + frame(self.sent)
        at = self._free.pop()
        self.memory.map[at : at + len(data)] = data
        name = self.tx.add(self._chain(at, len(data), writable=False))
        self._flying[name] = (self.sent, at)
        self.sent += 1

    def reap(self) -> None:
        """Look at what came back, without waiting."""
        for name, _ in self.tx.take_used():
            self._free.append(self._flying.pop(name)[1])
        for name, length in self.rx.take_used():
            at = self._at.pop(name)
            data = bytes(self.memory.map[at + HEADER : at + length])
            number = int.from_bytes(data[NUMBER], "big")
            assert number < self.sent and data == frame(number), f"frame {number} was altered"
            self.received[number] = self.received.get(number, 0) + 1
            self._spare.append(at)

    def work(self, seconds: float) -> None:
        """Send for a while."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            while self._free and self.tx.room >= 2 and len(self._flying) < 16:
                self.send()
            self.reap()
            self.offer()

    def lose(self) -> None:
        """The daemon is gone."""
        self.close()
        self.reap()
        self.in_doubt.append({number for number, _ in self._flying.values()})

    def finish(self) -> None:
        """Every buffer comes back: the last ones to receive into are filled one frame at a time,
        of which some may be lost, as on any network."""

        def filled() -> bool:
            if self._at and not self._flying:
                self.send()
            return not self._at and not self._flying

        self._until(lambda: not self._flying)
        self.offer()
        self._until(filled)
        assert (self.tx.room, self.rx.room) == (self.tx.size, self.rx.size)

    def _until(self, done: Callable[[], bool]) -> None:
        end = time.monotonic() + 10
        while not done():
            assert time.monotonic() < end, f"{len(self._flying)} are sent, {len(self._at)} wait"
            self.reap()

    def close(self) -> None:
        """Leave the daemon."""
        assert self.frontend is not None
        self.frontend.close()
