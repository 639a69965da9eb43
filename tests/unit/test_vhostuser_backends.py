"""Back-ends that take messages in other ways than QEMU's library: each as its source has it."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace

import pytest

from tests.unit.fakes import (
    DEVICE_FEATURES,
    PROTOCOL_FEATURES,
    RING_PACKED,
    VERSION_1,
    Frame,
    eventfd,
    frame,
    memfd,
    u64,
)
from tests.unit.scripted import OFFER, PF, Backend, connected
from vhostbridge.backends.dirty_log import DirtyLog
from vhostbridge.backends.fds import OwnedFd
from vhostbridge.backends.guest import MemoryRegion, VringSetup
from vhostbridge.backends.inflight import InflightBuffer
from vhostbridge.backends.lifecycle import State
from vhostbridge.backends.vhostuser.device import VhostUserDevice
from vhostbridge.backends.vhostuser.messages import ProtocolFeature, Request

R = Request
SIZE = 0x10000
WITH_STATE = {R.SET_VRING_NUM, R.SET_VRING_BASE, R.GET_VRING_BASE, R.SET_VRING_ENABLE}
WITH_FD = {R.SET_VRING_KICK, R.SET_VRING_CALL, R.SET_VRING_ERR}


def index_of(got: Frame) -> int | None:
    """Which vring a message is about."""
    if got.request in WITH_FD:
        return got.u64 & 0xFF
    if got.request in WITH_STATE or got.request == R.SET_VRING_ADDR:
        return int.from_bytes(got.payload[:4], "little")
    return None


class Guest:
    """Memory, and vrings in it with eventfds of their own."""

    def __init__(self) -> None:
        self.owned: list[OwnedFd] = []

    def own(self, fd: OwnedFd) -> OwnedFd:
        self.owned.append(fd)
        return fd

    def region(self, at: int) -> MemoryRegion:
        return MemoryRegion(at, SIZE, self.own(memfd(SIZE)), 0, (0, at, 0))

    def vring(self, index: int, base: int = 0) -> VringSetup:
        at = 0x3000 * index
        kick, call = self.own(eventfd()), self.own(eventfd())
        return VringSetup(index, 16, at, at + 0x1000, at + 0x2000, base, kick, call, None, True)


@contextmanager
def guest() -> Iterator[Guest]:
    made = Guest()
    try:
        yield made
    finally:
        for fd in made.owned:
            fd.close()


@asynccontextmanager
async def peer(
    kind: type[Backend], offer: ProtocolFeature, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[VhostUserDevice, Backend, Guest]]:
    """A device of ours that is connected to such a back-end, and has a guest's memory."""
    monkeypatch.setattr("tests.unit.scripted.Backend", kind)
    async with connected(offer) as (device, backend):
        with guest() as vm:
            await device.set_memory([vm.region(0)])
            yield device, backend, vm


class Vpp(Backend):
    """Has two vrings until it is given the call of another one; hangs up on a vring it has not.

    With addresses it takes both positions of a vring from where a split one has its used index.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.vrings = 2
        self.positions: dict[int, int] = {}

    def _honest(self, got: Frame) -> bytes | None:
        index = index_of(got)
        if got.request == R.SET_VRING_CALL and index is not None:
            self.vrings = max(self.vrings, (index | 1) + 1)
        elif index is not None and index >= self.vrings:
            self.peer.close()
            return None
        if got.request == R.SET_VRING_ADDR and index is not None:
            self.positions[index] = 0
        elif got.request == R.SET_VRING_BASE:
            index, self.positions[index] = struct.unpack("=II", got.payload)
        return super()._honest(got)


VPP = PF.MQ | PF.LOG_SHMFD


async def test_vpp_is_given_more_vrings_than_two(monkeypatch: pytest.MonkeyPatch) -> None:
    async with peer(Vpp, VPP, monkeypatch) as (device, _, vm):
        first = [vm.vring(0), vm.vring(1)]
        await device.run(VERSION_1, first)
        await device.run(VERSION_1, [*first, vm.vring(2), vm.vring(3)])
        await device.suspend()
        assert device.state is State.SUSPENDED


async def test_packed_vrings_of_vpp_go_on_where_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    async with peer(Vpp, VPP, monkeypatch) as (device, backend, vm):
        assert isinstance(backend, Vpp)
        await device.run(VERSION_1 | RING_PACKED, [vm.vring(0, 0x8005_8005)])
        assert backend.positions == {0: 0x8005_8005}


class Dpdk(Backend):
    """Gives a place in the in-flight buffer to the vrings that it has been told of by then."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.known: set[int] = set()
        self.places: dict[int, int] = {}

    def _honest(self, got: Frame) -> bytes | None:
        if (index := index_of(got)) is not None:
            self.known.add(index)
        if got.request == R.SET_INFLIGHT_FD:
            size, _, queues, _ = struct.unpack_from("=QQHH", got.payload)
            self.known.add(queues - 1)
            place = 0
            for index in range(queues):
                if index in self.known:
                    self.places[index] = place
                    place += size // queues
        return super()._honest(got)


