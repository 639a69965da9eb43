"""A front-end that keeps what is in flight: GET_INFLIGHT_FD and SET_INFLIGHT_FD."""

from __future__ import annotations

import fcntl
import gc
import os
import struct
from dataclasses import replace
from typing import cast

import pytest
import trio

from tests.unit import scripted
from tests.unit.fakes import PROTOCOL_FEATURES, RING_PACKED, FakeDevice, frame, state, u64
from tests.unit.frontend import DEVICE_GETS, FEATURES, OFFER, PF, FrontEnd, connected
from vhostbridge.backends.errors import PeerError, Unsupported
from vhostbridge.backends.fds import OwnedFd
from vhostbridge.backends.inflight import InflightBuffer
from vhostbridge.backends.lifecycle import Ability, How
from vhostbridge.backends.vhostuser.messages import Request as R
from vhostbridge.bridge.handlers import HANDLERS
from vhostbridge.bridge.handover import Arrival, pack, unpack
from vhostbridge.bridge.pauses import Pauses
from vhostbridge.bridge.session import Session

PROTOCOL = OFFER & ~PF.STATUS | PF.INFLIGHT_SHMFD
SPLIT = 16 + 16 * 1024  # bytes of a region with room for all that QEMU lets a guest have


class Noting(FakeDevice):
    """A device that knows what it has in flight."""

    def __init__(self, how: How = How.EMULATED) -> None:
        super().__init__()
        self.capabilities = replace(self.capabilities, inflight=Ability(how, "a fake"))
        self.used: list[tuple[int, bool] | None] = []

    async def make_inflight(self, queues: int, queue_size: int, features: int) -> InflightBuffer:
        return InflightBuffer.make(queues, queue_size, features)

    def use_inflight(self, buffer: InflightBuffer | None, *, leave: bool = False) -> None:
        self.used.append(None if buffer is None else (buffer.queue_size, leave))


def inflight(size: int, offset: int = 0, queues: int = 2, queue_size: int = 64) -> bytes:
    return struct.pack("=QQHH4x", size, offset, queues, queue_size)


async def get_buffer(vm: FrontEnd, queues: int = 2, queue_size: int = 64) -> tuple[bytes, OwnedFd]:
    await vm.send(R.GET_INFLIGHT_FD, inflight(0, 0, queues, queue_size))
    reply = await vm.peer.receive()
    assert reply is not None
    (fd,) = reply.fds
    return reply.payload, vm.own(OwnedFd(fd))


@pytest.mark.parametrize(
    ("how", "offered"),
    [
        (How.NO, PF(0)),
        (How.NATIVE, PF.INFLIGHT_SHMFD),
        (How.EMULATED, PF.INFLIGHT_SHMFD | PF.GET_VRING_BASE_INFLIGHT),
    ],
)
async def test_it_is_offered_where_the_device_knows(how: How, offered: PF) -> None:
    async with connected(Noting(how)) as vm:
        assert await vm.ask(R.GET_PROTOCOL_FEATURES) == u64(int(OFFER | offered))


async def test_buffer_is_made_empty_and_nobody_can_make_it_shorter() -> None:
    async with connected(Noting()) as vm:
        await vm.set_up(protocol=PROTOCOL)
        payload, fd = await get_buffer(vm)
        size = 2 * (SPLIT + 48)  # each to a multiple of 64
        assert payload == inflight(size)
        assert os.pread(fd.fileno(), size + 1, 0) == bytes(size)
        seals = fcntl.fcntl(fd.fileno(), fcntl.F_GET_SEALS)
        assert seals & fcntl.F_SEAL_SHRINK
        with pytest.raises(PermissionError):
            os.ftruncate(fd.fileno(), 0)


async def test_back_end_knows_the_kind_of_vrings_before_it_makes_a_buffer() -> None:
    """As QEMU tells it: DPDK makes one too small for packed vrings otherwise."""
    async with (
        scripted.connected(scripted.OFFER | PF.INFLIGHT_SHMFD) as (device, backend),
        connected(cast(FakeDevice, device)) as vm,
    ):
        backend.answers[R.GET_INFLIGHT_FD] = lambda got: frame(got.request, got.payload, 5)
        await vm.negotiate(FEATURES | RING_PACKED, PROTOCOL)
        await vm.send(R.GET_INFLIGHT_FD, inflight(0))
        assert "gave no in-flight buffer" in str(await vm.lost())
        told, asked = backend.take()[:2]
        assert (told.request, asked.request) == (R.SET_FEATURES, R.GET_INFLIGHT_FD)
        assert told.u64 == DEVICE_GETS | RING_PACKED | PROTOCOL_FEATURES
        vm.device = FakeDevice()


