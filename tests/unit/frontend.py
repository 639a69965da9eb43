"""A front-end that sends a session what a test tells it to, and the session's fake device."""

from __future__ import annotations

import gc
import math
import os
import socket
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

import trio

from tests.unit.fakes import (
    DEVICE_FEATURES,
    PROTOCOL_FEATURES,
    FakeDevice,
    RawPeer,
    address,
    eventfd,
    frame,
    memfd,
    region,
    state,
    u64,
)
from vhostbridge.backends.errors import BridgeError, find_bridge_error
from vhostbridge.backends.fds import OwnedFd
from vhostbridge.backends.lifecycle import State
from vhostbridge.backends.vhostuser.channel import Channel
from vhostbridge.backends.vhostuser.messages import ProtocolFeature, Request
from vhostbridge.backends.vhostuser.specs import FRONTEND_SPECS
from vhostbridge.bridge.config import OnDisconnect
from vhostbridge.bridge.handlers import HANDLERS
from vhostbridge.bridge.incoming import Incoming
from vhostbridge.bridge.session import Session

PF = ProtocolFeature
#: What the bridge offers on top of the fake device.
OFFER = (
    PF.MQ
    | PF.REPLY_ACK
    | PF.BACKEND_REQ
    | PF.RESET_DEVICE
    | PF.CONFIGURE_MEM_SLOTS
    | PF.STATUS
    | PF.CONFIG
    | PF.LOG_SHMFD
)
#: A split ring's features, as QEMU acks them, and what of them reaches the device.
FEATURES = DEVICE_FEATURES & ~(1 << 34) | PROTOCOL_FEATURES
DEVICE_GETS = FEATURES & ~PROTOCOL_FEATURES
#: Guest memory: MEMORY bytes at guest address 0, which the front-end has at USER.
USER = 0x7F00_0000_0000
MEMORY = 0x20_0000
TABLE = struct.pack("=II", 1, 0) + region(0, MEMORY, USER)
#: The fake device's call when it gets that.
ALL = ("set_memory", (0, MEMORY))


def ring(index: int, user: int = USER) -> bytes:
    """SET_VRING_ADDR for a ring of up to 256 entries: one each 64 KiB, from the second on."""
    at = user + 0x10000 * (index + 1)
    return address(index, at, at + 0x2000, at + 0x1000)


def table(*regions: bytes) -> bytes:
    return struct.pack("=II", len(regions), 0) + b"".join(regions)


