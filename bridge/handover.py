"""A front-end's session goes from one process to the next: what of it, and how.

What the session knows is a CBOR map; the front-end's socket, guest memory, eventfds and the like go
beside it as descriptors, and the device's state is a stream in memory. All of it waits in one
socket, whose other end is closed: whoever reads it has it, once, and nobody has half of it.
"""

from __future__ import annotations

import array
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

import cbor2
import trio

from vhostbridge.backends.dirty_log import DirtyLog
from vhostbridge.backends.errors import BridgeError, StateError
from vhostbridge.backends.fds import OwnedFd, close_all, is_eventfd
from vhostbridge.backends.inflight import InflightBuffer
from vhostbridge.backends.lifecycle import State
from vhostbridge.backends.state import PRODUCER
from vhostbridge.backends.state_stream import Sink, check_stream, save_stream
from vhostbridge.backends.trace import OFF, Tracer
from vhostbridge.backends.vhostuser.channel import Channel
from vhostbridge.backends.vhostuser.messages import ProtocolFeature, Region, VringAddr
from vhostbridge.backends.vhostuser.specs import BACKEND_SPECS, FRONTEND_SPECS

from .incoming import Incoming, Origin
from .memory import guest_region
from .offer import check_features, offered_protocol
from .state_transfer import load_device, misfits, save_device
from .vring import FrontendVring

if TYPE_CHECKING:
    from vhostbridge.backends.state import DeviceState
    from vhostbridge.backends.state_stream import CheckedFd

    from .session import Session

# Raised whenever a fact is added or means something else: who does not know them cuts the front-end
# off, which then connects anew.
FORMAT = 2

# A message of the socket carries so much; the kernel takes 253 descriptors.
_BYTES, _FDS = 16 << 10, 128
_MAX_BYTES = 1 << 20
_MAX_FDS = 4096

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RegionFacts:
    """Guest memory, in bytes; ``fd`` and the like count the descriptors that go along."""

    guest_address: int
    size: int
    user_address: int
    offset: int
    fd: int


@dataclass(frozen=True, slots=True)
class VringFacts:
    """A vring as the front-end described it; ``address`` as in SET_VRING_ADDR."""

    index: int
    size: int
    base: int | None
    address: list[int] | None
    kick: int | None
    call: int | None
    err: int | None
    enabled: bool
    set_up: bool
    running: bool


@dataclass(frozen=True, slots=True)
class Facts:
    """All that is known of a session.

    Attributes:
        began: when the device stood still, in ns of the monotonic clock.
        waits: where the device's state came from (``Origin``), if its vrings have not come yet.
        state: the stream with the device's state; ``None`` if it is RESET.
        log: size and offset in bytes, and the descriptor of the dirty log.
        inflight: size and offset in bytes, vrings, their size, and the descriptor of the in-flight
            buffer.
    """

    format: int
    producer: str
    began: int
    features: int
    protocol: int
    status: int
    held: bool
    waits: str | None
    socket: int
    reverse: int | None
    state: int | None
    log: list[int] | None
    inflight: list[int] | None
    regions: list[dict[str, Any]]
    vrings: list[dict[str, Any]]


class _Luggage:
    def __init__(self) -> None:
        self.fds: list[int] = []

    def add(self, fd: OwnedFd | Channel | None) -> int | None:
        return None if fd is None else self.put(fd)

    def put(self, fd: OwnedFd | Channel) -> int:
        self.fds.append(fd.fileno())
        return len(self.fds) - 1


async def pack(session: Session) -> OwnedFd:
    """Suspend the device of a session that reads no more, and put all of it into a socket.

    The session stays what it is, and is its process's to end without touching the device again.

    Raises:
        BridgeError: the device can't be suspended or saved, or the kernel does not take so much.
    """
    if session.transfer is not None:
        raise StateError("the front-end is moving the device's state", "it will begin again")
    if session.reverse is not None and not session.reverse.at_boundary:
        raise StateError("a notification was half sent", "the front-end takes no more of them")
    began = time.monotonic_ns()
    state = await _state(session)
    try:
        facts, fds = _facts(session, began, state)
        return _box(cbor2.dumps(asdict(facts)), fds)
    finally:
        close_all([state])


async def _state(session: Session) -> OwnedFd | None:
    device = session.device
    if device.state is State.RUNNING:
        try:
            await device.suspend()
        except BridgeError:
            # It may have broken over that, and what it left tells where it was.
            if not session.awaiting:
                raise
    if device.state is State.RESET:
        return None
    stream = OwnedFd(os.memfd_create("device-state", os.MFD_CLOEXEC))
    try:
        if session.awaiting:
            with Sink(stream.dup()) as sink:
                await save_stream(session.absence.known_state, None, sink, lambda count: None)
        else:
            await save_device(device, stream, lambda count: None)
        os.lseek(stream.fileno(), 0, os.SEEK_SET)
    except BaseException:
        stream.close()
        raise
    return stream


