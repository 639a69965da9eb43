"""Front-ends that send what can't be: one clear error, no descriptor lost, the device reset."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from trio.testing import MockClock

from tests.unit.fakes import (
    RING_PACKED,
    address,
    eventfd,
    frame,
    memfd,
    region,
    state,
    u64,
)
from tests.unit.frontend import (
    FEATURES,
    MEMORY,
    OFFER,
    PF,
    TABLE,
    USER,
    FrontEnd,
    connected,
    ring,
    table,
)
from vhostbridge.backends.fds import OwnedFd
from vhostbridge.backends.vhostuser.messages import Request as R
from vhostbridge.backends.vhostuser.specs import FRONTEND_SPECS

PAGE = 0x1000
SLOT = bytes(8)
TOP = 2**64 - PAGE


def pipe_end() -> OwnedFd:
    reader, writer = os.pipe()
    os.close(writer)
    return OwnedFd(reader)


def datagram() -> OwnedFd:
    return OwnedFd(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).detach())


FDS: dict[str, Callable[[], OwnedFd]] = {
    "eventfd": eventfd,
    "pipe": pipe_end,
    "datagram": datagram,
    "memory": lambda: memfd(MEMORY),
    "page": lambda: memfd(PAGE),
}


@dataclass(frozen=True, slots=True)
class Lie:
    """A message that must be refused, after memory is shared and vring 0 has a size."""

    request: int
    payload: bytes
    text: str
    fds: tuple[str, ...] = ()


def beyond(request: R, payload: bytes, *fds: str) -> Lie:
    return Lie(request, payload, "vring 4 is beyond the 4 vrings of fake:0", fds)


def place(descriptor: int, used: int, avail: int) -> bytes:
    return address(0, USER + descriptor, USER + used, USER + avail)


LIES = {
    "unknown request": Lie(99, b"xyz", "sent request 99, which the bridge does not know"),
    "unknown request with descriptor": Lie(99, b"", "request 99", ("memory",)),
    "SET_LOG_FD": Lie(R.SET_LOG_FD, b"", "SET_LOG_FD, which the bridge", ("eventfd",)),
    "GPU_SET_SOCKET": Lie(R.GPU_SET_SOCKET, b"", "GPU_SET_SOCKET, which", ("datagram",)),
    "NUM beyond": beyond(R.SET_VRING_NUM, state(4, 256)),
    "BASE beyond": beyond(R.SET_VRING_BASE, state(4, 0)),
    "ADDR beyond": beyond(R.SET_VRING_ADDR, ring(4)),
    "ENABLE beyond": beyond(R.SET_VRING_ENABLE, state(4, 1)),
    "KICK beyond": beyond(R.SET_VRING_KICK, u64(4), "eventfd"),
    "CALL beyond": beyond(R.SET_VRING_CALL, u64(4), "eventfd"),
    "ERR beyond": beyond(R.SET_VRING_ERR, u64(4), "eventfd"),
    "huge index": Lie(R.SET_VRING_NUM, state(2**32 - 1, 256), "vring 4294967295 is beyond"),
    "size 0": Lie(R.SET_VRING_NUM, state(0, 0), "vring 0 can't have 0 entries"),
    "size 48": Lie(R.SET_VRING_NUM, state(0, 48), "vring 0 can't have 48 entries"),
    "size 2048": Lie(R.SET_VRING_NUM, state(0, 2048), "fake:0 has 1024 at most"),
    "size 2^31": Lie(R.SET_VRING_NUM, state(0, 2**31), "vring 0 wants 2147483648 entries"),
    "ADDR before NUM": Lie(R.SET_VRING_ADDR, ring(1), "vring 1 came before SET_VRING_NUM"),
    "descriptors below": Lie(
        R.SET_VRING_ADDR, place(-16, 0x2000, 0x1000), "the descriptor area of vring 0 at user"
    ),
    "descriptors beyond": Lie(
        R.SET_VRING_ADDR, place(MEMORY - PAGE + 16, 0x2000, 0x1000), "outside the guest memory of 1"
    ),
    "used beyond": Lie(
        R.SET_VRING_ADDR, place(0, MEMORY - 4, 0x1000), "the device area of vring 0 at user"
    ),
    "avail at the top": Lie(
        R.SET_VRING_ADDR, address(0, USER, USER + 0x2000, 2**64 - 2), "the driver area of vring 0"
    ),
    "descriptors askew": Lie(
        R.SET_VRING_ADDR, place(8, 0x2000, 0x1000), "0x8 is not aligned to 16 bytes"
    ),
    "avail askew": Lie(
        R.SET_VRING_ADDR, place(0, 0x2000, 0x1001), "0x1001 is not aligned to 2 bytes"
    ),
    "used askew": Lie(
        R.SET_VRING_ADDR, place(0, 0x2002, 0x1000), "0x2002 is not aligned to 4 bytes"
    ),
    "overlap in the table": Lie(
        R.SET_MEM_TABLE,
        table(region(0, PAGE, USER), region(PAGE - 1, PAGE, USER + MEMORY)),
        "memory region 0xfff+0x1000 overlaps 0x0+0x1000",
        ("page", "page"),
    ),
    "overlap of a slot": Lie(
        R.ADD_MEM_REG, SLOT + region(MEMORY - 1, PAGE, 0), "overlaps 0x0+0x200000", ("page",)
    ),
    "no memory": Lie(R.SET_MEM_TABLE, table(), "shares no memory at all (give the guest shared"),
    "table without descriptors": Lie(
        R.SET_MEM_TABLE, TABLE, "has 1 regions and 0 file descriptors (give the guest shared"
    ),
    "table with too many": Lie(
        R.SET_MEM_TABLE, TABLE, "1 regions and 2 file descriptors", ("memory", "memory")
    ),
    "slot without descriptor": Lie(
        R.ADD_MEM_REG, SLOT + region(MEMORY, PAGE, 0), "0x200000+0x1000 came without a file"
    ),
    "empty slot": Lie(
        R.ADD_MEM_REG, SLOT + region(MEMORY, 0, 0), "0x200000+0x0 is empty", ("page",)
    ),
    "short file": Lie(
        R.ADD_MEM_REG,
        SLOT + region(MEMORY, PAGE + 1, 0),
        "needs 4097 bytes of its file, which has 4096",
        ("page",),
    ),
    "short file behind offset": Lie(
        R.ADD_MEM_REG, SLOT + region(MEMORY, PAGE, 0, 1), "needs 4097 bytes", ("page",)
    ),
    "pipe as memory": Lie(
        R.ADD_MEM_REG,
        SLOT + region(MEMORY, PAGE, 0),
        "is neither shared memory nor in a file of a local disk",
        ("pipe",),
    ),
    "guest address wraps": Lie(
        R.ADD_MEM_REG, SLOT + region(TOP, PAGE + 1, 0), "wraps around the end", ("memory",)
    ),
    "user address wraps": Lie(
        R.ADD_MEM_REG, SLOT + region(MEMORY, PAGE + 1, TOP), "wraps around the end", ("memory",)
    ),
    "file offset wraps": Lie(
        R.ADD_MEM_REG, SLOT + region(MEMORY, PAGE, 0, TOP + 1), "wraps around", ("memory",)
    ),
    "huge slot": Lie(
        R.ADD_MEM_REG, SLOT + region(MEMORY, 2**64 - 1, 0), "wraps around the end", ("memory",)
    ),
    "slot never added": Lie(
        R.REM_MEM_REG, SLOT + region(0, PAGE, USER), "no memory region 0x0+0x1000 to remove"
    ),
    "kick is a pipe": Lie(
        R.SET_VRING_KICK, u64(0), "of SET_VRING_KICK, vring 0, is no eventfd", ("pipe",)
    ),
    "call is a file": Lie(
        R.SET_VRING_CALL, u64(0), "of SET_VRING_CALL, vring 0, is no eventfd", ("page",)
    ),
    "err is a socket": Lie(R.SET_VRING_ERR, u64(0), "vring 0, is no eventfd", ("datagram",)),
    "kick is missing": Lie(R.SET_VRING_KICK, u64(0), "announces a descriptor that is missing"),
    "kick is not due": Lie(
        R.SET_VRING_KICK, u64(0x100), "announces none and brings one", ("eventfd",)
    ),
    "features not offered": Lie(
        R.SET_FEATURES, u64(FEATURES | 1 << 33), "fake:0 was not offering: ACCESS_PLATFORM"
    ),
    "protocol features not offered": Lie(
        R.SET_PROTOCOL_FEATURES, u64(OFFER | PF.PAGEFAULT), "that were not offered: <Protocol"
    ),
    "protocol features unknown": Lie(
        R.SET_PROTOCOL_FEATURES, u64(OFFER | 1 << 63), "acks protocol features that were not"
    ),
    "ENABLE 7": Lie(R.SET_VRING_ENABLE, state(0, 7), "of vring 0 with 7, not 0 or 1"),
    "wide split base": Lie(
        R.SET_VRING_BASE, state(0, 0x10000), "base 0x10000 of split vring 0 has more than 16"
    ),
    "reverse channel is a pipe": Lie(
        R.SET_BACKEND_REQ_FD, b"", "of SET_BACKEND_REQ_FD is not a socket", ("pipe",)
    ),
    "reverse channel is a datagram": Lie(
        R.SET_BACKEND_REQ_FD, b"", "is not a UNIX stream socket", ("datagram",)
    ),
    "wide status": Lie(R.SET_STATUS, u64(0x100), "status 0x100 has more than 8 bits"),
}


async def tell_lie(vm: FrontEnd, lie: Lie, flags: int) -> None:
    fds = [FDS[name]() for name in lie.fds]
    try:
        await vm.send(lie.request, lie.payload, *fds, flags=flags)
    finally:
        for fd in fds:
            fd.close()


async def believe_first(vm: FrontEnd) -> None:
    await vm.set_up()
    await vm.send(R.SET_VRING_NUM, state(0, 256))
    await vm.ask(R.GET_FEATURES)
    vm.device.take_calls()


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
async def test_a_lie_ends_the_session(lie: Lie) -> None:
    async with connected() as vm:
        await believe_first(vm)
        await tell_lie(vm, lie, 0x1)
        error = await vm.lost()
        assert lie.text in str(error)
        assert "\n" not in str(error)
    assert vm.device.take_calls() == [("reset",), ("set_memory",)]


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
async def test_a_lie_is_refused_where_that_can_be_said(
    lie: Lie, caplog: pytest.LogCaptureFixture
) -> None:
    async with connected() as vm:
        await believe_first(vm)
        await tell_lie(vm, lie, 0x9)
        reply = await vm.peer.receive()
        assert reply is not None
        assert (reply.request, reply.flags, reply.payload) == (lie.request, 0x5, u64(1))
        assert vm.device.take_calls() == []
        await vm.ack(R.SET_VRING_ADDR, ring(0))
        assert lie.text in caplog.text
    assert vm.outcome is None


async def test_need_reply_without_reply_ack_is_no_protection() -> None:
    async with connected() as vm:
        await vm.negotiate(protocol=OFFER & ~PF.REPLY_ACK)
        await vm.send(R.SET_VRING_NUM, state(9, 1), flags=0x9)
        assert "vring 9 is beyond" in str(await vm.lost())
        assert await vm.peer.receive() is None


NEEDY = {name: spec for name, spec in FRONTEND_SPECS.items() if spec.needs is not None}


@pytest.mark.parametrize("request_", NEEDY, ids=lambda r: R(r).name)
async def test_a_message_needs_its_protocol_feature(request_: int) -> None:
    spec = NEEDY[request_]
    sizes = {"Raw": 4, "Config": 13, "Uuid": 16, "MemReg": 40, "Inflight": 24}
    layout = getattr(spec.payload, "LAYOUT", None)
    size = layout.size if layout is not None else sizes.get(spec.payload.__name__, 0)
    payload = bytes(size)
    if spec.payload.__name__ == "Config":
        payload = struct.pack("=III", 0, 1, 0) + b"x"
    assert spec.needs is not None
    async with connected() as vm:
        await vm.negotiate(protocol=PF.REPLY_ACK & ~spec.needs)
        fds = [eventfd() for _ in range(spec.fds[0])]
        await vm.send(request_, payload, *fds)
        for fd in fds:
            fd.close()
        if request_ == R.GET_CONFIG:
            reply = await vm.peer.receive()
            assert reply is not None
            assert reply.payload == bytes(12)
            return
        text = str(await vm.lost())
        assert f"{R(request_).name} without having negotiated {spec.needs.name}" in text


@pytest.mark.parametrize(
    ("data", "fds", "text"),
    [
        (frame(5, table(*[region(0, PAGE, 0)] * 9)), (), "9 memory regions"),
        (frame(8, b"four"), (), "malformed SET_VRING_NUM: 4 bytes"),
        (frame(8, state(0, 64)), ("eventfd",), "SET_VRING_NUM with 1 file descriptors"),
        (frame(12, u64(0x200)), (), "unknown bits in vring index 0x200"),
        (frame(8, state(0, 64), 5), (), "sent a reply (SET_VRING_NUM)"),
        (frame(8, state(0, 64), 2), (), "speaks protocol version 2, not 1"),
        (frame(99, bytes(4097)), (), "announced 4097 bytes for request 99"),
    ],
    ids=["9 regions", "short", "descriptor", "index bits", "reply", "version", "huge"],
)
async def test_broken_framing_ends_the_session(
    data: bytes, fds: tuple[str, ...], text: str
) -> None:
    async with connected() as vm:
        await believe_first(vm)
        await vm.peer.send(data, [vm.own(FDS[name]()) for name in fds])
        assert text in str(await vm.lost())


async def test_leaving_in_the_middle_of_a_message_is_told() -> None:
    async with connected() as vm:
        await believe_first(vm)
        await vm.peer.send(struct.pack("=III", R.SET_VRING_KICK, 1, 8), [vm.eventfd()])
        vm.peer.close()
        assert "went away in the middle of a message" in str(await vm.lost())


# Vrings that stop


async def test_a_ring_that_never_started_stops_at_its_base() -> None:
    async with connected() as vm:
        await believe_first(vm)
        assert [await vm.base(index) for index in (0, 3, 3)] == [0, 0, 0]
        await vm.send(R.SET_VRING_BASE, state(0, 41))
        assert [await vm.base(0), await vm.base(0)] == [41, 41]
        assert vm.device.take_calls() == []


async def test_a_packed_ring_that_never_started_has_its_wrap_counters_set() -> None:
    async with connected() as vm:
        await vm.set_up(features=FEATURES | RING_PACKED)
        assert await vm.base(0) == 0x80008000


async def test_stopping_twice_gives_the_same_base(autojump_clock: MockClock) -> None:
    async with connected() as vm:
        await vm.start(0)
        vm.device.bases[0] = 12
        assert [await vm.base(0), await vm.base(0)] == [12, 12]
        assert vm.device.take_calls() == [("stop_vring", 0)]


async def test_stopping_a_vring_beyond_ends_the_session() -> None:
    async with connected() as vm:
        await believe_first(vm)
        await vm.send(R.GET_VRING_BASE, state(4, 0), flags=0x9)
        assert "vring 4 is beyond" in str(await vm.lost())
