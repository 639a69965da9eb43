"""What is behind a bridge: its device, kept open from front-end to front-end, and opened again."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import trio

from vhostbridge.backends import open_device
from vhostbridge.backends.device import Device
from vhostbridge.backends.errors import (
    BridgeError,
    TargetError,
    TransportLost,
    Unanswered,
    find_bridge_error,
)
from vhostbridge.backends.trace import Tracer

from .backend_command import BackendCommand
from .config import BridgeConfig
from .controlled import with_control
from .events import Kind
from .journal import Journal
from .offer import without
from .quiet import either
from .shadow import ShadowDevice, with_shadow

_log = logging.getLogger("vhostbridge.daemon")

# A back-end that went away is looked for this often, in seconds.
RETRY = 0.5
# One that we start ourselves is there soon.
SOON = 0.05

# How long a back-end to switch to, or one that was started, may take until it is there, in seconds.
OPENING = 10.0


@dataclass(slots=True, eq=False)
class Opened:
    """A device that a task keeps open, until it fails or is let go."""

    device: ShadowDevice
    config: BridgeConfig
    let_go: trio.Event = field(default_factory=trio.Event)
    closed: trio.Event = field(default_factory=trio.Event)

    async def close(self) -> None:
        """Have it closed, and wait for that."""
        self.let_go.set()
        await self.closed.wait()


class BackEnd:
    """The device of a bridge, while it is there.

    Args:
        lock: held by whoever works on the device.
        take: called with each device that comes, with the lock; if it raises, that is closed.
        lose: called when it failed, with the lock.
    """

    def __init__(
        self,
        config: BridgeConfig,
        lock: trio.Lock,
        journal: Journal,
        trace: Tracer,
        take: Callable[[Device], Awaitable[None]],
        lose: Callable[[], None],
    ) -> None:
        #: Another one after ``replace``.
        self.config = config
        self._name = config.name
        self._lock = lock
        self._journal = journal
        self._trace = trace
        self._on_take = take
        self._on_loss = lose
        self._opened: Opened | None = None
        self._there = trio.Event()
        #: The one that failed last.
        self.lost: Device | None = None
        # A process that we gave up and that may live on; 0 for none.
        self._hung = 0
        command = config.backend_command
        self._command = BackendCommand(config.name, command) if command else None
        # Shielded while a device is open: it is closed after its front-end has left.
        self._keeping = trio.CancelScope()
        self._told = ""

    @property
    def device(self) -> ShadowDevice | None:
        """The device, if it is there."""
        return None if self._opened is None else self._opened.device

    @property
    def pid(self) -> int | None:
        """The process that the bridge started for it."""
        return None if self._command is None else self._command.pid

    async def available(self) -> ShadowDevice:
        """Wait until it is there."""
        while self._opened is None:
            await self._there.wait()
        return self._opened.device

    def command_running(self) -> AbstractAsyncContextManager[None]:
        """Keep its program running, if we start that: from before ``keep`` until after it."""
        return nullcontext() if self._command is None else self._command.running()

    async def keep(
        self,
        begin: Callable[[], Awaitable[None]] | None,
        task_status: trio.TaskStatus[None],
    ) -> None:
        """Open the device, and again whenever it failed, until ``stop``.

        It is started when the device is there for the first time and ``begin`` was done; without
        ``begin`` a front-end is there already, which waits for as long as it takes.

        Raises:
            BridgeError: it could not be opened the first time, or ``begin`` failed.
        """
        first = True
        patience = trio.current_time() + (0 if self._command is None else OPENING)
        with self._keeping:
            async with trio.open_nursery() as self._devices:
                while True:
                    try:
                        await self._open_and_take()
                        if first:
                            if begin is not None:
                                await begin()
                            first = False
                            task_status.started()
                        self._tell_ready()
                        await self._until_closed()
                    except (BridgeError, BaseExceptionGroup) as error:
                        cause = find_bridge_error(error)
                        late = trio.current_time() >= patience
                        absent = isinstance(cause, TargetError | TransportLost)
                        starting = first and begin is not None
                        if cause is None or (starting and (late or not absent)):
                            raise
                        if first and not starting:
                            first = False
                            task_status.started()
                        self._tell_absence(cause, quietly=starting)
                    finally:
                        self._keeping.shield = False
                    await trio.sleep(RETRY if self._command is None else SOON)

    def stop(self) -> None:
        """Close the device, and keep it no longer."""
        self._keeping.cancel()

    async def _open_and_take(self) -> None:
        one: Opened = await self._devices.start(self._hold_open, self.config)
        self._keeping.shield = True
        if self._command is not None:
            self._command.served()
        self._check_hung(one)
        async with self._lock:
            self._journal.watch(one.device)
            try:
                await self._on_take(one.device)
            except BaseException:
                one.let_go.set()
                raise
            self._opened = one
            self._there.set()

    # A back-end that hung and comes to life again writes to the guest's memory, while another one
    # does. One that serves us anew has done with what was before.
    def _check_hung(self, one: Opened) -> None:
        hung, self._hung = self._hung, 0
        if hung in (0, one.device.process) or not Path(f"/proc/{hung}").exists():
            return
        self._hung = hung
        one.let_go.set()
        raise TargetError(
            f"process {hung}, which hangs, can still write to the guest's memory", "end it"
        )

    def _tell_ready(self) -> None:
        _log.info("%s: %s is ready", self._name, self.config.backend)
        self._journal.tell(Kind.BACK_END_READY, self.config.backend)
        self._told = ""

    def _tell_absence(self, cause: BridgeError, *, quietly: bool) -> None:
        if isinstance(cause, Unanswered) and self._command is not None:
            self._command.kill()
        if str(cause) != self._told and not quietly:
            self._told = str(cause)
            _log.warning("%s: waiting for the back-end: %s", self._name, cause)

    # A switch may put another one in the place of the one that is waited for.
    async def _until_closed(self) -> None:
        while (one := self._opened) is not None:
            await one.closed.wait()

    # Keeps a device open until it fails or is let go.
    async def _hold_open(self, config: BridgeConfig, task_status: trio.TaskStatus[Opened]) -> None:
        one: Opened | None = None
        try:
            async with (
                open_device(config.backend, config.device_id, self._trace) as opened,
                with_control(opened, config.mac) as inner,
                with_shadow(
                    inner, config.tracking, always=config.shadow, journal=self._journal
                ) as device,
            ):
                device.info = without(device.info, config.without_features)
                one = Opened(device, config)
                task_status.started(one)
                await either(device.failed, one.let_go)
                if device.failed.is_set():
                    await self._give_up(one)
        except (BridgeError, BaseExceptionGroup) as error:
            cause = find_bridge_error(error)
            if cause is None or one is None:
                raise
            _log.warning("%s: closing %s: %s", self._name, config.backend, cause)
        finally:
            if one is not None:
                one.closed.set()

    async def _give_up(self, one: Opened) -> None:
        # With the lock: nobody works on it any more when it is closed, and no switch is half way.
        async with self._lock:
            if one is not self._opened:
                return
            self._tell_failure(one)
            self._on_loss()
            self._opened = None
            self._there = trio.Event()
            self._journal.watch(None)

    def _tell_failure(self, one: Opened) -> None:
        device = self.lost = one.device
        _log.error("%s: the back-end failed: %s", self._name, device.failure)
        self._journal.failed(one.config.backend, device.failure)
        if device.hangs:
            self._hung = device.process
            if self._command is not None and one.config.backend_command:
                self._command.kill()

    # Another one

    async def open_another(self, config: BridgeConfig) -> Opened:
        """Open the device of ``config`` too, for ``replace``; close it if it is not used.

        Raises:
            BridgeError: it can't be opened, or does not answer.
        """
        with trio.move_on_after(OPENING) as opening:
            one: Opened = await self._devices.start(self._hold_open, config)
        if opening.cancelled_caught:
            raise TargetError(
                f"{config.backend} did not answer within {OPENING:g} s", "is it busy?"
            )
        return one

    def replace(self, one: Opened) -> Opened | None:
        """Have ``one`` from now on; returns the one before, which is the caller's to close."""
        before, self._opened, self.config = self._opened, one, one.config
        self._journal.watch(one.device)
        return before
