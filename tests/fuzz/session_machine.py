"""A front-end that sends a session anything, for hypothesis: what it may do, and what must hold.

Mostly messages that a front-end would send, in any order, so that the session gets far; some with
a byte, a descriptor or a flag that is wrong; now and then something that is no message at all.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import trio
from hypothesis import strategies as st
from trio.testing import MockClock

from tests.unit.fakes import FakeDevice, RawPeer, address, eventfd, frame, memfd, region, state, u64
from tests.unit.frontend import FEATURES, MEMORY, OFFER, USER, FrontEnd, connected, ring
from vhostbridge.backends.fds import OwnedFd
from vhostbridge.backends.lifecycle import State
from vhostbridge.backends.vhostuser.messages import Request as R
from vhostbridge.backends.vhostuser.specs import FRONTEND_SPECS


def _pipe_end() -> OwnedFd:
    reader, writer = os.pipe()
    os.close(reader)
    return OwnedFd(writer)


def _socket() -> OwnedFd:
    ours, theirs = socket.socketpair()
    ours.close()
    return OwnedFd(theirs.detach())


def _full() -> OwnedFd:
    fd = OwnedFd(os.eventfd(0, os.EFD_CLOEXEC))
    os.eventfd_write(fd.fileno(), 2**64 - 2)
    return fd


#: What travels with messages.
FDS: dict[str, Callable[[], OwnedFd]] = {
    "eventfd": eventfd,
    "full": _full,
    "memory": lambda: memfd(MEMORY),
    "page": lambda: memfd(4096),
    "pipe": _pipe_end,
    "socket": _socket,
    "null": lambda: OwnedFd(os.open("/dev/null", os.O_RDWR)),
    "folder": lambda: OwnedFd(os.open("/", os.O_RDONLY)),
}


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that the front-end does; ``data`` is sent as it is where there is no request."""

    request: int | None
    data: bytes = b""
    fds: tuple[str, ...] = ()
    flags: int = 0x1
    what: str = field(default="send")


index = st.integers(0, 4)
odd_u64 = st.sampled_from([0, 1, 2**16, 2**32 - 1, 2**63, 2**64 - 1])
user = st.sampled_from([USER, USER + MEMORY - 16, USER + 8, 0, 2**64 - 16, USER + 0x1000])
packed_start = 0x8000_8000


def _message(request: R, data: st.SearchStrategy[bytes], *fds: str) -> st.SearchStrategy[Step]:
    return st.builds(Step, st.just(int(request)), data, st.just(fds))


def _state(request: R, num: st.SearchStrategy[int]) -> st.SearchStrategy[Step]:
    return _message(request, st.builds(state, index, num))


_regions = st.sampled_from(
    [region(0, MEMORY, USER), region(MEMORY, 4096, USER + MEMORY), region(0x1000, 4096, 0)]
)
_config = st.builds(
    lambda offset, size: struct.pack("=III", offset, size, 0) + bytes(size),
    st.integers(0, 80),
    st.integers(0, 80),
)

well_formed: st.SearchStrategy[Step] = st.one_of(
    _message(R.GET_FEATURES, st.just(b"")),
    _message(
        R.SET_FEATURES,
        st.sampled_from([FEATURES, FEATURES | 1 << 34, FEATURES | 1 << 26, 1 << 32, 0]).map(u64),
    ),
    _message(R.SET_PROTOCOL_FEATURES, st.sampled_from([int(OFFER), 0x8, 0, 1 << 16]).map(u64)),
    _message(R.SET_OWNER, st.just(b"")),
    _message(R.SET_MEM_TABLE, _regions.map(lambda one: struct.pack("=II", 1, 0) + one), "memory"),
    _message(R.ADD_MEM_REG, _regions.map(lambda one: bytes(8) + one), "memory"),
    _message(R.REM_MEM_REG, _regions.map(lambda one: bytes(8) + one)),
    _message(R.SET_LOG_BASE, st.just(struct.pack("=QQ", 4096, 0)), "page"),
    _state(R.SET_VRING_NUM, st.sampled_from([256, 2, 100, 0, 1024])),
    _state(R.SET_VRING_BASE, st.sampled_from([0, 5, 0xFFFF, packed_start, 0x7FFF7FFF])),
    _message(R.SET_VRING_ADDR, index.map(ring)),
    _message(R.SET_VRING_ADDR, st.builds(address, index, user, user, user)),
    _state(R.GET_VRING_BASE, st.just(0)),
    *(
        _message(request, st.integers(0, 3).map(u64), fd)
        for request in (R.SET_VRING_KICK, R.SET_VRING_CALL, R.SET_VRING_ERR)
        for fd in ("eventfd", "full")
    ),
    _message(R.SET_VRING_KICK, st.integers(0x100, 0x103).map(u64)),
    _state(R.SET_VRING_ENABLE, st.sampled_from([1, 1, 0])),
    _message(R.SET_STATUS, st.sampled_from([0, 1, 3, 11, 15, 15]).map(u64)),
    _message(R.GET_STATUS, st.just(b"")),
    _message(R.GET_CONFIG, _config),
    _message(R.SET_CONFIG, _config),
    _message(R.RESET_DEVICE, st.just(b"")),
    _message(R.SET_BACKEND_REQ_FD, st.just(b""), "socket"),
    _message(
        R.SET_DEVICE_STATE_FD, st.integers(0, 1).map(lambda way: struct.pack("=II", way, 0)), "pipe"
    ),
    _message(R.CHECK_DEVICE_STATE, st.just(b"")),
)