async def test_each_vring_has_its_place_in_the_inflight_buffer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else SPDK would not note its requests, and after a crash nobody would know of them."""
    async with peer(Dpdk, OFFER | PF.INFLIGHT_SHMFD, monkeypatch) as (device, backend, vm):
        assert isinstance(backend, Dpdk)
        with InflightBuffer(memfd(0x4000), 0, 0x4000, 4, 16) as buffer:
            device.use_inflight(buffer)
            first = vm.vring(0)
            await device.run(VERSION_1, [first])
            await device.run(VERSION_1, [first, vm.vring(1)])
            assert backend.places == {0: 0, 1: 0x1000, 2: 0x2000, 3: 0x3000}
            device.use_inflight(None)


class RustVmm(Backend):
    """Logs what it writes to the memory that it has at SET_LOG_BASE, and to no other."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.memory: set[int] = set()
        self.logged: set[int] = set()

    def _honest(self, got: Frame) -> bytes | None:
        if got.request == R.SET_MEM_TABLE:
            count = struct.unpack_from("=I", got.payload)[0]
            places = [8 + 32 * number for number in range(count)]
            self.memory = {struct.unpack_from("=Q", got.payload, at)[0] for at in places}
            self.logged.clear()
        elif got.request in (R.ADD_MEM_REG, R.REM_MEM_REG):
            address = struct.unpack_from("=Q", got.payload, 8)[0]
            self.memory ^= {address}
            self.logged.discard(address)
        elif got.request == R.SET_LOG_BASE:
            self.logged = set(self.memory)
            return frame(got.request, u64(0), 5)
        return super()._honest(got)


SLOTS = OFFER | PF.LOG_SHMFD


@pytest.mark.parametrize("offer", [SLOTS, SLOTS & ~PF.CONFIGURE_MEM_SLOTS], ids=["slots", "table"])
async def test_writes_to_memory_that_came_during_a_migration_are_logged(
    monkeypatch: pytest.MonkeyPatch, offer: ProtocolFeature
) -> None:
    """virtiofsd is made with rust-vmm's library. Else the destination would have old pages."""
    async with peer(RustVmm, offer, monkeypatch) as (device, backend, vm):
        assert isinstance(backend, RustVmm)
        await device.run(VERSION_1, [vm.vring(0)])
        with DirtyLog(memfd(4096), 0, 4096) as log:
            await device.log_writes(log, {})
            await device.set_memory([vm.region(0x100000), vm.region(0x200000)])
            assert backend.logged == backend.memory == {0x100000, 0x200000}
            backend.take()
            await device.log_writes(None, {})
            await device.set_memory([vm.region(0x100000)])
            assert "SET_LOG_BASE" not in backend.names


class Plain(Backend):
    """Offers no protocol features: SET_VRING_ENABLE does not exist, and rust-vmm hangs up."""

    def _honest(self, got: Frame) -> bytes | None:
        if got.request == R.GET_FEATURES:
            return frame(got.request, u64(DEVICE_FEATURES & ~PROTOCOL_FEATURES), 5)
        if got.request == R.SET_VRING_ENABLE:
            self.peer.close()
            return None
        return super()._honest(got)


async def test_vrings_of_a_back_end_without_protocol_features_stop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with peer(Plain, ProtocolFeature(0), monkeypatch) as (device, backend, vm):
        vring = vm.vring(0)
        await device.run(VERSION_1, [replace(vring, base=0)])
        await device.suspend()
        assert device.state is State.SUSPENDED
        assert backend.names[-1] == "GET_VRING_BASE"