def _facts(session: Session, began: int, state: OwnedFd | None) -> tuple[Facts, list[int]]:
    luggage = _Luggage()
    log, inflight = session.log_to, session.inflight
    facts = Facts(
        format=FORMAT,
        producer=PRODUCER,
        began=began,
        features=session.features,
        protocol=int(session.protocol),
        status=session.status,
        held=session.held,
        waits=None if session.incoming is None else session.incoming.origin.name,
        socket=luggage.put(session.channel),
        reverse=luggage.add(session.reverse),
        state=luggage.add(state),
        log=None if log is None else [log.size, log.offset, luggage.put(log.fd)],
        inflight=None if inflight is None else [*inflight.place, luggage.put(inflight.fd)],
        regions=[
            asdict(
                RegionFacts(
                    guest_address=one.region.guest_address,
                    size=one.region.size,
                    user_address=one.user_address,
                    offset=one.region.offset,
                    fd=luggage.put(one.region.fd),
                )
            )
            for one in session.memory
        ],
        vrings=[asdict(_vring_facts(one, luggage)) for one in session.vrings.values()],
    )
    return facts, luggage.fds


def _vring_facts(vring: FrontendVring, luggage: _Luggage) -> VringFacts:
    at = vring.address
    return VringFacts(
        index=vring.index,
        size=vring.size,
        base=vring.base,
        address=None if at is None else [at.flags, at.descriptor, at.used, at.avail, at.log],
        kick=luggage.add(vring.kick),
        call=luggage.add(vring.call),
        err=luggage.add(vring.err),
        enabled=vring.enabled,
        set_up=vring.set_up,
        running=vring.running,
    )


# A sequence of messages, each with its part of the bytes and of the descriptors.
def _box(data: bytes, fds: Sequence[int]) -> OwnedFd:
    theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs, ours:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _MAX_BYTES)
        while data or fds:
            rights = array.array("i", fds[:_FDS])
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if rights else []
            try:
                ours.sendmsg([data[:_BYTES] or b"\0"], ancillary, socket.MSG_DONTWAIT)
            except OSError as error:
                raise StateError(
                    f"the kernel does not take a session of {len(fds)} descriptors: "
                    f"{os.strerror(error.errno or 0)}",
                    "raise the limit of open files (LimitNOFILE=)",
                ) from None
            data, fds = data[_BYTES:], fds[_FDS:]
        return OwnedFd(theirs.detach())


class Arrival:
    """A session that the process before this one left: facts and descriptors, checked.

    What is still in here when it is closed is closed too.
    """

    def __init__(self, box: OwnedFd) -> None:
        self._fds: list[OwnedFd | None] = []
        try:
            data = self._unpack(box)
            self.facts = _facts_of(data)
        except BaseException:
            self.close()
            raise

    def _unpack(self, box: OwnedFd) -> bytes:
        data = bytearray()
        space = socket.CMSG_SPACE(2 * _FDS * array.array("i").itemsize)
        with _socket(box) as sock:
            while len(data) < _MAX_BYTES and len(self._fds) < _MAX_FDS:
                try:
                    piece, ancillary, flags, _ = sock.recvmsg(
                        _BYTES, space, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
                    )
                except OSError as error:
                    raise _unusable(os.strerror(error.errno or 0)) from None
                for level, kind, rights in ancillary:
                    if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                        numbers = array.array("i", rights)
                        self._fds += [OwnedFd(number) for number in numbers]
                if flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
                    raise _unusable("descriptors were lost on the way")
                if not piece:
                    return bytes(data)
                data += piece
        raise _unusable("it is too large")

    def take(self, index: int) -> OwnedFd:
        """One of the descriptors, which is the caller's from now on.

        Raises:
            StateError: there is none of that number, or it was taken already.
        """
        if not 0 <= index < len(self._fds) or (fd := self._fds[index]) is None:
            raise _unusable(f"descriptor {index} is missing")
        self._fds[index] = None
        return fd

    def take_some(self, index: int | None) -> OwnedFd | None:
        return None if index is None else self.take(index)

    def channel(self, trace: Tracer = OFF) -> Channel:
        """The front-end's connection; ``trace`` is told what it says."""
        sock = _stream(self.take(self.facts.socket))
        return Channel(sock, FRONTEND_SPECS, replies=False, peer="front-end", trace=trace)

    def give_to(self, session: Session) -> None:
        """Let a new session know what the old one knew; the device is not touched.

        Raises:
            BridgeError: the facts do not fit the device or each other. What the session has by then
                is its own to close.
        """
        facts = self.facts
        session.features, session.status = facts.features, facts.status
        session.protocol = ProtocolFeature(facts.protocol)
        session.held = facts.held
        if facts.reverse is not None:
            sock = _stream(self.take(facts.reverse))
            session.reverse = Channel(
                sock, BACKEND_SPECS, replies=True, peer="front-end", trace=session.trace
            )
        for one in facts.regions:
            self._give_region(session, _read(RegionFacts, one))
        for one in facts.vrings:
            self._give_vring(session, _read(VringFacts, one))
        if facts.log is not None:
            if len(facts.log) != 3:
                raise _unusable("its dirty log has no size, offset and descriptor")
            size, offset, number = facts.log
            fd = self.take(number)
            try:
                session.log_to = DirtyLog(fd, offset, size)
            except BaseException:
                fd.close()
                raise

        if facts.inflight is not None:
            self._give_inflight(session, facts.inflight)

    def _give_inflight(self, session: Session, one: list[int]) -> None:
        if len(one) != 5:
            raise _unusable("its in-flight buffer has no place, vrings and descriptor")
        size, offset, queues, queue_size, number = one
        fd = self.take(number)
        try:
            session.inflight = InflightBuffer(fd, offset, size, queues, queue_size)
        except BaseException:
            fd.close()
            raise

    def _give_region(self, session: Session, one: RegionFacts) -> None:
        wire = Region(one.guest_address, one.size, one.user_address, one.offset)
        fd = self.take(one.fd)
        try:
            session.memory = session.memory.with_region(guest_region(wire, fd))
        except BaseException:
            fd.close()
            raise

    def _give_vring(self, session: Session, one: VringFacts) -> None:
        vring = session.vring(one.index)
        vring.kick, vring.call, vring.err = map(self.take_some, (one.kick, one.call, one.err))
        if not all(is_eventfd(fd) for fd in (vring.kick, vring.call, vring.err) if fd is not None):
            raise _unusable(f"what should be an eventfd of vring {one.index} is none")
        if one.size:
            vring.check_size(one.size, session.device.info, session.packed)
        if one.address is not None:
            if len(one.address) != 5:
                raise _unusable(f"vring {one.index} has no five parts of an address")
            vring.address = VringAddr(one.index, *one.address)
        vring.size, vring.base = one.size, one.base
        vring.enabled, vring.set_up, vring.running = one.enabled, one.set_up, one.running

    async def state(self) -> tuple[DeviceState, CheckedFd] | None:
        """The device's state and the stream that it is in; ``None``: it is to be RESET.

        Raises:
            StateError: it is damaged.
        """
        if self.facts.state is None:
            return None
        return await check_stream(self.take(self.facts.state), lambda count: None)

    def close(self) -> None:
        close_all(self._fds)
        self._fds.clear()


