"""A device whose requests can be made to pass through shadow vrings, and what that is good for:
a dirty log where the device has none."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import trio

from vhostbridge.backends.device import Device, whole
from vhostbridge.backends.dirty_log import DirtyLog
from vhostbridge.backends.errors import BridgeError, Unsupported
from vhostbridge.backends.fds import OwnedFd, signal_eventfds
from vhostbridge.backends.guest import MemoryRegion, VringSetup, base_of, with_base
from vhostbridge.backends.inflight import InflightBuffer
from vhostbridge.backends.lifecycle import How, State
from vhostbridge.backends.state import DeviceState

from .familiar import FamiliarDevice
from .journal import Journal, journaled
from .passage import Passage, check_kick
from .shadow_rings import ShadowRings
from .tracking import Tracking, able

_log = logging.getLogger("vhostbridge.shadow")


class ShadowDevice(FamiliarDevice):
    """A device that takes its vrings straight from the guest, or through shadow vrings.

    To its user it is the device itself: the same states, vrings, memory and failure.
    """

    def __init__(
        self,
        inner: Device,
        tracking: Tracking = Tracking.AUTO,
        *,
        always: bool = False,
        journal: Journal | None = None,
    ) -> None:
        super().__init__(inner)
        self.journal = journal or Journal()
        self._tracking = tracking
        self.info = replace(inner.info, region_max=max(1, inner.info.region_max - 1))
        self.capabilities = able(inner, tracking, always=always)
        self._passage = Passage(inner, self.journal)
        # Whether requests shall pass through shadow vrings when they pass next.
        self._always = self._shadowed = always
        self._features = 0
        # The guest's vrings while they pass through shadow ones, and after, until they go straight.
        self._guest: Mapping[int, VringSetup] | None = None
        #: Whether the device has nothing of them: should it have failed, that is where they are.
        self.at_rest = False
        # Whether vrings may stop with requests in flight.
        self._may_leave = False
        # The vrings that run, or ran until the device was suspended.
        self._running: frozenset[int] = frozenset()
        # Whether all memory is to be marked whenever the device stops.
        self._mark_all = False
        self._logs_itself = False

    @property
    def features(self) -> int:
        return self._inner.features if self._guest is None else self._features

    @features.setter
    def features(self, value: int) -> None:
        self._features = value

    @property
    def vrings(self) -> Mapping[int, VringSetup]:
        return self._inner.vrings if self._guest is None else MappingProxyType(self._guest)

    @property
    def shadowed(self) -> bool:
        """Whether requests pass through shadow vrings now."""
        return self._passage.rings is not None

    @property
    def shadow(self) -> str:
        """Why requests pass through shadow vrings whenever they pass; empty if they don't."""
        if not self._shadowed:
            return ""
        return "configured" if self._always else "to log what the device writes"

    @property
    def logged_by(self) -> str:
        if self._logs_itself:
            return "the device"
        if self._passage.log is None:
            return ""
        return "all guest memory" if self._mark_all else "shadow vrings"

    # Memory

    @whole
    @journaled
    async def set_memory(self, regions: Sequence[MemoryRegion]) -> None:
        if not self._passage.keeps_vrings(regions):
            await self.suspend()
        await self._passage.set_memory(regions)

    # Life

    @whole
    @journaled
    async def run(self, features: int, vrings: Sequence[VringSetup]) -> None:
        running = frozenset(vring.index for vring in vrings)
        if not self._goes_through and self._guest is None:
            await self._inner.run(features, vrings)
            self._running = running
            return
        ran = self.state is State.RUNNING
        if ran:
            await self.suspend()
        before = (self.features, list(self.vrings.values()))
        try:
            wanted = [with_base(vring, self.vrings) for vring in vrings]
            await self._go_somehow(features, wanted)
        except BridgeError as error:
            if ran:
                await self._go_back(*before, error)
            raise
        self._running = running
        await self._set_shadowed(self._shadowed)

    # What was in flight in a device before is known to its shadow vrings alone, and comes first.
    @property
    def _goes_through(self) -> bool:
        return self._shadowed or self._passage.inherits

    async def _go_back(
        self, features: int, vrings: Sequence[VringSetup], error: BridgeError
    ) -> None:
        if self.state is State.FAILED:
            return
        try:
            await self._go(features, vrings)
        except BridgeError as second:
            self.fail(f"{error}; going back failed too: {second}")

    # A driver that comes during a migration may have vrings that can't be shadowed.
    async def _go_somehow(self, features: int, vrings: Sequence[VringSetup]) -> None:
        try:
            await self._go(features, vrings)
        except Unsupported as error:
            if self._always or not self._shadowed or self._passage.inherits:
                raise
            self._count_all_as_written(error)
            await self._go(features, vrings)

    # The device stands still.
    async def _go(self, features: int, vrings: Sequence[VringSetup]) -> None:
        await self._passage.end()
        if self._goes_through:
            await self._begin(features, vrings)
            await signal_eventfds(*(vring.call for vring in vrings))
        else:
            self.at_rest = False
            await self._inner.run(features, vrings)
            self._guest = None

    # Shadow vrings relay last: a device that is lost over it has got nothing.
    async def _begin(self, features: int, vrings: Sequence[VringSetup]) -> None:
        before = (self._guest, self._features, self.at_rest)
        self._guest, self._features = {vring.index: vring for vring in vrings}, features
        self.at_rest = True
        try:
            self._guest = await self._passage.begin(features, vrings)
        except BaseException:
            if self.state is not State.FAILED:
                self._guest, self._features, self.at_rest = before
            raise
        self.at_rest = False

    @whole
    async def stop_relaying(self) -> None:
        """Let go of the guest's eventfds; what was in flight can still be handed over."""
        await self._passage.stop()

    def hand_over(self) -> ShadowRings | None:
        """The shadow vrings of a device that FAILED, for ``take_over`` of one in its place."""
        return self._passage.hand_over()

    def take_over(self, rings: ShadowRings) -> None:
        """Begin the next ``run`` with what is in flight in these vrings."""
        self._passage.take_over(rings)

    def give_back(self) -> ShadowRings | None:
        """What ``take_over`` was given, if the device did not get to run with it."""
        return self._passage.give_back()

    @whole
    @journaled
    async def suspend(self) -> None:
        await self._suspend(leave=False)

    async def _suspend(self, *, leave: bool) -> None:
        if self.shadowed:
            self._guest = await self._passage.suspend(leave=leave)
            self.at_rest = True
            await self._passage.end()
        else:
            await self._inner.suspend()
        await self._mark_if_stopped()

    async def _mark_if_stopped(self) -> None:
        if self._mark_all:
            await trio.to_thread.run_sync(self.mark_written)

    def mark_written(self) -> None:
        """Log what a device may have written, that stands still or FAILED, where nothing tells."""
        if self._mark_all and (log := self._passage.log) is not None:
            log.mark_all(self._passage.memory)

    @whole
    @journaled
    async def stop_vring(self, index: int) -> int:
        if self._guest is None:
            base = await self._inner.stop_vring(index)
            self._running -= {index}
            await self._mark_if_stopped()
            return base
        await self._suspend(leave=self._may_leave)
        self._running -= {index}
        return base_of(self._guest, index)

    @whole
    @journaled
    async def reset(self) -> None:
        await self._inner.reset()
        await self._passage.end()
        self._guest, self._running, self.at_rest = None, frozenset(), False

    def load(self, state: DeviceState) -> None:
        super().load(state)
        self._guest, self.at_rest = None, False

    async def capture(self) -> DeviceState:
        state = await super().capture()
        if self._passage.inflight is not None:
            self._passage.inflight.check_empty(state)
        return state

    async def aclose(self) -> None:
        await self._passage.aclose()
        await self._inner.aclose()

    # Changes while running

    # Whether it is shadowed, and has got that now.
    async def _exchanged(self, index: int, **change: Any) -> bool:
        rings = self._passage.rings
        if rings is None or index not in rings.vrings:
            return False
        vring = replace(rings.vrings[index], **change)
        check_kick(index, vring.kick)
        await trio.to_thread.run_sync(rings.replace_eventfd, index, vring)
        self._guest = dict(rings.vrings)
        return True

    async def set_call(self, index: int, fd: OwnedFd | None) -> None:
        if await self._exchanged(index, call=fd):
            await signal_eventfds(fd)
        else:
            await self._inner.set_call(index, fd)

    async def set_kick(self, index: int, fd: OwnedFd | None) -> None:
        if await self._exchanged(index, kick=fd):
            await signal_eventfds(fd)
        else:
            await self._inner.set_kick(index, fd)

    async def set_err(self, index: int, fd: OwnedFd | None) -> None:
        if not await self._exchanged(index, err=fd):
            await self._inner.set_err(index, fd)

    async def set_enabled(self, index: int, enabled: bool) -> None:
        await self._inner.set_enabled(index, enabled)
        await self._exchanged(index, enabled=enabled)

    # The dirty log

    @whole
    @journaled
    async def log_writes(self, log: DirtyLog | None, used: Mapping[int, int]) -> None:
        """Mark what the device writes in ``log``, by the means that are configured."""
        if self._tracking is Tracking.REFUSE and log is not None:
            raise Unsupported(
                "dirty logging is refused by the configuration", "see --dirty-log of serve"
            )
        if self.capabilities.dirty_log.how is How.NATIVE:
            await self._log_in_both(log, used)
            self._logs_itself = log is not None
        elif self._tracking is Tracking.ALL:
            self._mark_all = log is not None
            await self._passage.set_log(log, dict(used))
        else:
            await self._log_in_shadow(log, used)

    # The used rings that the device writes may be ours, and then the guest's are written here.
    async def _log_in_both(self, log: DirtyLog | None, used: Mapping[int, int]) -> None:
        if not self._always:
            await self._inner.log_writes(log, used)
            return
        before = (self._passage.log, self._passage.used_logs)
        await self._passage.set_log(log, dict(used))
        try:
            await self._inner.log_writes(log, {})
        except BridgeError:
            # Its owner keeps a log before it, but not one that was refused.
            if log is not None:
                await self._passage.set_log(*before)
            raise

    async def _log_in_shadow(self, log: DirtyLog | None, used: Mapping[int, int]) -> None:
        await self._passage.set_log(log, dict(used))
        try:
            await self._set_shadowed(self._always or (log is not None and not self._mark_all))
        except Unsupported as error:
            self._count_all_as_written(error)
        if log is None:
            self._mark_all = False

    # What shadow vrings logged before is logged.
    def _count_all_as_written(self, error: Unsupported) -> None:
        if self._tracking is not Tracking.AUTO:
            raise error
        _log.warning(
            "%s: all guest memory will be sent again when the guest stops: %s",
            self.info.target,
            error,
        )
        self._shadowed, self._mark_all = False, True

    async def _set_shadowed(self, shadowed: bool) -> None:
        before, self._shadowed = self._shadowed, shadowed
        if self.shadowed == shadowed or self.state is not State.RUNNING:
            return
        try:
            await self.suspend()
        except BridgeError as error:
            if shadowed:
                self._shadowed = before
                raise
            _log.warning(
                "%s: requests pass through shadow vrings until the device stops: %s",
                self.info.target,
                error,
            )
            return
        again = (self.features, [v for v in self.vrings.values() if v.index in self._running])
        try:
            await self._go(*again)
        except BridgeError as error:
            self._shadowed = before
            await self._go_back(*again, error)
            raise
        how = "pass through shadow vrings" if shadowed else "go straight to the device"
        _log.info("%s: requests %s now", self.info.target, how)

    # Requests in flight

    async def make_inflight(self, queues: int, queue_size: int, features: int) -> InflightBuffer:
        if self._always:
            return InflightBuffer.make(queues, queue_size, features)
        return await self._inner.make_inflight(queues, queue_size, features)

    def use_inflight(self, buffer: InflightBuffer | None, *, leave: bool = False) -> None:
        if not self._always:
            self._inner.use_inflight(buffer)
            return
        self._passage.inflight, self._may_leave = buffer, leave and buffer is not None

    async def watch(self) -> None:
        """Report vrings that break to the guest and in the log, for ever."""
        await self._passage.watch()


@asynccontextmanager
async def with_shadow(
    inner: Device, tracking: Tracking, *, always: bool = False, journal: Journal | None = None
) -> AsyncIterator[ShadowDevice]:
    """The device, with the possibility of shadow vrings, for the block's length."""
    device = ShadowDevice(inner, tracking, always=always, journal=journal)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(device.watch)
            yield device
            nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            await device.aclose()
