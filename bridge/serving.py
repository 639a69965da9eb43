"""A bridge's life: its socket, its device, and the front-ends that come and go."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from functools import partial

import trio

from vhostbridge.backends.device import Device
from vhostbridge.backends.errors import BridgeError, find_bridge_error
from vhostbridge.backends.trace import OFF, Tracer
from vhostbridge.backends.vhostuser.channel import Channel
from vhostbridge.backends.vhostuser.specs import FRONTEND_SPECS

from .absence import Absence
from .back_end import BackEnd
from .config import BridgeConfig
from .endpoint import Endpoint, open_endpoint
from .events import Events, Kind
from .handlers import HANDLERS
from .journal import Journal
from .keeping import Keeper
from .session import Session
from .stand_in import StandIn
from .succession import Succession
from .waiting import Waiting

_log = logging.getLogger("vhostbridge.daemon")


class Serving:
    """One front-end socket and one device, which stays open from front-end to front-end."""

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
                    begin = None if inherits else self.begin
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

    async def begin(self) -> None:
        """Called with the first device, unless it goes on with what another process left."""

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
