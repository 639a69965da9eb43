"""A vhost-user front-end for tests, written from the protocol's text and not from the product."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from .memory import Memory
from .vring import Ring

VERSION_1 = 1 << 32
RING_PACKED = 1 << 34
PROTOCOL_FEATURES = 1 << 30

LOG_ALL = 1 << 26

MQ, LOG_SHMFD, REPLY_ACK, BACKEND_REQ, CONFIG = 1 << 0, 1 << 1, 1 << 3, 1 << 5, 1 << 9
RESET_DEVICE, MEM_SLOTS, STATUS = 1 << 13, 1 << 15, 1 << 16
INFLIGHT_SHMFD, GET_VRING_BASE_INFLIGHT = 1 << 12, 1 << 20
ALL = MQ | REPLY_ACK | BACKEND_REQ | CONFIG | RESET_DEVICE | MEM_SLOTS | STATUS

# fmt: off
REQUESTS = {
    "GET_FEATURES": 1, "SET_FEATURES": 2, "SET_OWNER": 3, "SET_MEM_TABLE": 5, "SET_LOG_BASE": 6,
    "SET_VRING_NUM": 8,
    "SET_VRING_ADDR": 9, "SET_VRING_BASE": 10, "GET_VRING_BASE": 11, "SET_VRING_KICK": 12,
    "SET_VRING_CALL": 13, "SET_VRING_ERR": 14, "GET_PROTOCOL_FEATURES": 15,
    "SET_PROTOCOL_FEATURES": 16, "GET_QUEUE_NUM": 17, "SET_VRING_ENABLE": 18,
    "SET_BACKEND_REQ_FD": 21, "GET_CONFIG": 24, "SET_CONFIG": 25, "GET_INFLIGHT_FD": 31,
    "SET_INFLIGHT_FD": 32, "RESET_DEVICE": 34,
    "GET_MAX_MEM_SLOTS": 36, "ADD_MEM_REG": 37,
    "REM_MEM_REG": 38, "SET_STATUS": 39, "GET_STATUS": 40,
}
# fmt: on


class Refused(Exception):
    """The back-end acknowledged a message with another value than 0."""


class HungUp(Exception):
    """The back-end closed the connection."""


@dataclass(frozen=True, slots=True)
class InflightBuffer:
    """Where a back-end notes what is in flight; `size` bytes at `offset` of `fd`."""

    fd: int
    size: int
    offset: int
    queues: int
    queue_size: int

    def packed(self) -> bytes:
        """As SET_INFLIGHT_FD has it."""
        return struct.pack("=QQHH4x", self.size, self.offset, self.queues, self.queue_size)


class Frontend:
    """A connection to a back-end. Every message that can be acknowledged is, by default."""

    def __init__(self, path: str, *, timeout: float = 40.0) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(timeout)
        self.sock.connect(path)
        self.protocol = 0
        self.features = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self.sock.close()

    # Framing

    def send(
        self, name: str, payload: bytes = b"", fds: Sequence[int] = (), *, ack: bool = False
    ) -> None:
        """Send a message, and do not wait."""
        header = struct.pack("=III", REQUESTS[name], 9 if ack else 1, len(payload))
        with _hang_ups(name):
            socket.send_fds(self.sock, [header + payload], list(fds))

    def receive(self, name: str) -> bytes:
        """The reply to a message."""
        with _hang_ups(name):
            header = self._exactly(12, name)
            request, flags, size = struct.unpack("=III", header)
            if (request, flags) != (REQUESTS[name], 5):
                raise AssertionError(f"{name}: reply to {request} with flags {flags:#x}")
            return self._exactly(size, name)

    def _exactly(self, size: int, name: str) -> bytes:
        data = b""
        while len(data) < size:
            more = self.sock.recv(size - len(data))
            if not more:
                raise HungUp(name)
            data += more
        return data

    def ask(self, name: str, payload: bytes = b"") -> bytes:
        """A message with a reply of its own."""
        self.send(name, payload)
        return self.receive(name)

    def ask_u64(self, name: str, payload: bytes = b"") -> int:
        (value,) = struct.unpack("=Q", self.ask(name, payload))
        return int(value)

    def tell(self, name: str, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """A message without a reply of its own; waits for its acknowledgement where negotiated."""
        ack = bool(self.protocol & REPLY_ACK)
        self.send(name, payload, fds, ack=ack)
        if ack:
            (value,) = struct.unpack("=Q", self.receive(name))
            if value:
                raise Refused(name)

    def tell_state(self, name: str, index: int, num: int) -> None:
        self.tell(name, struct.pack("=II", index, num))

    def tell_u64(self, name: str, value: int) -> None:
        self.tell(name, struct.pack("=Q", value))

    # Set-up

    def negotiate(self, wanted: int = VERSION_1, protocol: int = ALL) -> None:
        """Features and protocol features, as most front-ends negotiate them."""
        offered = self.ask_u64("GET_FEATURES")
        assert offered & PROTOCOL_FEATURES
        missing = wanted & ~offered
        if missing:
            raise AssertionError(f"features {missing:#x} are not offered, {offered:#x} are")
        available = self.ask_u64("GET_PROTOCOL_FEATURES")
        if protocol & ~available & ~CONFIG:
            raise AssertionError(f"protocol features {available:#x}, wanted {protocol:#x}")
        self.send("SET_PROTOCOL_FEATURES", struct.pack("=Q", protocol & available))
        self.protocol = protocol & available
        self.tell("SET_OWNER")
        self.features = wanted | PROTOCOL_FEATURES
        self.tell_u64("SET_FEATURES", self.features)

    def set_memory(self, memories: Iterable[Memory]) -> None:
        """SET_MEM_TABLE."""
        table = [struct.pack("=QQQQ", m.guest, m.size, m.user, 0) for m in memories]
        fds = [m.fd for m in memories]
        self.tell("SET_MEM_TABLE", struct.pack("=II", len(table), 0) + b"".join(table), fds)

    def log_to(self, fd: int, size: int) -> None:
        """SET_LOG_BASE: the dirty log is in the first bytes of a file."""
        self.send("SET_LOG_BASE", struct.pack("=QQ", size, 0), [fd])
        self.receive("SET_LOG_BASE")

    def log_writes(self, on: bool) -> None:
        """LOG_ALL."""
        self.features = self.features | LOG_ALL if on else self.features & ~LOG_ALL
        self.tell_u64("SET_FEATURES", self.features)

    def log_used(self, index: int, ring: Ring) -> None:
        """SET_VRING_ADDR again, with the used ring logged where it is."""
        self.tell("SET_VRING_ADDR", _addresses(index, ring, logged=True))

    def get_inflight(self, queues: int, queue_size: int) -> InflightBuffer:
        """GET_INFLIGHT_FD: a new buffer, which is ours to keep."""
        self.send("GET_INFLIGHT_FD", struct.pack("=QQHH4x", 0, 0, queues, queue_size))
        header, fds, _, _ = socket.recv_fds(self.sock, 12, 2)
        assert struct.unpack("=III", header) == (REQUESTS["GET_INFLIGHT_FD"], 5, 24)
        size, offset, *numbers = struct.unpack("=QQHH4x", self._exactly(24, "GET_INFLIGHT_FD"))
        assert (numbers, len(fds)) == ([queues, queue_size], 1)
        return InflightBuffer(fds[0], size, offset, queues, queue_size)

    def set_inflight(self, buffer: InflightBuffer) -> None:
        """SET_INFLIGHT_FD."""
        self.tell("SET_INFLIGHT_FD", buffer.packed(), [buffer.fd])

    def add_region(self, memory: Memory) -> None:
        region = struct.pack("=QQQQQ", 0, memory.guest, memory.size, memory.user, 0)
        self.tell("ADD_MEM_REG", region, [memory.fd])

    def remove_region(self, memory: Memory) -> None:
        region = struct.pack("=QQQQQ", 0, memory.guest, memory.size, memory.user, 0)
        self.tell("REM_MEM_REG", region)

    def set_ring(self, index: int, ring: Ring, *, base: int = 0) -> None:
        """Size, base, addresses, kick and call of a vring."""
        self.tell_state("SET_VRING_NUM", index, ring.size)
        self.tell_state("SET_VRING_BASE", index, base)
        self.tell("SET_VRING_ADDR", _addresses(index, ring, logged=False))
        self.tell("SET_VRING_KICK", struct.pack("=Q", index), [ring.kick_fd])
        self.tell("SET_VRING_CALL", struct.pack("=Q", index), [ring.call_fd])

    def enable(self, index: int, on: bool = True) -> None:
        self.tell_state("SET_VRING_ENABLE", index, int(on))

    def start(self, rings: Sequence[Ring], bases: Sequence[int] | None = None) -> None:
        """Set up, enable, and say DRIVER_OK where STATUS is negotiated."""
        for index, ring in enumerate(rings):
            self.set_ring(index, ring, base=bases[index] if bases else 0)
        for index in range(len(rings)):
            self.enable(index)
        self.set_status(0xF)

    def set_status(self, status: int) -> None:
        if self.protocol & STATUS:
            self.tell_u64("SET_STATUS", status)

    def stop_ring(self, index: int) -> int:
        """GET_VRING_BASE: the ring stops; returns where."""
        answer = self.ask("GET_VRING_BASE", struct.pack("=II", index, 0))
        ring, base = struct.unpack("=II", answer)
        assert ring == index
        return int(base)

    def open_reverse_channel(self) -> socket.socket:
        """SET_BACKEND_REQ_FD; returns our end."""
        ours, theirs = socket.socketpair()
        ours.settimeout(self.sock.gettimeout())
        with theirs:
            self.tell("SET_BACKEND_REQ_FD", fds=[theirs.fileno()])
        return ours

    def config(self, offset: int, size: int) -> bytes:
        """Configuration space."""
        answer = self.ask("GET_CONFIG", struct.pack("=III", offset, size, 0) + bytes(size))
        if len(answer) != 12 + size:
            raise Refused("GET_CONFIG")
        return answer[12:]

    def wait_hang_up(self) -> None:
        """Wait until the back-end closes the connection."""
        with contextlib.suppress(ConnectionError):
            assert self.sock.recv(1) == b"", "there was something left to read"


def _addresses(index: int, ring: Ring, *, logged: bool) -> bytes:
    user, log = ring.memory.user, ring.memory.guest + ring.used if logged else 0
    areas = (user + ring.descriptors, user + ring.used, user + ring.avail, log)
    return struct.pack("=IIQQQQ", index, int(logged), *areas)


class _hang_ups(contextlib.ContextDecorator):
    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, ConnectionError):
            raise HungUp(self._name) from error
