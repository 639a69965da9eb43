"""The daemon: bridges side by side, each with a life of its own."""

from __future__ import annotations

import logging
import resource
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import partial

import trio

from vhostbridge.backends.errors import BridgeError, find_bridge_error

from .bridge import Bridge
from .config import BridgeConfig, DaemonConfig
from .events import Event, Events, Kind
from .journald import working_for
from .keeping import Keeper
from .metrics import Metrics
from .notify import Notifier
from .scrape import serve_metrics
from .trace.tracing import Tracing

_log = logging.getLogger("vhostbridge.daemon")

# How long all front-ends together may take to be handed over, in seconds: the units allow 60.
PARTING = 45.0


# Bridges that are started at a time. One whose device is slow keeps the others waiting only when
# there are as many of its kind.
STARTING = 32


def raise_limits() -> None:
    """Lift limits as far as we may.

    RLIMIT_MEMLOCK, because hardware pins all guest memory, root's too; RLIMIT_NOFILE, because a
    bridge in use has some ten descriptors and a few for each vring.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    unlimited = resource.RLIM_INFINITY
    _, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    for limit in ((unlimited, unlimited), (hard, hard)):
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_MEMLOCK, limit)
            return


async def serve(config: DaemonConfig, again: Callable[[], DaemonConfig] | None = None) -> None:
    """Run bridges until SIGTERM or SIGINT; devices are suspended and reset before it returns.

    At SIGHUP ``again`` tells the configuration anew; bridges that are the same there go on.

    Raises:
        BridgeError: a bridge could not start; the others are stopped again. Where the process
            before left front-ends, these go on, and the log has it.
    """
    raise_limits()
    notifier = Notifier()
    keeper = Keeper(notifier)
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    with (
        closing(keeper),
        trio.open_signal_receiver(*numbers) as signals,
        Tracing(config.trace, config.trace_limit, required=not keeper.succeeds) as tracing,
    ):
        async with trio.open_nursery() as nursery:
            async with trio.open_nursery() as running:
                daemon = _Daemon(config, running, notifier, keeper, tracing)
                nursery.start_soon(daemon.obey, signals, again, nursery.cancel_scope)
                await daemon.start_all(config.bridges)
                await daemon.start_beside("control", partial(daemon.serve_control, nursery))
                await daemon.start_beside("metrics", partial(daemon.serve_metrics, nursery))
                keeper.drop_unused({one.name for one in config.bridges})
                nursery.start_soon(notifier.keep_alive)
                _log.info(daemon.told)
                notifier.ready(daemon.told)
            nursery.cancel_scope.cancel()


@dataclass(slots=True)
class _Running:
    config: BridgeConfig
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    ended: trio.Event = field(default_factory=trio.Event)


class _Daemon:
    def __init__(
        self,
        config: DaemonConfig,
        nursery: trio.Nursery,
        notifier: Notifier,
        keeper: Keeper,
        tracing: Tracing,
    ) -> None:
        self._config = config
        self._tracing = tracing
        self._nursery = nursery
        self._notifier = notifier
        self._keeper = keeper
        self._running: dict[str, _Running] = {}
        # Bridges that are being started: a back-end may keep them waiting.
        self._starting: dict[str, Bridge] = {}
        self._reloading = trio.Lock()
        self.bridges: dict[str, Bridge] = {}
        self.events = Events()

    @property
    def told(self) -> str:
        count = len(self.bridges)
        return f"serving {count} bridge{'' if count == 1 else 's'}"

    async def start_all(self, configs: Iterable[BridgeConfig]) -> None:
        """Start bridges side by side; when one can't, the others are given up, but for what
        ``start_beside`` says. What was left for one that can't start waits for a reload.

        A reload waits until that is done: it would start those that are not there yet once more.

        Raises:
            BridgeError: that, or none could start; the next process finds what was left.
        """
        places = trio.CapacityLimiter(STARTING)
        causes: list[BridgeError] = []

        async def start(config: BridgeConfig) -> None:
            async with places:
                start = partial(self.start, config)
                cause = await self.start_beside(config.name, start, bridge=config.name)
                if cause is not None:
                    causes.append(cause)

        async with self._reloading, trio.open_nursery() as nursery:
            for one in configs:
                nursery.start_soon(start, one)
        if causes and not self.bridges:
            self._keeper.keep_again()
            await self._notifier.settled()
            raise causes[0]

    async def serve_control(self, nursery: trio.Nursery) -> None:
        if (path := self._config.control) is not None:
            from .control import serve_control

            await nursery.start(serve_control, path, self.bridges, self._keeper, self.events)

    async def serve_metrics(self, nursery: trio.Nursery) -> None:
        if (address := self._config.metrics) is not None:
            await nursery.start(serve_metrics, address, Metrics(self.bridges))

    async def start_beside(
        self, name: str, start: Callable[[], Awaitable[None]], *, bridge: str = ""
    ) -> BridgeError | None:
        """Start one of the daemon's parts. It costs front-ends that were left here nothing if that
        can't be: then the cause is told in the log, and returned.

        Raises:
            BridgeError: it can't be, and nobody was left here.
        """
        try:
            await start()
        except (BridgeError, BaseExceptionGroup) as error:
            cause = find_bridge_error(error)
            if cause is None or not self._keeper.succeeds:
                raise
            self._tell_not_started(name, cause, bridge)
            return cause
        return None

    def _tell_not_started(self, name: str, cause: BridgeError, bridge: str) -> None:
        _log.error("%s: not started: %s", name, cause)
        text = f"not started: {cause}" if bridge else f"{name}: not started: {cause}"
        self._tell(Kind.ERROR, text, bridge=bridge, why=str(cause))

    async def start(self, config: BridgeConfig) -> None:
        trace = self._tracing.tracer(config.name)
        bridge = Bridge(config, self._keeper, trace, self.events)
        one = _Running(config)

        async def run(task_status: trio.TaskStatus[None]) -> None:
            working_for.set(config.name)
            try:
                with one.scope:
                    await bridge.run(task_status)
            finally:
                one.ended.set()

        self._starting[config.name] = bridge
        try:
            await self._nursery.start(run)
        finally:
            del self._starting[config.name]
        self._running[config.name] = one
        self.bridges[config.name] = bridge
        self._tell(Kind.BRIDGE_ADDED, config.backend, bridge=config.name)

    def _tell(self, kind: Kind, text: str, *, bridge: str = "", **details: object) -> None:
        self.events.tell(Event(bridge, kind, text, details))

    async def _stop(self, name: str) -> None:
        del self.bridges[name]
        one = self._running.pop(name)
        one.scope.cancel()
        await one.ended.wait()
        if one.config.listen is not None:
            self._keeper.forget_listening(one.config.listen)
        self._tell(Kind.BRIDGE_REMOVED, one.config.backend, bridge=name)

    async def obey(
        self,
        signals: AsyncIterator[int],
        again: Callable[[], DaemonConfig] | None,
        scope: trio.CancelScope,
    ) -> None:
        async for number in signals:
            if number == signal.SIGHUP:
                # A back-end may keep it waiting, which must not keep SIGTERM waiting.
                self._nursery.start_soon(self._reload, again)
                continue
            _log.info("stopping: %s", signal.Signals(number).name)
            self._notifier.stopping()
            if number == signal.SIGTERM and self._keeper.keeps:
                await self._part()
            scope.cancel()

    # The next process goes on with the front-ends. If there is none the service manager hangs up.
    async def _part(self) -> None:
        self._keeper.keep_again()
        with trio.move_on_after(PARTING):
            async with trio.open_nursery() as nursery:
                for bridge in (*self.bridges.values(), *self._starting.values()):
                    nursery.start_soon(bridge.part)
        await self._notifier.settled()

    async def _reload(self, again: Callable[[], DaemonConfig] | None) -> None:
        if again is None:
            _log.warning("SIGHUP: there is no configuration file to read again")
            return
        async with self._reloading:
            self._notifier.reloading()
            try:
                config = again()
            except BridgeError as error:
                _log.error("SIGHUP: nothing changed: %s", error)
                self._tell(Kind.ERROR, f"reload: nothing changed: {error}", why=str(error))
            else:
                await self._become(config)
            self._notifier.ready(self.told)

    # What goes is gone before anything comes: sockets and devices may have moved between bridges.
    async def _become(self, config: DaemonConfig) -> None:
        wanted = {one.name: one for one in config.bridges}
        gone = [name for name, one in self._running.items() if wanted.get(name) != one.config]
        new = [one for one in config.bridges if one.name in gone or one.name not in self._running]
        if config.control != self._config.control:
            _log.warning("SIGHUP: another control socket needs a restart")
        if config.metrics != self._config.metrics:
            _log.warning("SIGHUP: another address of metrics needs a restart")
        self._tracing.become(config.trace, config.trace_limit)
        for name in gone:
            await self._stop(name)
            _log.info("%s: %s", name, "restarting, it changed" if name in wanted else "removed")
        for one in new:
            try:
                await self.start(one)
            except (BridgeError, BaseExceptionGroup) as error:
                if (cause := find_bridge_error(error)) is None:
                    raise
                self._tell_not_started(one.name, cause, one.name)
        _log.info("reloaded, %s", self.told)
        self._tell(Kind.RELOADED, self.told, bridges=len(self.bridges))
