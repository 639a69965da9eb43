"""The device's side of a guest's control vring, split and packed, against a driver's side of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.vm.guest.memory import Memory
from tests.vm.guest.packed import START, PackedRing
from tests.vm.guest.vring import Buffer, DriverRing, SplitRing
from vhostbridge.backends.errors import PeerError, Unsupported
from vhostbridge.backends.fds import OwnedFd
from vhostbridge.backends.guest import MemoryRegion, VringSetup
from vhostbridge.bridge.guest_commands import GuestCommands
from vhostbridge.bridge.shadow_rings import GuestMap

INDEX = 2
PACKED = 1 << 34


class Driver:
    """A control vring of 4 or 5 descriptors, and a command of three pieces in it."""

    def __init__(self, layout: str) -> None:
        self.memory = Memory(1 << 16)
        packed = layout == "packed"
        self.features, self.begin = (PACKED, START) if packed else (0, 0)
        self.ring: DriverRing = PackedRing(self.memory, 5) if packed else SplitRing(self.memory, 4)
        self._at = self.memory.take(4096, 64)

    def submit(self, command: bytes) -> None:
        at = self._at
        self.memory.map[at : at + len(command)] = command
        self.memory.map[at + 200] = 0xEE
        pieces = [Buffer(self.memory, at, 2), Buffer(self.memory, at + 2, len(command) - 2)]
        self.ring.add([*pieces, Buffer(self.memory, at + 200, 1, writable=True)], kick=False)

    def reply(self) -> int:
        ((_, length),) = self.ring.take_used()
        assert length == 1
        return self.memory.map[self._at + 200]

    @contextmanager
    def device_side(self, base: int) -> Iterator[GuestCommands]:
        memory, ring, guest = GuestMap(), self.ring, self.memory.guest
        with OwnedFd(os.dup(self.memory.fd)) as fd:
            memory.update([MemoryRegion(guest, self.memory.size, fd, 0, (0, 7, 0))])
        areas = (guest + ring.descriptors, guest + ring.avail, guest + ring.used)
        vring = VringSetup(INDEX, ring.size, *areas, base, None, None, None, enabled=True)
        try:
            commands = GuestCommands(self.features, vring, memory)
            try:
                yield commands
            finally:
                commands.close()
        finally:
            memory.close()


@contextmanager
def driver_of(layout: str) -> Iterator[Driver]:
    driver = Driver(layout)
    try:
        yield driver
    finally:
        driver.ring.close()
        driver.memory.close()


@pytest.mark.parametrize("layout", ["split", "packed"])
def test_commands_of_several_pieces_pass_around_the_ring(layout: str) -> None:
    with driver_of(layout) as driver, driver.device_side(driver.begin) as commands:
        assert commands.fetch() is None
        for number in range(20):
            driver.submit(b"\1\1" + bytes([number]) * 6)
            assert commands.fetch() == (b"\1\1" + bytes([number]) * 6, 1)
            commands.give(bytes([number]))
            assert driver.reply() == number
            assert commands.fetch() is None


@pytest.mark.parametrize("layout", ["split", "packed"])
def test_another_one_goes_on_with_what_was_not_answered(layout: str) -> None:
    with driver_of(layout) as driver:
        base = driver.begin
        for number in range(20):
            driver.submit(bytes((0, 0, number)))
            with driver.device_side(base) as commands:
                assert commands.fetch() == (bytes((0, 0, number)), 1)
                assert commands.base == base
            with driver.device_side(base) as commands:
                assert commands.fetch() == (bytes((0, 0, number)), 1)
                commands.give(b"\0")
                base = commands.base
            assert driver.reply() == 0


def test_packed_chain_without_an_end_breaks_the_vring() -> None:
    with driver_of("packed") as driver:
        driver.submit(b"\0\0\1")
        for place in range(driver.ring.size):
            driver.memory.u16[(driver.ring.descriptors + 16 * place) // 2 + 7] |= 1
        with (
            driver.device_side(START) as commands,
            pytest.raises(PeerError, match="vring 2 stopped: a descriptor chain is a loop"),
        ):
            commands.fetch()


@pytest.mark.parametrize("base", [0x80008005, 0x80058000])
def test_packed_base_outside_the_ring_is_refused(base: int) -> None:
    with (
        driver_of("packed") as driver,
        pytest.raises(Unsupported, match=r"its base 0x[0-9a-f]+ is not in it"),
        driver.device_side(base),
    ):
        pass