class FrontEnd:
    """The front-end's end of a session. What it makes is closed with it.

    ``need_reply`` makes ``tell`` ask for an acknowledgement. ``outcome`` is why the session ended.
    """

    def __init__(self, sock: socket.socket, device: FakeDevice, session: Session) -> None:
        self.peer = RawPeer(sock)
        self.session = session
        self.device = device
        self.need_reply = False
        self.outcome: BridgeError | None = None
        self.ended = trio.Event()
        self.kicks: dict[int, OwnedFd] = {}
        self.calls: dict[int, OwnedFd] = {}
        self._owned: list[OwnedFd] = []

    def own(self, fd: OwnedFd) -> OwnedFd:
        self._owned.append(fd)
        return fd

    def eventfd(self) -> OwnedFd:
        return self.own(eventfd())

    def memfd(self, size: int = MEMORY) -> OwnedFd:
        return self.own(memfd(size))

    async def watch(self, session: Session) -> None:
        try:
            await session.run()
        except (BridgeError, BaseExceptionGroup) as error:
            self.outcome = find_bridge_error(error)
            if self.outcome is None:
                raise
        finally:
            self.ended.set()

    async def send(
        self, request: int, payload: bytes = b"", *fds: OwnedFd, flags: int = 0x1
    ) -> None:
        await self.peer.send(frame(request, payload, flags), fds)

    async def ask(
        self, request: int, payload: bytes = b"", *fds: OwnedFd, flags: int = 0x1
    ) -> bytes:
        """Send, and return the payload of the one reply that must come."""
        await self.send(request, payload, *fds, flags=flags)
        reply = await self.peer.receive()
        assert reply is not None, self.outcome
        assert (reply.request, reply.flags, reply.fds) == (request, 0x5, ())
        return reply.payload

    async def tell(self, request: int, payload: bytes = b"", *fds: OwnedFd) -> None:
        """Send what has no reply of its own; with ``need_reply`` it must succeed."""
        if self.need_reply:
            assert await self.ask(request, payload, *fds, flags=0x9) == u64(0)
        else:
            await self.send(request, payload, *fds)

    async def ack(self, request: int, payload: bytes = b"", *fds: OwnedFd) -> None:
        assert await self.ask(request, payload, *fds, flags=0x9) == u64(0)

    async def nack(self, request: int, payload: bytes = b"", *fds: OwnedFd) -> None:
        assert await self.ask(request, payload, *fds, flags=0x9) == u64(1)

    async def settle(self) -> None:
        """Fall silent (on a clock that jumps), then wait until the session listens again."""
        await trio.sleep(1)
        await self.ask(Request.GET_FEATURES)

    async def base(self, index: int) -> int:
        """Stop a vring with GET_VRING_BASE."""
        reply = await self.ask(Request.GET_VRING_BASE, state(index, 0))
        got, base = struct.unpack("=II", reply)
        assert got == index
        return int(base)

    async def lost(self) -> BridgeError:
        """Why the session hung up; it must have had a reason."""
        with trio.fail_after(5):
            await self.ended.wait()
        assert self.outcome is not None
        return self.outcome

    async def set_call(self, index: int) -> None:
        fd = self.calls[index] = self.eventfd()
        await self.tell(Request.SET_VRING_CALL, u64(index), fd)

    async def set_kick(self, index: int) -> None:
        fd = self.kicks[index] = self.eventfd()
        await self.tell(Request.SET_VRING_KICK, u64(index), fd)

    async def set_ring(self, index: int, base: int = 0, size: int = 256) -> None:
        """QEMU's order: NUM, BASE, ADDR, KICK."""
        await self.tell(Request.SET_VRING_NUM, state(index, size))
        await self.tell(Request.SET_VRING_BASE, state(index, base))
        await self.tell(Request.SET_VRING_ADDR, ring(index))
        await self.set_kick(index)

    async def enable(self, *indices: int, on: int = 1) -> None:
        for index in indices:
            await self.tell(Request.SET_VRING_ENABLE, state(index, on))

    async def negotiate(self, features: int = FEATURES, protocol: ProtocolFeature = OFFER) -> None:
        await self.send(Request.SET_PROTOCOL_FEATURES, u64(int(protocol)))
        await self.send(Request.SET_FEATURES, u64(features))

    async def set_up(self, features: int = FEATURES, protocol: ProtocolFeature = OFFER) -> None:
        """Negotiate and share memory; nothing runs."""
        await self.negotiate(features, protocol)
        self.memory = self.memfd()
        await self.send(Request.SET_MEM_TABLE, TABLE, self.memory)

    async def start(self, *indices: int, protocol: ProtocolFeature = OFFER & ~PF.STATUS) -> None:
        """Everything up to running vrings, without STATUS; the device's calls are forgotten."""
        await self.set_up(protocol=protocol)
        for index in indices:
            await self.set_call(index)
            await self.set_ring(index)
        await self.enable(*indices)
        await self.settle()
        assert self.device.state is State.RUNNING
        self.device.take_calls()

    async def reverse(self) -> RawPeer:
        """Give the session a channel for its own requests; our end of it is the caller's."""
        ours, theirs = socket.socketpair()
        fd = OwnedFd(theirs.detach())
        with fd:
            await self.tell(Request.SET_BACKEND_REQ_FD, b"", fd)
        return RawPeer(ours)

    def close(self) -> None:
        self.peer.close()
        for fd in self._owned:
            fd.close()


@asynccontextmanager
async def connected(
    device: FakeDevice | None = None,
    *,
    incoming: Incoming | None = None,
    on_disconnect: OnDisconnect = OnDisconnect.RESET,
    backend_timeout: float = math.inf,
) -> AsyncIterator[FrontEnd]:
    """A front-end and its session.

    Afterwards the device is as it was, unless it failed or is to be kept.
    """
    device = device or FakeDevice()
    ours, theirs = socket.socketpair()
    sock = trio.socket.from_stdlib_socket(ours)
    channel = Channel(sock, FRONTEND_SPECS, replies=False, peer="front-end")
    session = Session(
        "vm",
        channel,
        device,
        HANDLERS,
        incoming=incoming,
        on_disconnect=on_disconnect,
        backend_timeout=backend_timeout,
    )
    vm = FrontEnd(theirs, device, session)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vm.watch, session)
            yield vm
            vm.peer.close()
            await vm.ended.wait()
    finally:
        vm.close()
    if vm.device.state is not State.FAILED:
        assert vm.device.regions == []
        assert vm.device.state is State.RESET or on_disconnect is OnDisconnect.KEEP


def shared_files() -> int:
    """How many descriptors of guest memory this process has open."""
    gc.collect()  # what tests before this one left
    count = 0
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            count += os.readlink(f"/proc/self/fd/{name}").startswith("/memfd:guest")
    return count


def names(calls: Sequence[tuple[object, ...]]) -> list[object]:
    """The methods of a device's calls, without their arguments."""
    return [call[0] for call in calls]
