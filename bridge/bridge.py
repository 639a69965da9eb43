"""What an operator can ask of a bridge: a front-end socket and a device."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import trio

from vhostbridge.backends import check_backend
from vhostbridge.backends.device import Device
from vhostbridge.backends.errors import ConfigError, InvalidTransition, StateError
from vhostbridge.backends.fds import OwnedFd
from vhostbridge.backends.lifecycle import State, Verb, step
from vhostbridge.backends.state import DeviceState
from vhostbridge.backends.state_stream import CheckedFd, check_stream

from .back_end import Opened
from .config import BridgeConfig
from .events import Kind
from .incoming import Incoming, disagreements
from .pauses import Reason
from .serving import Serving
from .shadow import ShadowDevice
from .state_transfer import Progress, load_device, misfits, save_device
from .status import BridgeStatus, SwitchReport
from .survey import survey
from .switch import hindrances, switch

_log = logging.getLogger("vhostbridge.daemon")


class Bridge(Serving):
    """One front-end socket and one device, and what an operator can ask of them.

    The operator's operations may come at any time, from any task; they wait for each other and
    for the front-end's message that is being served. One that fails leaves the device as it was,
    or FAILED.
    """

    async def begin(self) -> None:
        """Load the state that the configuration names.

        Raises:
            BridgeError: it can't be read, or does not fit.
        """
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