def _set_up(last: int, packed: bool) -> list[Step]:
    features = FEATURES | (1 << 34 if packed else 0)
    steps = [
        Step(R.SET_PROTOCOL_FEATURES, u64(int(OFFER))),
        Step(R.SET_FEATURES, u64(features)),
        Step(R.SET_MEM_TABLE, struct.pack("=II", 1, 0) + region(0, MEMORY, USER), ("memory",)),
    ]
    for one in range(last + 1):
        steps += [
            Step(R.SET_VRING_NUM, state(one, 256)),
            Step(R.SET_VRING_ADDR, ring(one)),
            Step(R.SET_VRING_CALL, u64(one), ("eventfd",)),
            Step(R.SET_VRING_KICK, u64(one), ("eventfd",)),
            Step(R.SET_VRING_ENABLE, state(one, 1)),
        ]
    return [*steps, Step(R.SET_STATUS, u64(15))]


@st.composite
def _wrong(draw: st.DrawFn) -> Step:
    step = draw(well_formed)
    data = bytearray(step.data)
    how = draw(st.integers(0, 3))
    if how == 0 and data:
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    elif how == 1:
        data = data[: draw(st.integers(0, len(data)))] + draw(st.binary(max_size=9))
    elif how == 2 and len(data) >= 8:
        data[-8:] = u64(draw(odd_u64))
    fds = tuple(draw(st.lists(st.sampled_from(sorted(FDS)), max_size=9))) if how == 3 else step.fds
    request = draw(st.one_of(st.just(step.request), st.integers(0, 50)))
    return Step(request, bytes(data), fds, draw(st.sampled_from([1, 9, 9, 0, 5, 2**32 - 1])))


with_ack = well_formed.map(lambda step: Step(step.request, step.data, step.fds, 0x9))
noise = st.builds(
    Step, st.none(), st.binary(max_size=40), st.lists(st.sampled_from(sorted(FDS))).map(tuple)
)
other = st.sampled_from([Step(None, what=what) for what in ("silence", "kick", "config", "shrink")])
anything = st.one_of(with_ack, with_ack, with_ack, well_formed, other, _wrong(), noise)
steps = st.builds(
    lambda begin, more: begin + more,
    st.one_of(st.just([]), st.builds(_set_up, st.integers(0, 2), st.booleans())),
    st.lists(anything, max_size=30),
)


async def _do(vm: FrontEnd, step: Step, owned: list[OwnedFd]) -> None:
    if step.what == "silence":
        await trio.sleep(1)
    elif step.what == "config":
        vm.device.change_config()
    elif step.what == "kick":
        for fd in owned:
            with suppress(OSError):
                os.eventfd_write(fd.fileno(), 1) if _has_room(fd) else None
    elif step.what == "shrink":
        for fd in owned:
            with suppress(OSError):
                os.ftruncate(fd.fileno(), 0)
    else:
        fds = [FDS[name]() for name in step.fds]
        owned += fds
        data = step.data
        if step.request is not None:
            data = frame(step.request, data, step.flags)
        if data or fds:
            await vm.peer.send(data or b"\0", fds)


def _has_room(fd: OwnedFd) -> bool:
    return b"eventfd-count: fffffffffffffffe" not in _info(fd)


def _info(fd: OwnedFd) -> bytes:
    with open(f"/proc/self/fdinfo/{fd.fileno()}", "rb") as file:
        return file.read()


# Replies are taken, whatever they are: only their framing and flags are the same for all.
async def _read(peer: RawPeer) -> None:
    with suppress(OSError):
        while (reply := await peer.receive()) is not None:
            assert reply.flags == 0x5
            assert not reply.fds
            assert reply.request in FRONTEND_SPECS


def _check(vm: FrontEnd) -> None:
    device, session = vm.device, vm.session
    running = {v.index for v in session.vrings.values() if v.running}
    if device.state in (State.RUNNING, State.SUSPENDED):
        assert running <= set(device.placed)
    assert not (device.state is State.RUNNING and session.held)
    for vring in session.vrings.values():
        for fd in (vring.kick, vring.call, vring.err):
            assert fd is None or not fd.closed


async def play(program: list[Step]) -> None:
    """Do all of it; ``connected`` checks that the device is reset and empty at the end."""
    owned: list[OwnedFd] = []
    try:
        async with connected(FakeDevice()) as vm, trio.open_nursery() as nursery:
            nursery.start_soon(_read, vm.peer)
            for step in program:
                with suppress(BrokenPipeError, ConnectionResetError):
                    await _do(vm, step, owned)
                await trio.testing.wait_all_tasks_blocked(0.0001)
                if vm.ended.is_set():
                    break
                _check(vm)
            nursery.cancel_scope.cancel()
    finally:
        for fd in owned:
            fd.close()


def open_descriptors() -> int:
    """How many this process has."""
    return len(os.listdir("/proc/self/fd"))


def run(program: list[Step]) -> None:
    """Play on a clock that jumps, and count descriptors."""
    before = open_descriptors()
    trio.run(play, program, clock=MockClock(autojump_threshold=0))
    assert open_descriptors() == before