@pytest.mark.parametrize("leave", [False, True])
async def test_device_gets_the_buffer_that_the_front_end_kept(leave: bool) -> None:
    """Until the device is reset: then nothing of it is in flight."""
    device = Noting()
    async with connected(device) as vm:
        await vm.set_up(protocol=PROTOCOL | (PF.GET_VRING_BASE_INFLIGHT if leave else PF(0)))
        payload, fd = await get_buffer(vm)
        await vm.ack(R.SET_INFLIGHT_FD, payload, fd)
        assert device.used == [(64, leave)]
        await vm.ack(R.RESET_DEVICE)
        assert device.used == [(64, leave), None]


@pytest.mark.parametrize(
    ("place", "text"),
    [
        (inflight(4097), "4097 bytes from 0 on in a file of 4096"),
        (inflight(1, 4096), "1 bytes from 4096 on in a file of 4096"),
        (inflight(2**64 - 1, 4096), "in a file of 4096"),
        (inflight(0), "0 bytes from 0 on"),
        (inflight(64, 64), "begins at 64, which is no whole page"),
        (inflight(64, queues=0), "is for 0 vrings"),
        (inflight(64, queues=9), "is for 9 vrings"),
        (inflight(64, queue_size=0), "vrings of 0 entries"),
        (inflight(64, queue_size=1025), "vrings of 1025 entries, "),
    ],
)
async def test_buffer_that_can_not_be_is_refused(
    place: bytes, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    device = Noting()
    async with connected(device) as vm:
        await vm.set_up(protocol=PROTOCOL)
        await vm.nack(R.SET_INFLIGHT_FD, place, vm.memfd(4096))
        assert text in caplog.text
        assert device.used == []


async def test_buffer_that_is_no_memory_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    async with connected(Noting()) as vm:
        await vm.set_up(protocol=PROTOCOL)
        await vm.nack(R.SET_INFLIGHT_FD, inflight(4096), vm.eventfd())
        assert "neither shared memory nor in a file of a local disk" in caplog.text


async def test_buffer_does_not_change_while_vrings_run(caplog: pytest.LogCaptureFixture) -> None:
    async with connected(Noting()) as vm:
        await vm.start(0, protocol=PROTOCOL)
        await vm.nack(R.SET_INFLIGHT_FD, inflight(4096), vm.memfd(4096))
        assert "changes the in-flight buffer while vrings run" in caplog.text
        await vm.ask(R.GET_VRING_BASE, state(0, 0))
        await vm.ack(R.SET_INFLIGHT_FD, inflight(4096), vm.memfd(4096))


async def test_next_process_notes_in_the_same_buffer() -> None:
    """Of a daemon that is restarted under its front-end."""
    boxes: list[OwnedFd] = []

    async def successor(session: Session) -> bool:
        boxes.append(await pack(session, Pauses()))
        return True

    device, other = Noting(), Noting()
    async with connected(device) as vm:
        await vm.set_up(protocol=PROTOCOL)
        payload, fd = await get_buffer(vm)
        await vm.ack(R.SET_INFLIGHT_FD, payload, fd)
        vm.session.part(successor)
        await vm.ended.wait()
        arrival = Arrival(boxes[0])
        session = Session("vm", arrival.channel(), other, HANDLERS)
        await unpack(arrival, session, Pauses())
        assert other.used == [(64, False)]
        assert session.inflight is not None
        assert os.fstat(session.inflight.fd.fileno()).st_ino == os.fstat(fd.fileno()).st_ino
        arrival.close()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(session.run)
            await vm.settle()
            nursery.cancel_scope.cancel()
        await device.set_memory([])


async def test_every_descriptor_is_closed() -> None:
    def count() -> int:
        gc.collect()  # what tests before this one left
        return sum(
            "in-flight" in os.readlink(f"/proc/self/fd/{fd}")
            for fd in os.listdir("/proc/self/fd")
            if os.path.lexists(f"/proc/self/fd/{fd}")
        )

    before = count()
    async with connected(Noting()) as vm:
        await vm.set_up(protocol=PROTOCOL)
        for _ in range(3):
            payload, fd = await get_buffer(vm)
            await vm.ack(R.SET_INFLIGHT_FD, payload, fd)
        assert count() == before + 3 + 1
    assert count() == before


@pytest.mark.parametrize(
    ("index", "size", "text"),
    [
        (2, 64, "is for 2 vrings of 67, and vring 2"),
        (1, 128, "vring 1 has 128 descriptors"),
    ],
)
def test_vring_that_the_buffer_has_no_room_for_is_refused(index: int, size: int, text: str) -> None:
    fd = OwnedFd(os.memfd_create("buffer"))
    os.ftruncate(fd.fileno(), 4096)
    with InflightBuffer(fd, 0, 2200, 2, 64) as buffer:
        first, second = (buffer.region(i, 64, packed=False)[0] for i in (0, 1))
        assert second - first == 1088
        with pytest.raises(PeerError, match=text):
            buffer.region(index, size, packed=False)


async def start_noted(vm: FrontEnd, base: int) -> OwnedFd:
    """Start vring 0 with a new buffer."""
    payload, buffer = await get_buffer(vm, queue_size=256)
    await vm.ack(R.SET_INFLIGHT_FD, payload, buffer)
    await vm.set_ring(0, base)
    await vm.enable(0)
    await vm.settle()
    return buffer


def in_flight(buffer: OwnedFd) -> list[int]:
    """The heads that the first vring's region of a buffer says are in flight."""
    return [head for head in range(256) if os.pread(buffer.fileno(), 1, 16 + 16 * head)[0]]


async def test_while_the_device_is_away_another_front_end_gets_a_buffer() -> None:
    async with connected(Noting()) as vm:
        await vm.start(0, protocol=PROTOCOL)
        vm.device.fail("its process died")
        assert await vm.base(0) == 0
        await start_noted(vm, 0)
        device = vm.device = Noting()
        await vm.session.attach(device)
        assert device.used == [(256, False)]
        assert device.bases == {0: 0}


@pytest.mark.parametrize("heads", [[5, 9], [9, 5]], ids=["in order", "another order"])
async def test_vring_that_stops_while_its_device_is_away_has_nothing_in_flight(
    heads: list[int],
) -> None:
    """What the buffer tells was fetched is fetched again, once: the buffer forgets it."""
    async with connected(Noting()) as vm:
        await vm.set_up(protocol=PROTOCOL)
        used, available = 7, 9
        os.pwrite(vm.memory.fileno(), struct.pack("<HH", 0, available), 0x11000)
        os.pwrite(vm.memory.fileno(), struct.pack("<2H", *heads), 0x11000 + 4 + 2 * used)
        os.pwrite(vm.memory.fileno(), struct.pack("<HH", 0, used), 0x12000)
        vm.device.fail("its process died")
        buffer = await start_noted(vm, used)
        # As another back-end left it: version, descriptors, and what was given back last.
        os.pwrite(buffer.fileno(), struct.pack("<QHHHH", 0, 1, 256, 0, used), 0)
        for counter, head in enumerate(heads, 1):
            os.pwrite(buffer.fileno(), struct.pack("<B7xQ", 1, counter), 16 + 16 * head)
        assert await vm.base(0) == used
        assert await vm.session.device.stop_vring(0) == used
        assert in_flight(buffer) == []


async def test_vring_that_stops_while_its_device_is_away_may_leave_its_requests() -> None:
    """With GET_VRING_BASE_INFLIGHT, even if a later one is complete; the state is not all then."""
    async with connected(Noting()) as vm:
        await vm.set_up(protocol=PROTOCOL | PF.GET_VRING_BASE_INFLIGHT)
        fetched, used = 10, 8
        os.pwrite(vm.memory.fileno(), struct.pack("<HH", 0, fetched), 0x11000)
        os.pwrite(vm.memory.fileno(), struct.pack("<3H", 5, 9, 6), 0x11000 + 4 + 2 * 7)
        os.pwrite(vm.memory.fileno(), struct.pack("<HH", 0, used), 0x12000)
        vm.device.fail("its process died")
        buffer = await start_noted(vm, used)
        os.pwrite(buffer.fileno(), struct.pack("<QHHHH", 0, 1, 256, 0, used), 0)
        for counter, head in enumerate([5, 6], 1):
            os.pwrite(buffer.fileno(), struct.pack("<B7xQ", 1, counter), 16 + 16 * head)
        assert await vm.base(0) == fetched
        # Another vring's stop looks again; the first one's eventfds are closed by then.
        assert await vm.session.device.stop_vring(0) == fetched
        assert in_flight(buffer) == [5, 6]
        with pytest.raises(Unsupported, match="2 requests are in flight, which only the front-end"):
            await vm.session.device.capture()
