"""The driver's side of a vring, and of a split one (virtio 1.3, section 2.7), for tests."""

from __future__ import annotations

import os
import select
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from .memory import Memory

NEXT, WRITE = 1, 2
NO_NOTIFY = 1


class Ring(Protocol):
    """What a front-end tells of a vring: areas are offsets in `memory`."""

    memory: Memory
    size: int
    descriptors: int
    avail: int
    used: int
    kick_fd: int
    call_fd: int


@dataclass(frozen=True, slots=True)
class Buffer:
    """One descriptor: `size` bytes at `offset` of a memory."""

    memory: Memory
    offset: int
    size: int
    writable: bool = False


class DriverRing(ABC):
    """A vring in `memory`, with its eventfds: areas are offsets in that memory."""

    descriptors: int
    avail: int
    used: int

    def __init__(self, memory: Memory, size: int) -> None:
        self.memory = memory
        self.size = size
        self.kick_fd = self.call_fd = -1
        self.new_eventfds()

    def new_eventfds(self) -> None:
        """Other eventfds, as a front-end that restarts a ring may use."""
        self.close()
        self.kick_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.call_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def close(self) -> None:
        for fd in (self.kick_fd, self.call_fd):
            if fd >= 0:
                os.close(fd)
        self.kick_fd = self.call_fd = -1

    @property
    @abstractmethod
    def room(self) -> int:
        """How many descriptors are free."""

    @property
    @abstractmethod
    def avail_index(self) -> int:
        """How many chains were ever offered, modulo 65536."""

    @property
    @abstractmethod
    def used_index(self) -> int:
        """How many of them were given back, as it is in memory."""

    @property
    @abstractmethod
    def restart(self) -> int:
        """The base that a front-end tells which has lost its back-end."""

    @abstractmethod
    def add(self, chain: Sequence[Buffer], *, kick: bool = True) -> int:
        """Offer a chain to the device and return its name: its head, or its id."""

    def kick(self) -> None:
        """Notify the device, unless it asks not to: nobody else would, should it be wrong."""
        if not self.memory.u16[self.used // 2] & NO_NOTIFY:
            os.eventfd_write(self.kick_fd, 1)

    @abstractmethod
    def take_used(self) -> list[tuple[int, int]]:
        """What the device has finished since the last call: names and written lengths."""

    @abstractmethod
    def _where(self) -> str:
        """Positions, for who wonders."""

    def wait_used(self, timeout: float = 10.0) -> list[tuple[int, int]]:
        """What was finished; sleeps until the device's interrupt. A lost one is a failure."""
        poll = select.poll()
        poll.register(self.call_fd, select.POLLIN)
        while True:
            if done := self.take_used():
                return done
            if not poll.poll(timeout * 1000):
                late = self.take_used()
                raise TimeoutError(
                    f"no interrupt in {timeout:g} s; {self._where()}"
                    + f", {len(late)} used entries unannounced" * bool(late)
                )
            os.eventfd_read(self.call_fd)


class SplitRing(DriverRing):
    """A split vring in `memory`, with its eventfds. Addresses are offsets in that memory.

    The used ring begins at a multiple of `used_align`.
    """

    def __init__(
        self, memory: Memory, size: int = 256, *, start: int = 0, used_align: int = 4
    ) -> None:
        super().__init__(memory, size)
        self.descriptors = memory.take(16 * size, 16)
        self.avail = memory.take(6 + 2 * size, 2)
        self.used = memory.take(6 + 8 * size, used_align)
        self._free = list(range(size))
        self._chains: dict[int, list[int]] = {}
        self._avail_index = self._used_seen = start
        memory.u16[self.avail // 2 + 1] = start
        memory.u16[self.used // 2 + 1] = start

    @property
    def room(self) -> int:
        return len(self._free)

    @property
    def avail_index(self) -> int:
        return self._avail_index

    @property
    def used_index(self) -> int:
        return self.memory.u16[self.used // 2 + 1]

    @property
    def restart(self) -> int:
        return self.used_index

    def add(self, chain: Sequence[Buffer], *, kick: bool = True) -> int:
        heads = [self._free.pop() for _ in chain]
        for here, buffer in enumerate(chain):
            at = self.descriptors + 16 * heads[here]
            last = here == len(chain) - 1
            flags = (0 if last else NEXT) | (WRITE if buffer.writable else 0)
            self.memory.u64[at // 8] = buffer.memory.guest + buffer.offset
            self.memory.u32[at // 4 + 2] = buffer.size
            self.memory.u16[at // 2 + 6] = flags
            self.memory.u16[at // 2 + 7] = 0 if last else heads[here + 1]
        self._chains[heads[0]] = heads
        slot = self.avail // 2 + 2 + self._avail_index % self.size
        self.memory.u16[slot] = heads[0]
        self._avail_index = (self._avail_index + 1) & 0xFFFF
        self.memory.u16[self.avail // 2 + 1] = self._avail_index
        if kick:
            self.kick()
        return heads[0]

    def take_used(self) -> list[tuple[int, int]]:
        done = []
        while self._used_seen != self.used_index:
            at = self.used // 4 + 1 + 2 * (self._used_seen % self.size)
            head, length = self.memory.u32[at], self.memory.u32[at + 1]
            if head not in self._chains:
                raise AssertionError(f"used entry {self._used_seen} names {head}, never offered")
            self._free.extend(self._chains.pop(head))
            self._used_seen = (self._used_seen + 1) & 0xFFFF
            done.append((head, length))
        return done

    def _where(self) -> str:
        return f"avail {self._avail_index}, used {self.used_index}"
