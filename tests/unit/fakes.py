"""A device that only remembers what it was asked, and the ends of sockets that talk to ours.

Frames are built here with ``struct``, not with the codec under test.
"""

from __future__ import annotations

import array
import os
import socket
import struct
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace

import trio

from vhostbridge.backends.device import Device, DeviceInfo
from vhostbridge.backends.dirty_log import DirtyLog
from vhostbridge.backends.fds import OwnedFd, signal_eventfds
from vhostbridge.backends.guest import MemoryRegion, VringSetup
from vhostbridge.backends.lifecycle import Ability, Capabilities, How, State, Verb, step

RING_PACKED = 1 << 34
LOG_ALL = 1 << 26
VERSION_1 = 1 << 32
PROTOCOL_FEATURES = 1 << 30
#: VERSION_1, EVENT_IDX, INDIRECT_DESC, packed rings, and the low block and net bits.
DEVICE_FEATURES = VERSION_1 | RING_PACKED | 1 << 29 | 1 << 28 | 0xFFFFFF

NATIVE = Ability(How.NATIVE, "a fake")
CAPABILITIES = Capabilities(*[NATIVE] * 8)


def device_info(**changes: object) -> DeviceInfo:
    info = DeviceInfo(
        target="fake:0",
        device_id=2,
        features=DEVICE_FEATURES,
        vring_limit=4,
        queue_num=4,
        vring_size_max=1024,
        config_size=64,
        iova_first=0,
        iova_last=2**64 - 1,
        region_max=8,
    )
    return replace(info, **changes)  # type: ignore[arg-type]


class FakeDevice(Device):
    """Obeys the contract of ``Device`` and the lifecycle table; refuses what breaks them.

    ``calls`` is what it was asked to do. ``refuse`` maps a method's name to the error that its
    next call raises. ``whole`` makes it stop as a vDPA device does: every vring at once.
    """

    def __init__(self, info: DeviceInfo | None = None, *, whole: bool = True) -> None:
        super().__init__()
        self.info = info or device_info()
        self.capabilities = replace(CAPABILITIES, inflight=Ability(How.NO, "a fake"))
        self.whole = whole
        self.calls: list[tuple[object, ...]] = []
        self.logging: tuple[int | None, dict[int, int]] = (None, {})
        self.refuse: dict[str, Exception] = {}
        self.regions: list[MemoryRegion] = []
        self.rings: dict[int, VringSetup] = {}
        self.placed: dict[int, VringSetup] = {}
        self.bases: dict[int, int] = {}
        self.config = bytes(range(self.info.config_size))
        self.config_changed = False

    transport = "fake"

    @property
    def vrings(self) -> Mapping[int, VringSetup]:
        return {i: replace(v, base=self.bases.get(i)) for i, v in self.placed.items()}

    def _place(self, features: int, vrings: Sequence[VringSetup]) -> None:
        self.features = features
        self.placed = {v.index: v for v in vrings}
        self.bases = {v.index: v.base or 0 for v in vrings}

    async def _called(self, name: str, *arguments: object) -> None:
        await trio.lowlevel.checkpoint()
        self.calls.append((name, *arguments))
        if name in self.refuse:
            raise self.refuse.pop(name)

    def take_calls(self) -> list[tuple[object, ...]]:
        calls, self.calls = self.calls, []
        return calls

    def change_config(self) -> None:
        """As a transport does: at once while running, else when it runs again."""
        if self.state is State.RUNNING:
            self.on_config_change()
        else:
            self.config_changed = True

    async def read_config(self, offset: int, size: int) -> bytes:
        await self._called("read_config", offset, size)
        return self.config[offset : offset + size].ljust(size, b"\0")

    async def write_config(self, offset: int, data: bytes, flags: int) -> None:
        await self._called("write_config", offset, data, flags)

    async def set_memory(self, regions: Sequence[MemoryRegion]) -> None:
        assert self.state not in (State.FAILED, State.CLOSED)
        for region in regions:
            os.fstat(region.fd.fileno())
        await self._called("set_memory", *[(r.guest_address, r.size) for r in regions])
        self.regions = list(regions)

    async def run(self, features: int, vrings: Sequence[VringSetup]) -> None:
        for vring in vrings:
            self._check(features, vring)
        await self._called("run", features, *[(v.index, v.base) for v in vrings])
        if self.state is State.RUNNING:
            self._stop()
        bases = {v.index: self._base_of(v) for v in vrings}
        self._enter_running()
        self.bases = {**self.bases, **bases}
        self.rings = {v.index: v for v in vrings}
        self.placed = dict(self.rings)
        self.features = features
        await signal_eventfds(*(fd for v in vrings for fd in (v.kick, v.call)))
        if self.config_changed:
            self.config_changed = False
            self.on_config_change()

    def _base_of(self, vring: VringSetup) -> int:
        return vring.base if vring.base is not None else self.bases[vring.index]

    # What any transport relies on: the session has checked the front-end's claims.
    def _check(self, features: int, vring: VringSetup) -> None:
        packed = bool(features & RING_PACKED)
        assert not features & ~self.info.features
        assert vring.index < self.info.vring_limit
        assert 0 < vring.size <= self.info.vring_size_max
        assert packed or vring.size & (vring.size - 1) == 0
        assert vring.base is None or packed or vring.base <= 0xFFFF
        sizes = (4, 4) if packed else (6 + 2 * vring.size, 6 + 8 * vring.size)
        areas = (
            (vring.descriptor_area, 16 * vring.size, 16),
            (vring.driver_area, sizes[0], 4 if packed else 2),
            (vring.device_area, sizes[1], 4),
        )
        for address, size, align in areas:
            assert address % align == 0
            assert any(
                r.guest_address <= address and address + size <= r.guest_address + r.size
                for r in self.regions
            )
        for fd in (vring.kick, vring.call, vring.err):
            assert fd is None or not fd.closed

    def _stop(self) -> None:
        self._enter(Verb.SUSPEND)
        self.rings = {}

    async def stop_vring(self, index: int) -> int:
        await self._called("stop_vring", index)
        if self.whole:
            if self.state is State.RUNNING:
                self._stop()
        else:
            self.rings.pop(index, None)
            if not self.rings and self.state is State.RUNNING:
                self._stop()
        return self.bases[index]

    async def suspend(self) -> None:
        step(self.state, Verb.SUSPEND)
        await self._called("suspend")
        if self.state is State.RUNNING:
            self._stop()

    async def reset(self) -> None:
        step(self.state, Verb.RESET)
        await self._called("reset")
        self._enter(Verb.RESET)
        self.rings, self.bases, self.placed = {}, {}, {}

    async def log_writes(self, log: DirtyLog | None, used: Mapping[int, int]) -> None:
        wanted = (None, dict[int, int]()) if log is None else (log.size, dict(used))
        if wanted != self.logging:
            await self._called("log_writes", *wanted)
        self.logging = wanted

    async def set_call(self, index: int, fd: OwnedFd | None) -> None:
        await self._called("set_call", index, fd is not None)
        await signal_eventfds(fd)

    async def set_kick(self, index: int, fd: OwnedFd | None) -> None:
        await self._called("set_kick", index, fd is not None)
        await signal_eventfds(fd)

    async def set_err(self, index: int, fd: OwnedFd | None) -> None:
        await self._called("set_err", index, fd is not None)

    async def set_enabled(self, index: int, enabled: bool) -> None:
        await self._called("set_enabled", index, enabled)

    async def aclose(self) -> None:
        self._enter(Verb.CLOSE)


