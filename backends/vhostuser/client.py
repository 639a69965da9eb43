"""The front-end's side of a connection: requests out, replies matched, back-end requests served."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import trio

from vhostbridge.backends.errors import BridgeError, PeerError, TransportLost, Unanswered
from vhostbridge.backends.fds import OwnedFd
from vhostbridge.backends.pace import Pace
from vhostbridge.backends.trace import OFF, Tracer

from .channel import Channel
from .codec import Message, encode_request
from .messages import BackendRequest, ProtocolFeature, Request
from .payloads import U64, Empty, Payload, VringFd, VringState
from .specs import BACKEND_SPECS, FRONTEND_SPECS


@dataclass(slots=True, eq=False)
class _Pending:
    request: Request
    done: trio.Event = field(default_factory=trio.Event)
    reply: Message | None = None
    error: BridgeError | None = None
    abandoned: bool = False

    def abandon(self) -> None:
        """Nobody waits any more; the reply may be there already, or still come."""
        self.abandoned = True
        if self.reply is not None:
            self.reply.close()


# How many requests of its own a back-end may make a second.
REQUESTS = 100

# How long a back-end may take to answer, in seconds. Some answers come after requests in flight: a
# vring's own, or, before the first answer, those of the front-end before us. Or after it has taken
# a state in. Or after memory was mapped: SPDK has the kernel fill it in, and stops what runs.
ANSWER = 10.0
SLOW = {
    Request.GET_FEATURES: 30.0,
    Request.GET_VRING_BASE: 30.0,
    Request.SET_MEM_TABLE: 30.0,
    Request.ADD_MEM_REG: 30.0,
    Request.CHECK_DEVICE_STATE: 300.0,
}

# How many messages that change nothing go before one that stops a vring. A message takes a back-end
# microseconds, as our system call does.
BUSY = 64


class Client:
    """Speaks vhost-user to a back-end. ``serve`` must run in a task while requests are made."""

    def __init__(self, sock: trio.socket.SocketType, target: str, trace: Tracer = OFF) -> None:
        self.protocol = ProtocolFeature(0)
        self.target = target
        self._trace = trace
        self._channel = Channel(
            sock, FRONTEND_SPECS, replies=True, peer=f"back-end {target}", trace=trace
        )
        self._pending: deque[_Pending] = deque()
        self._order = trio.Lock()
        self._reverse: Channel | None = None
        self._lost: BridgeError | None = None
        #: Whether it was given up because it did not answer.
        self.hangs = False
        #: Called with the reason when it is given up.
        self.on_hang: Callable[[str], None] = lambda reason: None
        #: Called for CONFIG_CHANGE_MSG.
        self.on_config_change: Callable[[], None] = lambda: None

    @property
    def peer_pid(self) -> int:
        """The back-end's process; 0 where the kernel doesn't tell, or tells a service manager."""
        pid = self._channel.peer_pid
        return pid if pid > 1 else 0

    def peer_program(self) -> str:
        """The back-end's program, without its folder; empty where the kernel doesn't tell.

        It is the same for every build and version of it: a file that was replaced since it was
        started, and passt's for processors with AVX2, which passt goes over to by itself.
        """
        if self.peer_pid == 0:
            return ""
        try:
            name = Path(f"/proc/{self.peer_pid}/exe").readlink().name
        except OSError:
            return ""
        return name.removesuffix(" (deleted)").removesuffix(".avx2")

    async def request(
        self,
        request: Request,
        payload: Payload | None = None,
        fds: Sequence[OwnedFd] = (),
    ) -> Payload:
        """Send a request and wait for its reply, or for its acknowledgement where one is to be had.

        Raises:
            PeerError: the back-end refused it, or broke the protocol.
            TransportLost: the back-end went away; whether it acted is unknown.
        """
        message = await self._exchange(request, payload, fds)
        if message is None:
            return Empty()
        message.close()
        if FRONTEND_SPECS[request].reply is None:
            self._check(request, message)
        return message.payload

    async def exchange(
        self, request: Request, payload: Payload, fds: Sequence[OwnedFd]
    ) -> tuple[Payload, list[OwnedFd]]:
        """Like ``request``, for a message whose own reply may bring descriptors."""
        message = await self._exchange(request, payload, fds)
        assert message is not None
        taken = list(message.fds)
        message.fds.clear()
        return message.payload, taken

    async def stop_vring(self, index: int) -> VringState:
        """GET_VRING_BASE: stop a vring and learn where it stopped.

        Raises:
            PeerError: the back-end answered for another vring, or otherwise broke the protocol.
            TransportLost: the back-end went away; whether it stopped is unknown.
        """
        reply = await self.request(Request.GET_VRING_BASE, VringState(index, 0))
        return self._checked_base(index, reply)

    async def stop_busy_vring(self, index: int, enabled: bool, call: OwnedFd) -> VringState:
        """The same for a vring with requests in flight, with SET_VRING_CALL right behind it.

        libvhost-user (up to QEMU 11 at least) answers before the requests are complete, forgets
        the call eventfd with the answer, and breaks when a completion finds none. So the new one
        must be there before the back-end looks at completions again: both messages stand in the
        socket while it is busy with messages that change nothing.

        Raises:
            PeerError, TransportLost: as ``stop_vring``.
        """
        acknowledged = ProtocolFeature.REPLY_ACK in self.protocol
        busy = encode_request(Request.SET_VRING_ENABLE, VringState(index, int(enabled)))
        stop = encode_request(Request.GET_VRING_BASE, VringState(index, 0))
        last = encode_request(Request.SET_VRING_CALL, VringFd(index, True), need_reply=acknowledged)
        base = _Pending(Request.GET_VRING_BASE)
        ack = _Pending(Request.SET_VRING_CALL)
        pending = [base, ack] if acknowledged else [base]
        async with self._order:
            if self._lost is not None:
                raise self._lost
            self._pending += pending
            try:
                await self._channel.send_run(busy * BUSY + stop, last, [call])
            except BaseException:
                # As in ``_exchange``; ``serve`` may have given them up already.
                for one in pending:
                    if one in self._pending:
                        self._pending.remove(one)
                raise
        reply = await self._reply_to(base)
        if acknowledged:
            self._check(ack.request, await self._reply_to(ack))
        return self._checked_base(index, reply.payload)

    def _checked_base(self, index: int, base: Payload) -> VringState:
        assert isinstance(base, VringState)
        if base.index != index:
            raise PeerError(
                f"back-end {self.target} answered for vring {base.index}, {index} was asked"
            )
        return base

    async def _exchange(
        self, request: Request, payload: Payload | None, fds: Sequence[OwnedFd]
    ) -> Message | None:
        native = FRONTEND_SPECS[request].reply is not None
        acknowledged = ProtocolFeature.REPLY_ACK in self.protocol
        pending = _Pending(request)
        async with self._order:
            if self._lost is not None:
                raise self._lost
            if native or acknowledged:
                self._pending.append(pending)
            need_reply = acknowledged and not native
            try:
                await self._channel.send_request(request, payload, fds, need_reply=need_reply)
            except BaseException:
                # It went out not at all, or so little of it that the channel is broken.
                if pending in self._pending:
                    self._pending.remove(pending)
                raise
        if not native and not acknowledged:
            return None
        return await self._reply_to(pending)

    async def _reply_to(self, pending: _Pending) -> Message:
        limit = SLOW.get(pending.request, ANSWER)
        try:
            with trio.move_on_after(limit) as patience:
                await pending.done.wait()
        except BaseException:
            pending.abandon()
            raise
        if patience.cancelled_caught:
            pending.abandon()
            self._give_up(pending.request, limit)
        if pending.error is not None:
            raise pending.error
        assert pending.reply is not None
        return pending.reply

    # Whatever it does from now on, it is not listened to.
    def _give_up(self, request: Request, limit: float) -> NoReturn:
        lost = Unanswered(
            f"back-end {self.target} did not answer {request.name} within {limit:g} s",
            "it hangs, or is stopped",
        )
        if self._lost is None:
            self._lost, self.hangs = lost, True
            self.on_hang(str(lost))
            self._channel.close()
        raise self._lost

    def _check(self, request: Request, reply: Message) -> None:
        reply.close()
        assert isinstance(reply.payload, U64)
        if reply.payload.value:
            raise PeerError(
                f"back-end {self.target} refused {request.name} (answer {reply.payload.value})",
                "its own log says why",
            )

    async def serve(self) -> BridgeError:
        """Read until the connection ends; returns the reason, which pending requests get too."""
        reason: BridgeError
        try:
            while (message := await self._channel.receive()) is not None:
                self._deliver(message)
            reason = TransportLost(f"back-end {self.target} closed the connection")
        except BridgeError as error:
            reason = error
        reason = self._lost = self._lost or reason
        for pending in self._pending:
            pending.error = reason
            pending.done.set()
        self._pending.clear()
        return reason

    # Replies come in the order of their requests.
    def _deliver(self, message: Message) -> None:
        if not self._pending or self._pending[0].request != message.request:
            message.close()
            raise PeerError(f"back-end {self.target} answered {message.name}, which was not asked")
        pending = self._pending.popleft()
        pending.reply = message
        if pending.abandoned:
            message.close()
        pending.done.set()

    async def open_reverse(self) -> None:
        """Give the back-end a channel for its own requests (SET_BACKEND_REQ_FD)."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        fd = OwnedFd(theirs.detach())
        self._reverse = Channel(
            trio.socket.from_stdlib_socket(ours),
            BACKEND_SPECS,
            replies=False,
            peer=f"back-end {self.target}",
            trace=self._trace,
        )
        with fd:
            await self.request(Request.SET_BACKEND_REQ_FD, fds=[fd])

    async def serve_reverse(self) -> None:
        """Answer the back-end's requests until it closes its channel or breaks the protocol.

        Only configuration changes mean anything to us; the rest was not negotiated and is
        refused.
        """
        channel = self._reverse
        if channel is None:
            return
        pace = Pace(REQUESTS, REQUESTS)
        try:
            while (message := await channel.receive()) is not None:
                message.close()
                await pace.take()
                known = message.request == BackendRequest.CONFIG_CHANGE_MSG
                if known:
                    self.on_config_change()
                if message.need_reply:
                    await channel.send_reply(message.request, U64(0 if known else 1))
        except BridgeError:
            # The front-end channel notices a back-end that is gone; a broken reverse channel
            # alone costs no more than its notifications.
            pass
        finally:
            channel.close()

    def close(self) -> None:
        self._channel.close()
        if self._reverse is not None:
            self._reverse.close()
