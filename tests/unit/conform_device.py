"""A disk that serves its vrings, and can be made to break the model's contracts one by one."""

from __future__ import annotations

import os
import struct
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

import trio

from vhostbridge.backends.device import Device
from vhostbridge.backends.errors import PeerError, TransportLost
from vhostbridge.backends.fds import OwnedFd
from vhostbridge.backends.guest import MemoryRegion, VringSetup
from vhostbridge.backends.lifecycle import State, Verb, step
from vhostbridge.backends.state import DeviceState

from .fakes import CAPABILITIES, device_info

SECTOR = 512
DISK_SIZE = 1 << 20
VERSION_1, FLUSH, MQ = 1 << 32, 1 << 9, 1 << 12
BLOB = b"internal state"
IN, OUT = 0, 1


class Disk(Device):
    """Two vrings, served by the task ``serve``; ``faults`` names what it does wrong."""

    transport = "vhost-user"

    def __init__(self, faults: Iterable[str] = (), store: bytearray | None = None) -> None:
        super().__init__()
        self.faults = set(faults)
        self.store = bytearray(DISK_SIZE) if store is None else store
        features = VERSION_1 | FLUSH | MQ
        self.info = device_info(features=features, queue_num=2, config_size=60)
        self.capabilities = CAPABILITIES
        self.regions: Sequence[MemoryRegion] = ()
        self.rings: dict[int, VringSetup] = {}
        #: Of each vring: what it fetches next, and what it will complete next.
        self.positions: dict[int, int] = {}
        self.used: dict[int, int] = {}
        self.stopped: set[int] = set()
        self.resumed = False
        self.written = 0
        self.on_write: Callable[[], None] = lambda: None

    @property
    def vrings(self) -> Mapping[int, VringSetup]:
        base = self.positions
        return {i: replace(v, base=base[i]) for i, v in self.rings.items()}

    @property
    def internal_owner(self) -> str:
        return "disk"

    # Serving

    async def serve(self) -> None:
        """Look at kicks for ever, cancelled or not: a back-end is another process."""
        while True:
            await trio.sleep(0.001)
            for index, ring in list(self.rings.items()):
                if ring.kick is None or ring.kick.closed:
                    continue
                if index in self.stopped or self.state is not State.RUNNING:
                    self._sleepwalk(index, ring)
                    continue
                with suppress(BlockingIOError):
                    os.eventfd_read(ring.kick.fileno())
                    self._process(index, ring)

    # What a broken device does in its sleep; the kick stays for later.
    def _sleepwalk(self, index: int, ring: VringSetup) -> None:
        assert ring.kick is not None
        if "runs while suspended" in self.faults or (
            "vring does not stop" in self.faults and index in self.stopped
        ):
            with suppress(BlockingIOError):
                os.eventfd_read(ring.kick.fileno())
                self._process(index, ring)
        if "calls while suspended" in self.faults:
            self._call(ring)
        if "tells while suspended" in self.faults:
            self.on_config_change()
        if "loses kicks" in self.faults:
            with suppress(BlockingIOError):
                os.eventfd_read(ring.kick.fileno())

    def _process(self, index: int, ring: VringSetup) -> None:
        size = ring.size
        available = self._u16(ring.driver_area + 2)
        done = 0
        if (available - self.positions[index]) & 0xFFFF > size:
            return  # as a back-end does that finds the ring broken
        while self.positions[index] != available:
            slot = self.positions[index] % size
            head = self._u16(ring.driver_area + 4 + 2 * slot)
            self.positions[index] = (self.positions[index] + 1) & 0xFFFF
            if "forgets" in self.faults and slot == 5:
                continue
            length = self._request(ring, head)
            used = self.used[index]
            self._write(ring.device_area + 4 + 8 * (used % size), struct.pack("<II", head, length))
            self.used[index] = (used + 1) & 0xFFFF
            self._write(ring.device_area + 2, struct.pack("<H", self.used[index]))
            done += 1
        if done and not (self.resumed and "no call after resume" in self.faults):
            self._call(ring)

    def _request(self, ring: VringSetup, head: int) -> int:
        segments: list[tuple[int, int]] = []
        more = True
        while more:
            raw = self._read(ring.descriptor_area + 16 * head, 16)
            address, size, flags, head = struct.unpack("<QIHH", raw)
            segments.append((address, size))
            more = bool(flags & 1)
        if segments[0][1] != 16:
            return 0  # no header: nothing of this is a request
        kind, _, sector = struct.unpack("<IIQ", self._read(*segments[0]))
        at = sector * SECTOR
        if kind == IN:
            address, size = segments[1]
            self._write(address, bytes(self.store[at : at + size]))
        elif kind == OUT:
            self.written += 1
            if not ("drops a write" in self.faults and self.written % 7 == 0):
                data = self._read(*segments[1])
                self.store[at : at + len(data)] = data
            self.on_write()
        self._write(segments[-1][0], b"\0")
        return 1

    def _call(self, ring: VringSetup) -> None:
        if ring.call is not None and not ring.call.closed:
            os.eventfd_write(ring.call.fileno(), 1)

    def _place_of(self, address: int) -> tuple[int, int]:
        (region,) = [r for r in self.regions if r.guest_address <= address < r.end]
        return region.fd.fileno(), region.offset + address - region.guest_address

    def _read(self, address: int, size: int) -> bytes:
        fd, at = self._place_of(address)
        return os.pread(fd, size, at)

    def _write(self, address: int, data: bytes) -> None:
        fd, at = self._place_of(address)
        os.pwrite(fd, data, at)

    def _u16(self, address: int) -> int:
        return int.from_bytes(self._read(address, 2), "little")

    # Device

    async def read_config(self, offset: int, size: int) -> bytes:
        return struct.pack("<Q", DISK_SIZE // SECTOR).ljust(60, b"\0")[offset : offset + size]

    async def write_config(self, offset: int, data: bytes, flags: int) -> None:
        raise AssertionError("nothing is to be written")

    async def set_memory(self, regions: Sequence[MemoryRegion]) -> None:
        self.regions = regions

    async def run(self, features: int, vrings: Sequence[VringSetup]) -> None:
        await trio.lowlevel.checkpoint()
        assert not features & ~self.info.features
        self.resumed = self.state is State.SUSPENDED
        self._enter_running()
        before = dict(self.rings)
        for ring in vrings:
            if ring.base is not None:
                self.positions[ring.index] = self._start_at(ring.index, ring.base)
                self.used[ring.index] = self.positions[ring.index]
            elif "repeats" in self.faults:
                self.positions[ring.index] -= 1
            elif "skips" in self.faults:
                self.positions[ring.index] += 1
            old = before.get(ring.index)
            if old is not None and "keeps the size" in self.faults:
                ring = replace(ring, size=old.size)
            self.rings[ring.index] = ring
            self._wake(ring)
        self.features = features
        self.stopped.clear()

    def _start_at(self, index: int, base: int) -> int:
        if "ignores bases" in self.faults:
            return 0
        if "remembers after reset" in self.faults:
            return self.positions.get(index, base)
        return base

    def _wake(self, ring: VringSetup) -> None:
        assert ring.kick is not None
        if not ("loses kicks" in self.faults and self.resumed):
            os.eventfd_write(ring.kick.fileno(), 1)
        self._call(ring)

    async def stop_vring(self, index: int) -> int:
        await trio.lowlevel.checkpoint()
        self.stopped.add(index)
        return self.positions[index]

    async def suspend(self) -> None:
        await trio.lowlevel.checkpoint()
        if "breaks at suspend" in self.faults:
            self.fail("it hung up")
        self._check_connected()
        again = self.state is State.SUSPENDED
        self._enter(Verb.SUSPEND)
        if again and "second suspend moves" in self.faults:
            self.positions[0] += 1
        if "leaves in flight" in self.faults:
            self.positions[0] += 1

    async def resume(self) -> None:
        if self.state is State.RUNNING and "resumes anything" in self.faults:
            return
        await super().resume()

    async def reset(self) -> None:
        await trio.lowlevel.checkpoint()
        self._check_connected()
        if "writes after reset" in self.faults and self.rings:
            address = self.rings[0].device_area
            trio.lowlevel.spawn_system_task(self._write_late, address)
        self._enter(Verb.RESET)
        self.rings.clear()
        if "remembers after reset" not in self.faults:
            self.positions.clear()

    def _check_connected(self) -> None:
        if self.state is State.FAILED:
            raise TransportLost("the disk hung up")

    async def _write_late(self, address: int) -> None:
        await trio.sleep(0.01)
        self._write(address + 4, b"late")

    async def capture(self) -> DeviceState:
        state = await super().capture()
        if "counts saves" in self.faults:
            self.written += 1
            state = replace(state, config=str(self.written).encode())
        return state

    async def full_config(self) -> bytes:
        return b""

    def _place(self, features: int, vrings: Sequence[VringSetup]) -> None:
        self.features = features
        self.rings = {v.index: v for v in vrings}
        self.positions = {v.index: v.base or 0 for v in vrings}
        self.used = dict(self.positions)

    def load(self, state: DeviceState) -> None:
        super().load(state)
        if "loads no base" in self.faults:
            self.positions = dict.fromkeys(self.positions, 0)

    @asynccontextmanager
    async def internal_source(self) -> AsyncIterator[OwnedFd]:
        step(self.state, Verb.SAVE)
        reader, writer = os.pipe2(os.O_CLOEXEC)
        self.written += "counts saves" in self.faults
        os.write(writer, BLOB + bytes(self.written if "counts saves" in self.faults else 0))
        os.close(writer)
        with OwnedFd(reader) as pipe:
            yield pipe

    @asynccontextmanager
    async def internal_sink(self) -> AsyncIterator[OwnedFd]:
        step(self.state, Verb.LOAD)
        reader, writer = (OwnedFd(fd) for fd in os.pipe2(os.O_CLOEXEC))
        with reader:
            with writer:
                yield writer
            if "loads nothing" in self.faults or os.read(reader.fileno(), 4096) != BLOB:
                raise PeerError("the disk does not take the state")

    async def set_call(self, index: int, fd: OwnedFd | None) -> None:
        raise AssertionError("not asked for")

    set_kick = set_err = set_call

    async def set_enabled(self, index: int, enabled: bool) -> None:
        raise AssertionError("not asked for")

    async def aclose(self) -> None:
        self.state = State.CLOSED


@asynccontextmanager
async def opened(disk: Disk) -> AsyncIterator[Disk]:
    """The disk, served for the length of the block."""
    serving = trio.CancelScope(shield=True)

    async def serve() -> None:
        with serving:
            await disk.serve()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        try:
            yield disk
        finally:
            serving.cancel()
            await disk.aclose()
