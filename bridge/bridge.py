"""One bridge: a front-end socket and a device, and what an operator can ask of them."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

import trio

from vhostbridge.backends import check_backend
from vhostbridge.backends.device import Device
from vhostbridge.backends.errors import (
    BridgeError,
    ConfigError,
    InvalidTransition,
    StateError,
    find_bridge_error,
)
from vhostbridge.backends.fds import OwnedFd
from vhostbridge.backends.lifecycle import State, Verb, step
from vhostbridge.backends.state import DeviceState
from vhostbridge.backends.state_stream import CheckedFd, check_stream
from vhostbridge.backends.trace import OFF, Tracer
from vhostbridge.backends.vhostuser.channel import Channel
from vhostbridge.backends.vhostuser.specs import FRONTEND_SPECS

from .absence import Absence
from .back_end import BackEnd, Opened
from .config import BridgeConfig
from .endpoint import Endpoint, open_endpoint
from .events import Events, Kind
from .handlers import HANDLERS
from .incoming import Incoming, disagreements
from .journal import Journal
from .keeping import Keeper
from .pauses import Reason
from .session import Session
from .shadow import ShadowDevice
from .stand_in import StandIn
from .state_transfer import Progress, load_device, misfits, save_device
from .status import BridgeStatus, SwitchReport
from .succession import Succession
from .survey import survey
from .switch import hindrances, switch
from .waiting import Waiting

_log = logging.getLogger("vhostbridge.daemon")


class Bridge:
    """One front-end socket and one device. The device stays open from front-end to front-end.

    The operator's operations may come at any time, from any task; they wait for each other and
    for the front-end's message that is being served. One that fails leaves the device as it was,
    or FAILED.
    """

    def __init__(
        self,
        config: BridgeConfig,
        keeper: Keeper | None = None,
        trace: Tracer = OFF,
        events: Events | None = None,
    ) -> None:
        self.name = config.name
        self.trace = trace
        self.journal = Journal(config.name, events, trace=trace)
        self._keeper = keeper
        self._lock = trio.Lock()
        self._back_end = BackEnd(
            config, self._lock, self.journal, trace, self._take, self._tell_loss
        )
        self._session: Session | None = None
        self._left = trio.Event()
        # What is known of the device's configuration space, from front-end to front-end.
        self._config = b""
        self._waiting = Waiting(config.name, keeper)
        self._succession = Succession(config.name, keeper, self.journal)
        self._accepting = trio.CancelScope()
        self._parting = False
        self._parted = trio.Event()

    @property
    def config(self) -> BridgeConfig:
        """What it was made with; after a switch, with another back-end."""
        return self._back_end.config

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve front-ends until cancelled, or until an inherited connection ends.

        Raises:
            BridgeError: the socket or the device could not be opened the first time.
        """
        endpoint = open_endpoint(self.config, self._keeper)
        self._succession.find()
        try:
            if self._succession.arrival is None:
                await self._waiting.find()
            async with self._back_end.command_running(), trio.open_nursery() as nursery:
                refusing = trio.CancelScope()
                nursery.start_soon(self._refuse_at_the_end, endpoint, refusing)
                try:
                    inherits = self._succession.arrival or self._waiting.incoming
                    begin = None if inherits else self._load_incoming
                    await nursery.start(self._back_end.keep, begin)
                    task_status.started()
                    if self._succession.arrival is not None:
                        await self._serve_arrival()
                    while (sock := await self._next_front_end(endpoint)) is not None:
                        await self._serve_one(sock)
                    if self._parting:
                        await self._parted.wait()
                finally:
                    refusing.cancel()
                    # Last, and whoever cancels us: a front-end that leaves stops its device.
                    self._back_end.stop()
        finally:
            self._succession.close()
            self._waiting.close()
            endpoint.close(keep=self._parting)

    # A front-end that is cut off connects anew at once, if it can; cloud-hypervisor does not try
    # again once it was connected. So the socket goes first.
    async def _refuse_at_the_end(self, endpoint: Endpoint, scope: trio.CancelScope) -> None:
        try:
            with scope:
                await trio.sleep_forever()
        finally:
            endpoint.close(keep=self._parting)

    async def _next_front_end(self, endpoint: Endpoint) -> trio.socket.SocketType | None:
        if not self._parting:
            with trio.CancelScope() as self._accepting:
                return await endpoint.next()
        return None

    async def _load_incoming(self) -> None:
        path = self.config.incoming
        if path is None:
            return
        try:
            source = OwnedFd(os.dup(0) if path == "-" else os.open(path, os.O_RDONLY))
        except OSError as error:
            raise StateError(f"cannot read {path}: {error.strerror}") from None
        with source:
            reasons = await self.load(source, dry_run=False, progress=lambda count: None)
        if reasons:
            raise StateError(f"the state does not fit {self.config.backend}: {'; '.join(reasons)}")

    async def _take(self, device: Device) -> None:
        if self._session is None:
            await self._waiting.load(device)
        elif self._session.awaiting:
            await self._session.attach(device)

    def _tell_loss(self) -> None:
        if self._session is not None and self._session.awaiting:
            _log.info("%s: the front-end waits for the back-end", self.name)

    # The device, or somebody in its place; ``None`` before the first one was there.
    def _device(self) -> Device | None:
        if self._back_end.device is not None:
            return self._back_end.device
        lost = self._back_end.lost
        return None if lost is None else StandIn(lost, Absence(self._config))

    async def _serve_one(self, sock: trio.socket.SocketType) -> None:
        channel = Channel(sock, FRONTEND_SPECS, replies=False, peer="front-end", trace=self.trace)
        if self._device() is None:
            await self._back_end.available()
        try:
            async with self._lock:
                device = self._device()
                assert device is not None
                if self._parting:
                    channel.close()
                    return
                await self._waiting.load(device)
        except BridgeError as error:
            channel.close()
            self._tell_cut_off(error)
            return
        session = self._session_on(channel, device)
        _log.info("%s: front-end connected (pid %d)", self.name, session.peer)
        await self._serve(session)

    def _session_on(self, channel: Channel, device: Device) -> Session:
        return Session(
            self.name,
            channel,
            device,
            HANDLERS,
            lock=self._lock,
            incoming=self._waiting.incoming,
            on_disconnect=self.config.on_disconnect,
            config=self._config,
            backend_timeout=self.config.backend_timeout,
        )

    async def _serve(
        self, session: Session, begin: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        peer = session.peer
        self._session, self._left = session, trio.Event()
        self.journal.front_end_came(peer)
        left = False
        try:
            await session.run(begin)
            left = not session.taken
        except* BridgeError as group:
            cause = find_bridge_error(group)
            _log.error("%s: front-end (pid %d) cut off: %s", self.name, peer, cause)
            self.journal.tell(Kind.ERROR, f"front-end cut off: {cause}", pid=peer, why=str(cause))
        except* Exception:
            # A bug of ours costs this front-end its connection, not the other bridges theirs.
            _log.exception("%s: internal error, front-end (pid %d) cut off", self.name, peer)
            self.journal.tell(Kind.ERROR, "internal error, front-end cut off", pid=peer)
        finally:
            self._session = None
            self._waiting.incoming = None if session.taken else session.left_behind
            if self._waiting.incoming is None and self._back_end.device is not None:
                self._back_end.device.shown = {}  # the next guest has read nothing
            self._config = session.absence.config
            self.journal.front_end_left(peer)
            self._left.set()
        if left:
            _log.info("%s: front-end (pid %d) left", self.name, peer)

    def _tell_cut_off(self, cause: BridgeError) -> None:
        _log.error("%s: front-end cut off: %s", self.name, cause)
        self.journal.tell(Kind.ERROR, f"front-end cut off: {cause}", why=str(cause))

    # From one process to the next

    async def _serve_arrival(self) -> None:
        device = await self._back_end.available()
        if self._parting:
            return
        arrival = self._succession.take()
        try:
            channel = arrival.channel(self.trace)
        except BridgeError as error:
            arrival.close()
            self._tell_cut_off(error)
            return
        session = self._session_on(channel, device)
        await self._serve(session, partial(self._succession.take_over, arrival, session))

    async def part(self) -> None:
        """Leave the front-end, or the state that waits for one, to the process after this one.

        A front-end with which that can't be is cut off. Afterwards the bridge ends by itself.
        """
        self._parting = True
        self._accepting.cancel()
        try:
            self._succession.hand_on()
            if self._session is not None:
                self._session.part(self._succession.hand_over)
                await self._left.wait()
            if self._waiting.incoming is not None:
                async with self._lock:
                    await self._waiting.leave(self._back_end.device)
        finally:
            self._parted.set()

    # What an operator asks

    def status(self) -> BridgeStatus:
        """What is known at this moment, from the device, the front-end and guest memory."""
        return survey(self._back_end, self._session, self._waiting.incoming, self.journal)

    async def suspend(self) -> None:
        """Freeze the device; its front-end stays connected and its requests wait.

        Raises:
            BridgeError: it can't; the device goes on as before.
        """
        async with self._operation() as device:
            step(device.state, Verb.SUSPEND)
            if self._session is None:
                raise InvalidTransition("no front-end is connected: nothing runs")
            with self.journal.because(Reason.OPERATOR):
                await self._session.hold()
        _log.info("%s: suspended", self.name)

    async def resume(self) -> None:
        """Let the device go on after ``suspend``.

        Raises:
            BridgeError: it can't; the device stays suspended.
        """
        async with self._operation() as device:
            if device.state is State.RUNNING:
                return
            step(device.state, Verb.RESUME)
            if self._session is None or not self._session.held:
                raise InvalidTransition(
                    "the device waits for its front-end, not for an operator",
                    "start or resume the virtual machine",
                )
            await self._session.release()
        _log.info("%s: resumed", self.name)

    async def reset(self) -> None:
        """Reset the device: all state is lost; a guest's driver has to set it up again.

        Raises:
            BridgeError: it could not be reset; it is FAILED.
        """
        async with self._operation() as device:
            if device.state is State.RUNNING:
                await device.suspend()
            await device.reset()
            self._expect(None)
            if self._session is not None:
                self._session.forget_vrings()
        _log.info("%s: reset", self.name)

    async def save(self, sink: OwnedFd, progress: Progress) -> int:
        """Write the state of the suspended device to ``sink``; returns its bytes.

        Raises:
            BridgeError: it can't be saved. What was written is no whole stream.
        """
        async with self._operation() as device:
            step(device.state, Verb.SAVE)
            size = await save_device(device, sink, progress)
        self.journal.tell(Kind.SAVED, f"{size} bytes", bytes=size)
        return size

    async def load(self, source: OwnedFd, *, dry_run: bool, progress: Progress) -> list[str]:
        """Take a state over; returns why it does not fit, having done nothing then.

        Raises:
            BridgeError: it is damaged, or the device runs; nothing was done. Or the device refused
                its internal state, and is FAILED.
        """
        if not dry_run:
            step(self._open_device().state, Verb.LOAD)
        state, checked = await check_stream(source.dup(), progress)
        with checked:
            async with self._operation() as device:
                reasons = await misfits(device, state)
                if self._session is not None:
                    reasons += disagreements(state, device.features, device.vrings)
                if dry_run or reasons:
                    return reasons
                await self._load(device, state, checked, progress)
                self.journal.watch(device)
        _log.info("%s: loaded a state of %s", self.name, state.producer)
        self.journal.tell(Kind.LOADED, f"a state of {state.producer}", producer=state.producer)
        return []

    async def switch(self, backend: str, *, dry_run: bool) -> SwitchReport:
        """Go over to another back-end; the front-end sees a pause only.

        Raises:
            BridgeError: the other one can't be opened, or failed on the way: the device goes on as
                before, or is FAILED and says why.
        """
        config = self._config_with(backend)
        report = SwitchReport()
        began = trio.current_time()
        one = await self._back_end.open_another(config)
        before: Opened | None = one
        try:
            async with self._operation() as device:
                report.reasons = await hindrances(device, one.device, self._session)
                report.prepare = trio.current_time() - began
                if not dry_run and not report.reasons:
                    with self.journal.because(Reason.SWITCH):
                        await switch(device, one.device, self._session, report)
                    before = self._back_end.replace(one)
        finally:
            if before is not None:
                with trio.CancelScope(shield=True):
                    await before.close()
        report.state = self.status().state
        if report.moved:
            _log.info("%s: switched to %s, pause %s", self.name, backend, report.told)
            self.journal.tell(Kind.SWITCHED, f"to {backend}", backend=backend, pause=report.pause)
        return report

    def _config_with(self, backend: str) -> BridgeConfig:
        scheme, _ = check_backend(backend)
        if scheme == "vhost-user-fd":
            raise ConfigError("descriptors are inherited at the start only", "name a socket")
        # It has to be the same kind of device, and a vhost-user back-end does not say.
        device_id = None if scheme == "vdpa" else self._open_device().info.device_id
        return replace(
            self.config, backend=backend, device_id=device_id, incoming=None, backend_command=()
        )

    async def _load(
        self, device: Device, state: DeviceState, checked: CheckedFd, progress: Progress
    ) -> None:
        await load_device(device, state, checked, progress)
        if self._session is None or not self._session.held:
            self._expect(Incoming(state))
        else:
            self._session.absence.state = state

    def _expect(self, incoming: Incoming | None) -> None:
        self._waiting.incoming = incoming
        if self._session is not None:
            self._session.incoming = incoming

    # The device, for one operation at a time.
    @asynccontextmanager
    async def _operation(self) -> AsyncIterator[ShadowDevice]:
        async with self._lock:
            yield self._open_device()

    def _open_device(self) -> ShadowDevice:
        device = self._back_end.device
        if device is None:
            raise InvalidTransition(
                f"{self.config.backend} is not there at the moment", "the log says what happened"
            )
        return device