class OnVdpa(FakeDevice):
    """One whose state has a transport that exists."""

    transport = "vdpa"


OWN = b"what only the back-end knows"


class Stateful(FakeDevice):
    """A device with some bytes of state of its own."""

    transport = "vhost-user"

    def __init__(self) -> None:
        super().__init__()
        self.own = OWN

    @property
    def internal_owner(self) -> str:
        return "fake"

    @asynccontextmanager
    async def internal_source(self) -> AsyncIterator[OwnedFd]:
        reader, writer = (OwnedFd(fd) for fd in os.pipe())
        with reader:
            os.write(writer.fileno(), self.own)
            writer.close()
            yield reader

    @asynccontextmanager
    async def internal_sink(self) -> AsyncIterator[OwnedFd]:
        reader, writer = (OwnedFd(fd) for fd in os.pipe())
        with reader, writer:
            yield writer
            writer.close()
            self.own = os.read(reader.fileno(), 1 << 16)


# Frames and descriptors


def frame(request: int, payload: bytes = b"", flags: int = 0x1) -> bytes:
    return struct.pack("=III", request, flags, len(payload)) + payload


def u64(value: int) -> bytes:
    return struct.pack("=Q", value)


def state(index: int, num: int) -> bytes:
    return struct.pack("=II", index, num)


def address(
    index: int, descriptor: int, used: int, avail: int, *, flags: int = 0, log: int = 0
) -> bytes:
    return struct.pack("=IIQQQQ", index, flags, descriptor, used, avail, log)


def region(guest: int, size: int, user: int, offset: int = 0) -> bytes:
    return struct.pack("=QQQQ", guest, size, user, offset)


def memfd(size: int) -> OwnedFd:
    fd = OwnedFd(os.memfd_create("guest", os.MFD_CLOEXEC))
    os.ftruncate(fd.fileno(), size)
    return fd


def eventfd() -> OwnedFd:
    return OwnedFd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))


def signals(fd: OwnedFd) -> int:
    """How often an eventfd was signalled since it was last asked."""
    try:
        return os.eventfd_read(fd.fileno())
    except BlockingIOError:
        return 0


@dataclass(frozen=True, slots=True)
class Frame:
    """One message as it came off the wire."""

    request: int
    flags: int
    payload: bytes
    fds: tuple[int, ...] = ()

    @property
    def u64(self) -> int:
        return int(struct.unpack("=Q", self.payload)[0])


class RawPeer:
    """One end of a socket pair that sends and receives frames, and nothing by itself."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = trio.socket.from_stdlib_socket(sock)

    async def send(self, data: bytes, fds: Sequence[OwnedFd] = ()) -> None:
        """Send the bytes, the descriptors with the first of them; ours stay open."""
        numbers = array.array("i", [fd.fileno() for fd in fds])
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)] if fds else []
        sent = await self.sock.sendmsg([data], ancillary)
        while sent < len(data):
            sent += await self.sock.send(data[sent:])

    async def receive(self) -> Frame | None:
        """The next frame; ``None`` at the end of the stream. Its descriptors are the caller's."""
        header, fds = await self._exactly(12)
        if not header:
            return None
        request, flags, size = struct.unpack("=III", header)
        payload, more = await self._exactly(size)
        return Frame(request, flags, payload, (*fds, *more))

    async def _exactly(self, size: int) -> tuple[bytes, list[int]]:
        data, fds = b"", array.array("i")
        while len(data) < size:
            room = socket.CMSG_SPACE(32 * fds.itemsize)
            chunk, ancillary, _, _ = await self.sock.recvmsg(size - len(data), room)
            for _level, _kind, numbers in ancillary:
                fds.frombytes(numbers)
            if not chunk:
                break
            data += chunk
        return data, list(fds)

    def close(self) -> None:
        self.sock.close()


@contextmanager
def socket_pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        yield ours, theirs