async def unpack(arrival: Arrival, session: Session) -> float:
    """Let a new session and its RESET device go on where the ones before stopped.

    Returns how long the guest had to wait, in seconds.

    Raises:
        BridgeError: they don't fit the device; the front-end can't go on.
    """
    arrival.give_to(session)
    device = session.device
    check_features(device.info, session.features)
    missing = session.protocol & ~offered_protocol(device)
    if missing:
        raise _unusable(f"the device does not go with {missing.name}, which the front-end uses")
    await device.set_memory(session.memory.regions)
    found = await arrival.state()
    if found is not None:
        state, stream = found
        with stream:
            reasons = await misfits(device, state)
            if reasons:
                raise _unusable(f"{device.info.target} does not fit: {'; '.join(reasons)}")
            await load_device(device, state, stream, lambda count: None)
        origin = Origin.__members__.get(arrival.facts.waits or "")
        session.incoming = None if origin is None else Incoming(state, origin)
    await session.go_on()
    return (time.monotonic_ns() - arrival.facts.began) / 1e9


def _unusable(why: str) -> StateError:
    return StateError(
        f"what the process before left of a front-end can't be used: {why}",
        "the front-end is cut off and may connect anew",
    )


# Owns the descriptor.
def _socket(fd: OwnedFd) -> socket.socket:
    try:
        sock = socket.socket(fileno=fd.fileno())
    except OSError as error:
        fd.close()
        raise _unusable(os.strerror(error.errno or 0)) from None
    fd.detach()
    return sock


def _stream(fd: OwnedFd) -> trio.socket.SocketType:
    sock = _socket(fd)
    if (sock.family, sock.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
        sock.close()
        raise _unusable("a connection is none")
    return trio.socket.from_stdlib_socket(sock)


def _facts_of(data: bytes) -> Facts:
    try:
        value = cbor2.loads(data)
    except (cbor2.CBORError, ValueError, RecursionError):
        raise _unusable("it is damaged") from None
    known = isinstance(value, Mapping) and value.get("format") == FORMAT
    if not known:
        raise _unusable("another version of vhost-bridge wrote it")
    return _read(Facts, value)


# Exactly these facts, each of its type; numbers are positive.
def _read(cls: type[T], value: Any) -> T:
    names = {field.name for field in fields(cls)}  # type: ignore[arg-type]
    if not isinstance(value, Mapping) or value.keys() != names:
        raise _unusable(f"its {cls.__name__} are not the ones that are known")
    for name, hint in get_type_hints(cls).items():
        if not _is(value[name], str(hint)):
            raise _unusable(f"{name} of its {cls.__name__} is malformed")
    return cls(**value)


def _is(value: object, hint: str) -> bool:
    if "None" in hint and value is None:
        return True
    if hint.startswith("list[dict"):
        return isinstance(value, list)
    if hint.startswith("list[int"):
        return isinstance(value, list) and all(_is(one, "<class 'int'>") for one in value)
    if "bool" in hint:
        return isinstance(value, bool)
    if "str" in hint:
        return isinstance(value, str)
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 128
