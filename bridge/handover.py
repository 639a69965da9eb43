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
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import cbor2
import trio

from vhostbridge.backends.dirty_log import DirtyLog
from vhostbridge.backends.errors import BridgeError, StateError
from vhostbridge.backends.fds import OwnedFd, close_all, is_eventfd
from vhostbridge.backends.inflight import InflightBuffer
from vhostbridge.backends.lifecycle import State
from vhostbridge.backends.state import PRODUCER
from vhostbridge.backends.state_stream import check_stream
from vhostbridge.backends.trace import OFF, Tracer
from vhostbridge.backends.vhostuser.channel import Channel
from vhostbridge.backends.vhostuser.messages import ProtocolFeature
from vhostbridge.backends.vhostuser.payloads import Region, VringAddr
from vhostbridge.backends.vhostuser.specs import BACKEND_SPECS, FRONTEND_SPECS

from .handover_facts import FORMAT, Facts, RegionFacts, VringFacts, facts_of, read_facts, unusable
from .incoming import Incoming, Origin
from .memory import guest_region
from .offer import check_features, offered_protocol
from .pauses import Pauses, Reason
from .state_transfer import load_device, misfits, pack_state
from .vring import FrontendVring

if TYPE_CHECKING:
    from vhostbridge.backends.state import DeviceState
    from vhostbridge.backends.state_stream import CheckedFd

    from .session import Session

# A message of the socket carries so much; the kernel takes 253 descriptors.
_BYTES, _FDS = 16 << 10, 128
_MAX_BYTES = 1 << 20
_MAX_FDS = 4096


class _Luggage:
    def __init__(self) -> None:
        self.fds: list[int] = []

    def add(self, fd: OwnedFd | Channel | None) -> int | None:
        return None if fd is None else self.put(fd)

    def put(self, fd: OwnedFd | Channel) -> int:
        self.fds.append(fd.fileno())
        return len(self.fds) - 1


async def pack(session: Session, pauses: Pauses) -> OwnedFd:
    """Suspend the device of a session that reads no more, and put all of it into a socket.

    ``pauses`` has the one that begins with it, or that the device is in already. The session stays
    what it is, and is its process's to end without touching the device again.

    Raises:
        BridgeError: the device can't be suspended or saved, or the kernel does not take so much.
    """
    given = session.absence.copy
    if session.transfer is not None or (given and given.device is not session.device):
        raise StateError("the front-end is moving the device's state", "it will begin again")
    if session.reverse is not None and not session.reverse.at_boundary:
        raise StateError("a notification was half sent", "the front-end takes no more of them")
    began = time.monotonic_ns()
    state = await _state(session)
    try:
        facts, fds = _facts(session, began, pauses, state)
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
    if session.awaiting:
        return await pack_state(None, session.absence.known_state)
    return await pack_state(device)


def _facts(
    session: Session, began: int, pauses: Pauses, state: OwnedFd | None
) -> tuple[Facts, list[int]]:
    luggage = _Luggage()
    pause = pauses.begun
    log, inflight = session.log_to, session.inflight
    facts = Facts(
        format=FORMAT,
        producer=PRODUCER,
        began=began,
        pause=None if pause is None else pause.reason,
        paused=None
        if pause is None
        else [round(one * 1e9) for one in (pause.began, pause.stopped)],
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
            self._data = self._unpack(box)
            self.facts = facts_of(self._data)
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
                    raise unusable(os.strerror(error.errno or 0)) from None
                for level, kind, rights in ancillary:
                    if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                        numbers = array.array("i", rights)
                        self._fds += [OwnedFd(number) for number in numbers]
                if flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
                    raise unusable("descriptors were lost on the way")
                if not piece:
                    return bytes(data)
                data += piece
        raise unusable("it is too large")

    def pack_again(self) -> OwnedFd:
        """The same for yet another process, as long as nothing was taken.

        Raises:
            StateError: the kernel does not take so much.
        """
        return _box(self._data, [fd.fileno() for fd in self._fds if fd is not None])

    def take(self, index: int) -> OwnedFd:
        """One of the descriptors, which is the caller's from now on.

        Raises:
            StateError: there is none of that number, or it was taken already.
        """
        if not 0 <= index < len(self._fds) or (fd := self._fds[index]) is None:
            raise unusable(f"descriptor {index} is missing")
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
            self._give_region(session, read_facts(RegionFacts, one))
        for one in facts.vrings:
            self._give_vring(session, read_facts(VringFacts, one))
        if facts.log is not None:
            if len(facts.log) != 3:
                raise unusable("its dirty log has no size, offset and descriptor")
            size, offset, number = facts.log
            fd = self.take(number)
            try:
                session.log_to = DirtyLog(fd, offset, size)
            except BaseException:
                fd.close()
                raise

        if facts.inflight is not None:
            self._give_inflight(session, facts.inflight)

    def give_pause(self, pauses: Pauses) -> None:
        """Go on with the pause that the device is in, if it ran before."""
        pause, times = self.facts.pause, self.facts.paused
        if pause is None:
            return
        if pause not in set(Reason) or times is None or len(times) != 2:
            raise unusable("its pause has no reason or times that are known")
        began, stopped = (one / 1e9 for one in times)
        pauses.begin(pause, began, stopped)

    def _give_inflight(self, session: Session, one: list[int]) -> None:
        if len(one) != 5:
            raise unusable("its in-flight buffer has no place, vrings and descriptor")
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
            raise unusable(f"what should be an eventfd of vring {one.index} is none")
        if one.size:
            vring.check_size(one.size, session.device.info, session.packed)
        if one.address is not None:
            if len(one.address) != 5:
                raise unusable(f"vring {one.index} has no five parts of an address")
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


async def unpack(arrival: Arrival, session: Session, pauses: Pauses) -> float:
    """Let a new session and its RESET device go on where the ones before stopped.

    ``pauses`` gets the pause that the device is in.
    Returns how long the guest had to wait, in seconds.

    Raises:
        BridgeError: they don't fit the device; the front-end can't go on.
    """
    arrival.give_to(session)
    arrival.give_pause(pauses)
    device = session.device
    check_features(device, session.features)
    missing = session.protocol & ~offered_protocol(device)
    if missing:
        raise unusable(f"the device does not go with {missing.name}, which the front-end uses")
    await device.set_memory(session.memory.regions)
    found = await arrival.state()
    if found is not None:
        state, stream = found
        with stream:
            reasons = await misfits(device, state)
            if reasons:
                raise unusable(f"{device.info.target} does not fit: {'; '.join(reasons)}")
            await load_device(device, state, stream, lambda count: None)
        session.absence.remember(0, state.config)
        origin = Origin.__members__.get(arrival.facts.waits or "")
        session.incoming = None if origin is None else Incoming(state, origin)
    await session.go_on()
    return (time.monotonic_ns() - arrival.facts.began) / 1e9


# Owns the descriptor.
def _socket(fd: OwnedFd) -> socket.socket:
    try:
        sock = socket.socket(fileno=fd.fileno())
    except OSError as error:
        fd.close()
        raise unusable(os.strerror(error.errno or 0)) from None
    fd.detach()
    return sock


def _stream(fd: OwnedFd) -> trio.socket.SocketType:
    sock = _socket(fd)
    if (sock.family, sock.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
        sock.close()
        raise unusable("a connection is none")
    return trio.socket.from_stdlib_socket(sock)
