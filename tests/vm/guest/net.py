"""A virtio-net driver for tests: numbered frames out, what comes back compared byte by byte."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import struct
import subprocess
from collections.abc import Iterator

from .devices import both_processors, wait_until
from .memory import Memory
from .vring import Buffer, SplitRing

RX, TX = 0, 1
HEADER = 12  # struct virtio_net_hdr_v1
SPAN = 2048
BROADCAST = b"\xff" * 6
OURS = bytes.fromhex("525400112233")


@functools.lru_cache(4096)  # compared soon after it is sent
def frame(number: int) -> bytes:
    """Frame `number`: 60 to 1514 bytes of content that nothing else has."""
    source = random.Random(number)
    body = struct.pack(">I", number) + source.randbytes(source.randint(42, 1496))
    return BROADCAST + OURS + b"\x88\xb5" + body


class NetDriver:
    """A receive and a transmit vring. Receive buffers are always offered again."""

    def __init__(self, memory: Memory, *, size: int = 256, start: int = 0) -> None:
        self.memory = memory
        self.rx = SplitRing(memory, size, start=start)
        self.tx = SplitRing(memory, size, start=start)
        self._rx_at: dict[int, int] = {}
        for _ in range(size):
            self._receive_into(memory.take(SPAN, 64))
        self._tx_free = [memory.take(SPAN, 64) for _ in range(size)]
        self._tx_at: dict[int, int] = {}
        self.sent = 0
        self.received: list[bytes] = []

    @property
    def rings(self) -> list[SplitRing]:
        return [self.rx, self.tx]

    def _receive_into(self, at: int) -> None:
        head = self.rx.add([Buffer(self.memory, at, SPAN, writable=True)], kick=False)
        self._rx_at[head] = at

    def send(self, content: bytes, *, kick: bool = True) -> None:
        """Transmit a frame."""
        for head, _ in self.tx.take_used() if not self._tx_free else ():
            self._tx_free.append(self._tx_at.pop(head))
        at = self._tx_free.pop()
        data = bytes(HEADER) + content
        self.memory.map[at : at + len(data)] = data
        head = self.tx.add([Buffer(self.memory, at, len(data))], kick=kick)
        self._tx_at[head] = at
        self.sent += 1

    def send_numbered(self, count: int, *, kick: bool = True) -> None:
        """Transmit the next `count` numbered frames."""
        for _ in range(count):
            self.send(frame(self.sent), kick=False)
        if kick:
            self.tx.kick()

    def take(self, used: list[tuple[int, int]]) -> None:
        """Keep the frames of used receive buffers, and offer the buffers again."""
        # Heads are used anew as soon as a buffer is offered: look all of them up before.
        for at, length in [(self._rx_at.pop(head), length) for head, length in used]:
            self.received.append(bytes(self.memory.map[at + HEADER : at + length]))
            self._receive_into(at)

    def receive(self, total: int, timeout: float = 10.0) -> None:
        """Wait until `total` frames have come in all."""
        while len(self.received) < total:
            self.take(self.rx.wait_used(timeout))

    def exchange(self, count: int, *, window: int = 64) -> None:
        """Send the next `count` numbered frames, at most `window` of them unanswered."""
        goal = self.sent + count
        while self.sent < goal:
            self.send_numbered(min(window - (self.sent - len(self.received)), goal - self.sent))
            self.receive(min(len(self.received) + 1, goal))
        self.receive(goal)

    def check(self) -> None:
        """None lost, none twice, none altered, all in order."""
        assert len(self.received) == self.sent, f"{len(self.received)} of {self.sent} frames"
        for number, data in enumerate(self.received):
            if data != frame(number):
                got = struct.unpack(">I", data[14:18])[0] if len(data) >= 18 else None
                raise AssertionError(f"frame {number} came as {got}, {len(data)} bytes")


@contextlib.contextmanager
def vhost_user_echo() -> Iterator[str]:
    """The path of a socket where DPDK sends every frame back, as vdpa_sim_net does."""
    path = "/tmp/echo.sock"
    argv = [
        *("dpdk-testpmd", "--no-huge", "--no-pci", "--single-file-segments", "-m", "64"),
        *("--lcores", "0@0,1@0", "--file-prefix=echo", "--vdev", f"net_vhost0,iface={path}", "--"),
        *("--port-topology=loop", "--forward-mode=io", "--auto-start", "--no-flush-rx"),
        *("--total-num-mbufs=2048", "--stats-period=1000"),
    ]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    try:
        wait_until(lambda: os.path.exists(path), 60)
        with both_processors():  # it never sleeps
            yield path
    finally:
        process.terminate()
        process.wait(20)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
