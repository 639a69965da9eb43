"""The device's side of a control vring, as the specification has it, over the bridge's memory."""

from __future__ import annotations

import mmap
import os
import struct
import threading
from collections.abc import Callable
from typing import Self

from vhostbridge.backends.guest import VringSetup
from vhostbridge.bridge.command_ring import SIZE, CommandRing

NEXT, WRITE, AVAIL, USED = 1, 2, 1 << 7, 1 << 15

Answer = Callable[[bytes, int], bytes]


class ControlSide:
    """Takes commands from a ring that was renewed, and answers each with what ``answer`` gives."""

    def __init__(self, ring: CommandRing, setup: VringSetup, answer: Answer, *, packed: bool):
        self._map = mmap.mmap(ring.region.fd.fileno(), SIZE)
        self._base = ring.region.guest_address
        self._setup = setup
        self._answer = answer
        self._packed = packed
        self._index = 0
        self._wrap = True
        self._stop = False
        self.commands: list[bytes] = []
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._stop = True
        self._thread.join()
        self._map.close()

    def _run(self) -> None:
        assert self._setup.kick is not None
        while not self._stop:
            while self._split() if not self._packed else self._in_packed():
                assert self._setup.call is not None
                os.eventfd_write(self._setup.call.fileno(), 1)
            threading.Event().wait(0.0005)

    def _at(self, address: int) -> int:
        assert 0 <= address - self._base < SIZE
        return address - self._base

    def _descriptor(self, index: int) -> tuple[int, int, int, int]:
        at = self._at(self._setup.descriptor_area) + 16 * index
        address, length, first, second = struct.unpack("<QIHH", self._map[at : at + 16])
        return address, length, first, second

    def _u16(self, at: int) -> int:
        return int.from_bytes(self._map[at : at + 2], "little")

    def _do(self, request: tuple[int, int], reply: tuple[int, int]) -> int:
        at = self._at(request[0])
        command = self._map[at : at + request[1]]
        self.commands.append(command)
        answer = self._answer(command, reply[1])
        at = self._at(reply[0])
        self._map[at : at + len(answer)] = answer
        return len(answer)

    def _split(self) -> bool:
        driver, device = (self._at(a) for a in (self._setup.driver_area, self._setup.device_area))
        if self._u16(driver + 2) == self._index:
            return False
        head = self._u16(driver + 4 + 2 * (self._index % self._setup.size))
        address, length, flags, after = self._descriptor(head)
        assert flags == NEXT
        reply, room, flags, _ = self._descriptor(after)
        assert flags == WRITE
        written = self._do((address, length), (reply, room))
        used = device + 4 + 8 * (self._index % self._setup.size)
        self._index = (self._index + 1) & 0xFFFF
        self._map[used : used + 8] = struct.pack("<II", head, written)
        self._map[device + 2 : device + 4] = self._index.to_bytes(2, "little")
        return True

    def _in_packed(self) -> bool:
        address, length, name, flags = self._descriptor(self._index)
        wrap = self._wrap
        if bool(flags & AVAIL) != wrap or bool(flags & USED) == wrap:
            return False
        assert flags & NEXT and not flags & WRITE
        second = self._index + 1
        if second == self._setup.size:
            second, wrap = 0, not wrap
        reply, room, name, flags = self._descriptor(second)
        assert bool(flags & AVAIL) == wrap and bool(flags & USED) != wrap and flags & WRITE
        written = self._do((address, length), (reply, room))
        at = self._at(self._setup.descriptor_area) + 16 * self._index
        flags = (AVAIL | USED if self._wrap else 0) | WRITE
        self._index += 2
        if self._index >= self._setup.size:
            self._index -= self._setup.size
            self._wrap = not self._wrap
        self._map[at + 8 : at + 14] = struct.pack("<IH", written, name)
        self._map[at + 14 : at + 16] = flags.to_bytes(2, "little")
        return True
