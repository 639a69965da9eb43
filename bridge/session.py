"""One front-end connection: its messages in their order, and its end."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

import trio

from vhostbridge.backends.device import Device
from vhostbridge.backends.errors import BridgeError, TransportLost
from vhostbridge.backends.fds import OwnedFd, close_all
from vhostbridge.backends.lifecycle import State
from vhostbridge.backends.pace import Pace
from vhostbridge.backends.vhostuser.channel import Channel
from vhostbridge.backends.vhostuser.codec import Message
from vhostbridge.backends.vhostuser.messages import BackendRequest, ProtocolFeature, Request

from .config import OnDisconnect
from .departure import clear_device
from .dispatch import Handler, dispatch
from .incoming import Incoming
from .quiet import either, message_comes_first
from .replacing import ReplacingUser
from .shadow import ShadowDevice
from .stand_in import StandIn

if TYPE_CHECKING:
    from .device_state import Transfer

# How many messages a front-end may send a second for long, and how many at once. VMMs send some
# hundred when a device starts and then hardly any; more would be other bridges' time.
MESSAGES = 150
BURST = 2000
# For how many messages a start of the device counts, which takes as long.
START = 10

# How many refusals are logged at once; for long it is one a second.
TOLD = 50

# How long the device may take to stop when its front-end has gone, in seconds. VDUSE gives its
# processes 30.
LEAVE = 35.0

# How long a front-end's message may wait for a device that went away to be there again, in
# seconds. QEMU stands still meanwhile.
PATIENCE = 5.0

# How long the second half of a message may take, when the daemon is about to end, in seconds.
HALF = 1.0


class Session(ReplacingUser):
    """Serves one connected front-end until it leaves.

    The message handlers are in ``handlers``; what they change in ``DeviceUser``.
    """

    def __init__(
        self,
        name: str,
        channel: Channel,
        device: Device,
        handlers: Mapping[int, Handler],
        *,
        lock: trio.Lock | None = None,
        incoming: Incoming | None = None,
        on_disconnect: OnDisconnect = OnDisconnect.RESET,
        config: bytes = b"",
        backend_timeout: float = math.inf,
    ) -> None:
        super().__init__(name, device, lock=lock, incoming=incoming, config=config)
        self.trace = channel.trace
        #: The front-end's connection, and ours towards it (SET_BACKEND_REQ_FD).
        self.channel = channel
        self.reverse: Channel | None = None
        #: The front-end's process, as far as the kernel can tell.
        self.peer = channel.peer_pid
        #: The state that the front-end moves, until it has asked how that went.
        self.transfer: Transfer | None = None
        self._handlers = handlers
        self._on_disconnect = on_disconnect
        self._backend_timeout = backend_timeout
        #: Descriptors that the reply to the message at hand brings; closed then.
        self.reply_fds: list[OwnedFd] = []
        self._nursery: trio.Nursery | None = None
        self._reading = trio.CancelScope()
        self._pace = Pace(MESSAGES, BURST)
        #: Whether a refusal is still worth a line in the log.
        self.telling = Pace(1, TOLD)
        #: What takes the session over when it parts; ``None``: nobody, it ends.
        self.successor: Callable[[Session], Awaitable[bool]] | None = None
        #: Whether it was taken over.
        self.taken = False

    # The loop

    async def run(self, begin: Callable[[], Awaitable[None]] | None = None) -> None:
        """Serve until the front-end closes the connection; the device is reset or kept afterwards.

        ``begin`` is done first, with the device; if it raises, the session ends.

        Raises:
            PeerError: the front-end broke the protocol or asked what can't be.
            TransportLost: a connection broke, or the back-end failed.
        """
        failed = ""

        async def watch_device() -> None:
            nonlocal failed
            failed = await self._until_lost()
            nursery.cancel_scope.cancel()

        at_boundary = False
        try:
            if begin is not None:
                async with self.lock:
                    await begin()
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                self._listen_to_device()
                nursery.start_soon(watch_device)
                nursery.start_soon(self._notify_config_changes)
                at_boundary = await self._serve_messages()
                nursery.cancel_scope.cancel()
        finally:
            with trio.move_on_after(LEAVE, shield=True) as scope:
                async with self.lock:
                    self.taken = at_boundary and await self._hand_over()
                    await self._leave()
            if scope.cancelled_caught:
                self.device.fail(f"it did not stop within {LEAVE:g} s")
        if failed:
            raise TransportLost(f"the device failed: {failed}")

    # Why the device is lost for good.
    async def _until_lost(self) -> str:
        while True:
            device = self.device
            if isinstance(device, StandIn):
                with trio.move_on_after(self._backend_timeout) as patience:
                    await either(device.failed, self._replaced)
                if patience.cancelled_caught:
                    took = f"another one was not there within {self._backend_timeout:g} s"
                    return f"{device.because}; {took}"
                if device.failed.is_set():
                    return device.failure
                continue
            await either(device.failed, self._replaced)
            if not device.failed.is_set():
                continue
            async with self.lock:
                if self.device is device and not self._stand_in():
                    return device.failure

    def part(self, successor: Callable[[Session], Awaitable[bool]]) -> None:
        """Read no further message; ``successor`` takes over, or the session ends if it says no."""
        self.successor = successor
        self._reading.cancel()

    async def _hand_over(self) -> bool:
        return self.successor is not None and await self.successor(self)

    # Whether it stopped between two messages, because it parts.
    async def _serve_messages(self) -> bool:
        while self.successor is None:
            if self._out_of_step and not await self._message_comes_first():
                await self._pace.take(START)
                async with self.lock:
                    await self._recovering(self.apply)
                continue
            message = await self._next_message()
            if message is None:
                break
            try:
                await self._serve(message)
            finally:
                message.close()
        return self.successor is not None and self.channel.at_boundary

    # A message that has begun is taken whole, even by a session that parts.
    async def _next_message(self) -> Message | None:
        with trio.CancelScope() as self._reading:
            await self._pace.take()
            return await self.channel.receive()
        if not self.channel.at_boundary:
            with trio.move_on_after(HALF):
                return await self.channel.receive()
        return None

    async def _serve(self, message: Message) -> None:
        done = False

        async def handle() -> None:
            nonlocal done
            await dispatch(self, self.channel, self._handlers, message)
            done = True

        if message.request == Request.CHECK_DEVICE_STATE and self.transfer is not None:
            await self.transfer.done.wait()
        while not done:
            if self.device.failed.is_set():
                async with self.lock:
                    self._stand_in()
            if isinstance(self.device, StandIn) and not self.device.answers(message):
                with trio.move_on_after(PATIENCE):
                    await self._replaced.wait()
            async with self.lock:
                await self._recovering(handle)

    # QEMU acks STATUS for every device, but says DRIVER_OK for block and net only. So silence
    # starts the device there too; a kick does not, because DRIVER_OK may be about to come.
    async def _message_comes_first(self) -> bool:
        waiting = [v for v in self.vrings.values() if v.ready and not v.running]
        says_status = ProtocolFeature.STATUS in self.protocol
        kicks = [v.kick.fileno() for v in waiting if v.kick and not says_status]
        return await message_comes_first(self.channel.fileno(), kicks)

    def begin_transfer(self, transfer: Transfer) -> None:
        """Move a state in the background, in place of one that has ended."""
        assert self._nursery is not None
        if self.transfer is not None:
            self.transfer.close()
        self.transfer = transfer
        self._nursery.start_soon(transfer.run, self)

    # Configuration changes

    async def _notify_config_changes(self) -> None:
        while True:
            await self.config_changed.wait()
            self.config_changed = trio.Event()
            if self.reverse is not None and ProtocolFeature.CONFIG in self.protocol:
                with suppress(TransportLost):
                    await self.reverse.send_request(BackendRequest.CONFIG_CHANGE_MSG)

    # The end

    # The device of a session that was taken over is closed as it is.
    async def _leave(self) -> None:
        self.device.on_config_change = lambda: None
        self.channel.close()
        if self.reverse is not None:
            self.reverse.close()
        try:
            if not self.taken and self.device.state not in (State.FAILED, State.CLOSED):
                await clear_device(self, self._on_disconnect)
        except BridgeError as error:
            self.device.fail(str(error))
            self.log.error("%s: could not reset the device: %s", self.name, error)
        finally:
            with suppress(BridgeError):
                await self.device.log_writes(None, {})
            self.use_inflight(None)
            if self.log_to is not None:
                self.log_to.close()
            if self.transfer is not None:
                self.transfer.close()
            self.absence.close()
            # One that could not be stopped relays until it is closed, which waits for us.
            if isinstance(self.device, ShadowDevice):
                await self.device.stop_relaying()
            for vring in self.vrings.values():
                vring.close()
            close_all(region.fd for region in self.memory.regions)
