"""The driver's side of a packed vring (virtio 1.3, section 2.8), for tests."""

from __future__ import annotations

from collections.abc import Sequence

from .memory import Memory
from .vring import NEXT, WRITE, Buffer, DriverRing

AVAIL, USED = 1 << 7, 1 << 15
#: Where a ring begins, as vhost encodes it: both places 0, both wrap counters 1.
START = 0x80008000


class PackedRing(DriverRing):
    """A packed vring in `memory`, with its eventfds. Addresses are offsets in that memory.

    `avail` and `used` are its driver's and its device's event suppression.
    """

    def __init__(self, memory: Memory, size: int = 256) -> None:
        super().__init__(memory, size)
        self.descriptors = memory.take(16 * size, 16)
        self.avail = memory.take(4, 4)
        self.used = memory.take(4, 4)
        self._free = size
        self._ids = list(range(size))
        self._chains: dict[int, int] = {}  # by id, how many descriptors
        self._next = self._used_next = 0
        self._wrap = self._used_wrap = True
        self._offered = self._taken = 0

    @property
    def room(self) -> int:
        return self._free

    @property
    def avail_index(self) -> int:
        return self._offered & 0xFFFF

    @property
    def used_index(self) -> int:
        """There is none in memory: what was given back is counted."""
        return (self._taken + len(self._given())) & 0xFFFF

    @property
    def restart(self) -> int:
        """Nothing in memory tells, so it is where QEMU began."""
        return START

    def add(self, chain: Sequence[Buffer], *, kick: bool = True) -> int:
        assert len(chain) <= self._free
        name, first, first_flags = self._ids.pop(0), self._next, 0
        for here, buffer in enumerate(chain):
            at = self.descriptors + 16 * self._next
            self.memory.u64[at // 8] = buffer.memory.guest + buffer.offset
            self.memory.u32[at // 4 + 2] = buffer.size
            self.memory.u16[at // 2 + 6] = name
            flags = (AVAIL if self._wrap else USED) | (WRITE if buffer.writable else 0)
            flags |= NEXT if here < len(chain) - 1 else 0
            if here:
                self.memory.u16[at // 2 + 7] = flags
            else:
                first_flags = flags
            self._next, self._wrap = self._behind(self._next, self._wrap, 1)
        self._chains[name] = len(chain)
        self._free -= len(chain)
        self._offered += 1
        # It makes all of them available.
        self.memory.u16[(self.descriptors + 16 * first) // 2 + 7] = first_flags
        if kick:
            self.kick()
        return name

    def _behind(self, place: int, wrap: bool, count: int) -> tuple[int, bool]:
        place += count
        return (place - self.size, not wrap) if place >= self.size else (place, wrap)

    # Id and length of what was given back and not taken yet.
    def _given(self) -> list[tuple[int, int]]:
        given: list[tuple[int, int]] = []
        place, wrap = self._used_next, self._used_wrap
        while len(given) < len(self._chains):
            at = self.descriptors + 16 * place
            flags = self.memory.u16[at // 2 + 7]
            if bool(flags & AVAIL) != wrap or bool(flags & USED) != wrap:
                break
            name, length = self.memory.u16[at // 2 + 6], self.memory.u32[at // 4 + 2]
            if name not in self._chains or name in dict(given):
                raise AssertionError(f"used descriptor {place} names {name}, which is not offered")
            given.append((name, length))
            place, wrap = self._behind(place, wrap, self._chains[name])
        return given

    def take_used(self) -> list[tuple[int, int]]:
        given = self._given()
        for name, _ in given:
            count = self._chains.pop(name)
            self._used_next, self._used_wrap = self._behind(self._used_next, self._used_wrap, count)
            self._free += count
            self._ids.append(name)
        self._taken += len(given)
        return given

    def _where(self) -> str:
        return f"next {self._next} {self._wrap:d}, used {self._used_next} {self._used_wrap:d}"
