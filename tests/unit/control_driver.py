"""The guest's side of a control vring: a driver of it, in front of a device that answers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from tests.unit.fakes import eventfd
from tests.unit.test_controlled import CTRL_RX, CTRL_VQ, MAC_ADDR, MQ, VERSION_1, Bench, bench
from tests.vm.guest.memory import Memory
from tests.vm.guest.vring import Buffer, SplitRing
from vhostbridge.backends.fds import OwnedFd
from vhostbridge.backends.guest import MemoryRegion, VringSetup

FEATURES = VERSION_1 | CTRL_VQ | CTRL_RX | MQ | MAC_ADDR
INDEX = 8
MAC = bytes.fromhex("525400aabbcc")
SET_MAC = b"\1\1" + MAC
PROMISC = b"\0\0\1"


class Guest:
    """A driver with a control vring of 16 descriptors."""

    def __init__(self, b: Bench) -> None:
        self.memory = Memory(1 << 20)
        self.ring = SplitRing(self.memory, 16)
        self._at = self.memory.take(4096, 64)
        fd = b.own(OwnedFd(self.memory.fd))
        self.region = MemoryRegion(self.memory.guest, self.memory.size, fd, 0, (0, 7, 0))
        self.ring.close()
        self.kick, self.call, self.err = (b.own(eventfd()) for _ in range(3))
        self.new_eventfds(self.kick, self.call)
        self._replies: dict[int, tuple[int, int]] = {}

    def new_eventfds(self, kick: OwnedFd, call: OwnedFd) -> None:
        self.kick, self.call = kick, call
        self.ring.kick_fd, self.ring.call_fd = kick.fileno(), call.fileno()

    def setup(self, base: int | None = 0) -> VringSetup:
        guest, ring = self.memory.guest, self.ring
        areas = (guest + ring.descriptors, guest + ring.avail, guest + ring.used)
        fds = (self.kick, self.call, self.err)
        return VringSetup(INDEX, ring.size, *areas, base, *fds, enabled=True)

    def submit(self, command: bytes, *, room: int = 1, kick: bool = True) -> None:
        """In two pieces, as Linux does it."""
        at = self._at + 256 * (len(self._replies) % 8)
        self.memory.map[at : at + len(command)] = command
        self.memory.map[at + 200 : at + 200 + room] = b"\xee" * room
        pieces = [(at, 2), (at + 2, len(command) - 2)] if len(command) > 2 else [(at, len(command))]
        chain = [Buffer(self.memory, *piece) for piece in pieces]
        chain.append(Buffer(self.memory, at + 200, room, writable=True))
        self._replies[self.ring.add(chain, kick=kick)] = (at + 200, room)

    async def replies(self, count: int = 1) -> list[bytes]:
        """Those of the next commands; each with a call."""
        found: list[bytes] = []
        with trio.fail_after(5):
            while len(found) < count:
                for head, _ in self.ring.take_used():
                    at, room = self._replies.pop(head)
                    found.append(self.memory.map[at : at + room])
                await trio.sleep(0.001)
        return found

    async def tell(self, command: bytes) -> int:
        self.submit(command)
        ((ack,),) = await self.replies()
        return ack


@asynccontextmanager
async def relayed() -> AsyncIterator[tuple[Bench, Guest]]:
    async with bench() as b:
        guest = Guest(b)
        await b.device.set_memory([*b.regions, guest.region])
        await b.device.run(FEATURES, [*b.rings(2), guest.setup()])
        yield b, guest
