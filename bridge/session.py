"""One front-end connection: it gathers what the messages say and keeps the device in step.

vhost-vdpa wants everything before DRIVER_OK, front-ends come in several orders and some never say
"start". So messages only change what the session knows; ``_apply`` brings the device to it, at
DRIVER_OK, at the first kick, or when the front-end has fallen silent.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

import trio

from vhostbridge.backends.device import Device, VringSetup
from vhostbridge.backends.dirty_log import DirtyLog
from vhostbridge.backends.errors import BridgeError, PeerError, TransportLost
from vhostbridge.backends.fds import OwnedFd, close_all
from vhostbridge.backends.lifecycle import State, Status
from vhostbridge.backends.pace import Pace
from vhostbridge.backends.vhostuser.channel import Channel
from vhostbridge.backends.vhostuser.codec import Message
from vhostbridge.backends.vhostuser.messages import (
    BackendRequest,
    ProtocolFeature,
    Request,
)
from vhostbridge.backends.virtio import VHOST_ONLY_FEATURES, TransportFeature

from .absence import Absence
from .config import OnDisconnect
from .departure import clear_device, recognise
from .dispatch import Handler, dispatch
from .incoming import Incoming, Origin, arriving, compare_features
from .memory import MemoryTable
from .offer import check_features
from .quiet import either, message_comes_first
from .stand_in import StandIn
from .vring import FrontendVring

if TYPE_CHECKING:
    from vhostbridge.backends.inflight import InflightBuffer

    from .device_state import Transfer

# How many messages a front-end may send a second for long, and how many at once. VMMs send some
# hundred when a device starts and then hardly any; more would be other bridges' time.
MESSAGES = 500
BURST = 2000

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


class Session:
    """Serves one connected front-end until it leaves.

    The message handlers are in ``handlers``; this class holds what they share: the front-end's
    vrings, memory and negotiated features, and when the device follows.
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
        self.name = name
        self.device = device
        #: Held by whoever works on the device.
        self.lock = lock or trio.Lock()
        #: A state that waits for its vrings.
        self.incoming = incoming
        #: The state that the front-end moves, until it has asked how that went.
        self.transfer: Transfer | None = None
        #: Whether the operator suspended the device: the front-end can't start it meanwhile.
        self.held = False
        self.log = logging.LoggerAdapter(logging.getLogger("vhostbridge.session"), {"bridge": name})
        self.trace = channel.trace
        self.features = 0
        self.protocol = ProtocolFeature(0)
        self.status = 0
        self.memory = MemoryTable()
        #: Where the front-end wants writes to be logged, while LOG_ALL is acknowledged.
        self.log_to: DirtyLog | None = None
        #: What the front-end keeps of requests in flight.
        self.inflight: InflightBuffer | None = None
        self.vrings: dict[int, FrontendVring] = {}
        #: The front-end's connection, and ours towards it (SET_BACKEND_REQ_FD).
        self.channel = channel
        self.reverse: Channel | None = None
        self._handlers = handlers
        self._on_disconnect = on_disconnect
        #: Descriptors that the reply to the message at hand brings; closed then.
        self.reply_fds: list[OwnedFd] = []
        self._nursery: trio.Nursery | None = None
        self._config_changed = trio.Event()
        self._replaced = trio.Event()
        self.absence = device.absence if isinstance(device, StandIn) else Absence(config)
        self._backend_timeout = backend_timeout
        self._reading = trio.CancelScope()
        self._pace = Pace(MESSAGES, BURST)
        #: Whether a refusal is still worth a line in the log.
        self.telling = Pace(1, TOLD)
        #: What takes the session over when it parts; ``None``: nobody, it ends.
        self.successor: Callable[[Session], Awaitable[bool]] | None = None
        #: Whether it was taken over.
        self.taken = False

    @property
    def packed(self) -> bool:
        return bool(self.features & TransportFeature.RING_PACKED.mask)

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

    def _listen_to_device(self) -> None:
        self.device.on_config_change = lambda: self._config_changed.set()

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

    # Put somebody in the place of a device that failed: whether that can be.
    def _stand_in(self) -> bool:
        if isinstance(self.device, StandIn):
            return True
        if not self.awaiting:
            return False
        lost = self.device
        lost.on_config_change = lambda: None
        ran = not self.held and any(vring.running for vring in self.vrings.values())
        self.device = StandIn(lost, self.absence, self.memory.regions, running=ran)
        self.use_inflight(self.inflight)
        return True

    @property
    def awaiting(self) -> bool:
        """Whether the device is gone and another one, from where it was, would do."""
        if isinstance(self.device, StandIn):
            return True
        if not self.device.failed.is_set():
            return False
        absence = self.absence
        absence.notice(self.device, self.vrings.values(), self.memory.regions, held=self.held)
        return self.held or absence.state is not None

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

    # What fails because the device went away is done again when there is another one.
    async def _recovering(self, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except BridgeError:
            if isinstance(self.device, StandIn) or not self._stand_in():
                raise

    # Keeping the device in step

    def vring(self, index: int) -> FrontendVring:
        """The record of a vring, made at its first mention.

        Raises:
            PeerError: the device has no such vring.
        """
        if index >= self.device.info.vring_limit:
            raise PeerError(
                f"vring {index} is beyond the {self.device.info.vring_limit} vrings of "
                f"{self.device.info.target}"
            )
        if index not in self.vrings:
            enabled = bool(self.features) and not self._enables_explicitly
            self.vrings[index] = FrontendVring(index, enabled=enabled)
        return self.vrings[index]

    # Without bit 30 there is no SET_VRING_ENABLE: rings are enabled from SET_FEATURES on.
    @property
    def _enables_explicitly(self) -> bool:
        return bool(self.features & TransportFeature.PROTOCOL_FEATURES.mask)

    @property
    def _may_start(self) -> bool:
        if self.status & Status.DRIVER_OK:
            return True
        return any(v.enabled and v.ready for v in self.vrings.values())

    @property
    def _out_of_step(self) -> bool:
        if self.held or self.device.failed.is_set():
            return False
        vrings = self.vrings.values()
        if any(v.running for v in vrings) and self.device.state is State.SUSPENDED:
            return True
        return self._may_start and any(v.ready and not v.running for v in vrings)

    # QEMU acks STATUS for every device, but says DRIVER_OK for block and net only. So silence
    # starts the device there too; a kick does not, because DRIVER_OK may be about to come.
    async def _message_comes_first(self) -> bool:
        waiting = [v for v in self.vrings.values() if v.ready and not v.running]
        says_status = ProtocolFeature.STATUS in self.protocol
        kicks = [v.kick.fileno() for v in waiting if v.kick and not says_status]
        return await message_comes_first(self.channel.fileno(), kicks)

    async def apply(self) -> None:
        """Make the device run what the front-end has set up, unless the operator holds it.

        Raises:
            PeerError: it does not go on where the incoming state stopped.
            BridgeError: the device can't; it does not run.
        """
        if self.held:
            return
        may_start = self._may_start
        vrings = [v for v in self.vrings.values() if v.running or (v.ready and may_start)]
        if not vrings:
            return
        features = self.features & ~VHOST_ONLY_FEATURES
        await recognise(self, features, vrings)
        if self.incoming is not None:
            compare_features(self.incoming.state, features)
        setups = [self._setup(v) for v in vrings]
        if self.incoming is None and all(v.begins(self.packed) for v in vrings):
            self.device.new_driver()
        await self.device.run(features, setups)
        self.incoming = None
        for vring in vrings:
            vring.running, vring.base = True, None
        self.log.info("%s: running vrings %s", self.name, ", ".join(str(v.index) for v in vrings))

    def _setup(self, vring: FrontendVring) -> VringSetup:
        setup = vring.setup(self.memory, self.packed)
        return setup if self.incoming is None else arriving(self.incoming.state, setup, vring.base)

    async def hold(self) -> None:
        """Suspend the device for the operator; its front-end's requests wait.

        Raises:
            BridgeError: it can't be suspended; it runs as before.
        """
        ran = self.device.state is State.RUNNING
        await self.device.suspend()
        self.held = True
        try:
            self.absence.state = await self.device.capture()
        except BridgeError:
            self.held = False
            if ran:
                await self.device.resume()
            raise

    async def release(self) -> None:
        """Go on after ``hold``, with all that the front-end changed meanwhile.

        Raises:
            BridgeError: the device can't; it stays suspended.
        """
        self.held = False
        try:
            await self.apply()
        except BaseException:
            self.held = True
            raise

    async def attach(self, device: Device) -> None:
        """Go over to ``device``, which takes the place of one that failed (``awaiting``).

        It goes on where the other one was, unless the operator holds it. One that has state of its
        own is RESET, to be loaded before ``release``.

        Raises:
            BridgeError: it does not take the guest's memory, or the features in use.
        """
        if not self._stand_in():
            raise TransportLost(f"the device failed: {self.device.failure}")
        check_features(device.info, self.features)
        if self.device.hangs and not self.absence.look_again(self.memory.regions):
            self.device.fail("it hung, and which requests it has done since is not known")
            return
        await device.set_memory(self.memory.regions)
        self.absence.load(device)
        await self._follow(device)
        if await self._has_other_config(device):
            self._config_changed.set()
        try:
            await self._recovering(self.apply)
        except BridgeError as error:
            self.absence.stays(device)
            device.fail(str(error))

    async def _has_other_config(self, device: Device) -> bool:
        known = self.absence.config
        with suppress(BridgeError):
            return bool(known) and await device.read_config(0, len(known)) != known
        return True

    async def go_on(self) -> None:
        """Begin with what another process left (``handover``), on a device in the same state.

        Raises:
            BridgeError: the device does not run.
        """
        self.device.on_config_change = lambda: None
        self.use_inflight(self.inflight)
        await self.update_log(self.log_to)
        if self.held:
            self.absence.state = await self.device.capture()
        await self._recovering(self.apply)

    async def move_to(self, device: Device) -> None:
        """Go over to ``device``, which was loaded with the state of the suspended one before it.

        Raises:
            BridgeError: it does not run; it is this session's device nevertheless.
        """
        await self._follow(device)
        if self.held:
            self.absence.state = await device.capture()
        await self.apply()

    async def _follow(self, device: Device) -> None:
        self.device.on_config_change = lambda: None
        self.device = device
        self._listen_to_device()
        self._replaced.set()
        self._replaced = trio.Event()
        self.use_inflight(self.inflight)
        await self.update_log(self.log_to)

    def use_inflight(self, buffer: InflightBuffer | None) -> None:
        """Let the device note its requests in flight in ``buffer``, which becomes the session's.

        Raises:
            Unsupported: it does not know them; nothing changed.
        """
        leave = ProtocolFeature.GET_VRING_BASE_INFLIGHT in self.protocol
        self.device.use_inflight(buffer, leave=leave)
        old, self.inflight = self.inflight, buffer
        if old is not None and old is not buffer:
            old.close()

    def forget_vrings(self) -> None:
        """After a reset: vrings have no positions and don't run; their calls stay."""
        for vring in self.vrings.values():
            call, vring.call = vring.call, None
            vring.stop(None)
            vring.call = call
            vring.enabled = False
        self.use_inflight(None)
        self.status = 0
        self.held = False

    async def stop_all(self) -> None:
        """Suspend the device and remember where every vring stopped."""
        for vring in self.vrings.values():
            if vring.running:
                vring.stop(await self.device.stop_vring(vring.index))

    async def set_memory(self, table: MemoryTable) -> None:
        """Replace guest memory; on failure the old table stays and the new one is the caller's."""
        await self.device.set_memory(table.regions)
        old, self.memory = self.memory, table
        old.close_unused(table)

    def begin_transfer(self, transfer: Transfer) -> None:
        """Move a state in the background, in place of one that has ended."""
        assert self._nursery is not None
        if self.transfer is not None:
            self.transfer.close()
        self.transfer = transfer
        self._nursery.start_soon(transfer.run, self)

    # The dirty log

    async def update_log(self, log: DirtyLog | None) -> None:
        """Bring logging in step with LOG_ALL and the vrings' addresses, with ``log`` as the log.

        Raises:
            BridgeError: the device does not log, or the log is too small; nothing changed.
        """
        wanted = bool(self.features & TransportFeature.LOG_ALL.mask)
        if wanted and log is not None and not log.covers(self.memory.regions):
            raise PeerError(
                f"the dirty log of {log.size} bytes is too small for the guest's memory"
            )
        used = {
            vring.index: place
            for vring in self.vrings.values()
            if vring.address is not None and (place := vring.address.log_place) is not None
        }
        await self.device.log_writes(log if wanted else None, used)
        old, self.log_to = self.log_to, log
        if old is not None and old is not log:
            old.close()

    @property
    def left_behind(self) -> Incoming | None:
        """The state that waits for the next front-end."""
        waiting = self.incoming
        return None if waiting is None or waiting.origin is Origin.FRONT_END else waiting

    # Configuration changes

    async def _notify_config_changes(self) -> None:
        while True:
            await self._config_changed.wait()
            self._config_changed = trio.Event()
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
            for vring in self.vrings.values():
                vring.close()
            close_all(region.fd for region in self.memory.regions)
