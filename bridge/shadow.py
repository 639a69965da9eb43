"""A device whose requests can be made to pass through shadow vrings, and what that is good for:
a dirty log where the device has none."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from types import MappingProxyType

import trio

from vhostbridge.backends.device import Device, MemoryRegion, VringSetup, whole
from vhostbridge.backends.dirty_log import DirtyLog
from vhostbridge.backends.errors import BridgeError, Unsupported
from vhostbridge.backends.fds import OwnedFd, new_eventfd, signal_eventfds
from vhostbridge.backends.inflight import InflightBuffer
from vhostbridge.backends.lifecycle import How, State
from vhostbridge.backends.mapping import unmap
from vhostbridge.backends.state import DeviceState

from .events import Kind
from .journal import Journal, journaled
from .shadow_rings import GuestMap, ShadowRings, memory_size
from .tracking import Tracking, able
from .window import CEILING, free_window
from .wrapped import WrappedDevice

_log = logging.getLogger("vhostbridge.shadow")


class ShadowDevice(WrappedDevice):
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
        self._memory: Sequence[MemoryRegion] = ()
        self._map = GuestMap()
        # Whether requests shall pass through shadow vrings when they pass next.
        self._always = self._shadowed = always
        self._features = 0
        # The guest's vrings while they pass through shadow ones, and after, until they go straight.
        self._guest: Mapping[int, VringSetup] | None = None
        self._rings: ShadowRings | None = None
        # Those of a device that is gone, with what was in flight there.
        self._inherited: ShadowRings | None = None
        # Where the front-end keeps what is in flight, and whether vrings may stop with it.
        self._inflight: InflightBuffer | None = None
        self._may_leave = False
        # Readable when a vring broke.
        self._broken = new_eventfd()
        # The vrings that run, or ran until the device was suspended.
        self._running: frozenset[int] = frozenset()
        self._dirty: DirtyLog | None = None
        self._used_logs: Mapping[int, int] = {}
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
        return self._rings is not None

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
        if self._dirty is None:
            return ""
        return "all guest memory" if self._mark_all else "shadow vrings"

    # Memory

    @whole
    @journaled
    async def set_memory(self, regions: Sequence[MemoryRegion]) -> None:
        rings = self._rings
        if rings is not None and not self._keeps_vrings(regions, rings):
            await self.suspend()
            rings = None
        if rings is None:
            await self._inner.set_memory(regions)
            self._memory = regions
            return
        await self._inner.set_memory([*regions, rings.region])
        gone = self._map.update(regions)
        await trio.to_thread.run_sync(rings.set_memory, self._map)
        unmap(gone)
        self._memory = regions

    # Whether shadow vrings can go on as they are with other memory.
    def _keeps_vrings(self, regions: Sequence[MemoryRegion], rings: ShadowRings) -> bool:
        removed = {r.key for r in self._memory} - {r.key for r in regions}
        return not removed and all(
            r.end <= rings.region.guest_address or rings.region.end <= r.guest_address
            for r in regions
        )

    # Life

    @whole
    @journaled
    async def run(self, features: int, vrings: Sequence[VringSetup]) -> None:
        running = frozenset(vring.index for vring in vrings)
        if not self._shadowed and self._guest is None:
            await self._inner.run(features, vrings)
            self._running = running
            return
        wanted = [self._with_base(vring) for vring in vrings]
        ran = self.state is State.RUNNING
        if ran:
            await self.suspend()
            wanted = [self._with_base(vring) for vring in vrings]
        before = (self.features, list(self.vrings.values()))
        try:
            await self._go(features, wanted)
        except BridgeError as error:
            if ran:
                await self._go_back(*before, error)
            raise
        self._running = running

    def _with_base(self, vring: VringSetup) -> VringSetup:
        if vring.base is not None or vring.index not in self.vrings:
            return vring
        return replace(vring, base=self.vrings[vring.index].base)

    async def _go_back(
        self, features: int, vrings: Sequence[VringSetup], error: BridgeError
    ) -> None:
        try:
            await self._go(features, vrings)
        except BridgeError as second:
            self.fail(f"{error}; going back failed too: {second}")

    async def _go(self, features: int, vrings: Sequence[VringSetup]) -> None:
        if self._shadowed:
            await self._go_through(features, vrings)
            return
        await self._drop_rings()
        await self._inner.run(features, vrings)
        self._guest = None

    async def _go_through(self, features: int, vrings: Sequence[VringSetup]) -> None:
        await self._drop_rings()
        self._map.update(self._memory)
        iova = free_window(self.info, self._memory, memory_size(features, vrings), CEILING)
        inherited = self._inherited
        rings = await self._make_rings(features, vrings, iova)
        try:
            rings.set_log(self._dirty, self._used_logs)
            await self._inner.set_memory([*self._memory, rings.region])
            await self._inner.run(rings.features, rings.setups)
            rings.start()
        except BaseException:
            with trio.CancelScope(shield=True), suppress(BridgeError):
                if self.state is State.RUNNING:
                    await self._inner.suspend()
                await self._inner.set_memory(self._memory)
            rings.stop()
            # What was in flight in a device before is for the one after this.
            self._inherited = inherited
            if inherited is None:
                rings.close()
            raise
        self._rings, self._guest, self._features = rings, dict(rings.vrings), features
        self.journal.traffic.begin(rings)
        await signal_eventfds(*(vring.call for vring in vrings))

    async def _make_rings(
        self, features: int, vrings: Sequence[VringSetup], iova: int
    ) -> ShadowRings:
        rings, self._inherited = self._inherited, None
        if rings is None:
            return await trio.to_thread.run_sync(
                ShadowRings, features, vrings, self._map, iova, self._broken, self._inflight
            )
        try:
            await trio.to_thread.run_sync(rings.renew, vrings, self._map, iova, self._broken)
        except BridgeError:
            rings.close()
            raise
        return rings

    def hand_over(self) -> ShadowRings | None:
        """The shadow vrings of a device that FAILED, for ``take_over`` of one in its place."""
        rings, self._rings = self._rings, None
        if rings is not None:
            rings.stop()
            self.journal.traffic.end(rings)
        return rings

    def take_over(self, rings: ShadowRings) -> None:
        """Begin the next ``run`` with what is in flight in these vrings."""
        self._inherited = rings

    def give_back(self) -> ShadowRings | None:
        """What ``take_over`` was given, if the device did not get to run with it."""
        rings, self._inherited = self._inherited, None
        return rings

    # The device stands still and is about to get other vrings.
    async def _drop_rings(self) -> None:
        if self._rings is not None:
            await self._end_rings()
        self._map.close()

    async def _end_rings(self) -> None:
        rings, self._rings = self._rings, None
        assert rings is not None
        self.journal.traffic.end(rings)
        try:
            if self.state not in (State.FAILED, State.CLOSED):
                await self._inner.set_memory(self._memory)
        finally:
            await trio.to_thread.run_sync(rings.close)
            self._map.close()

    @whole
    @journaled
    async def suspend(self) -> None:
        await self._suspend(leave=False)

    async def _suspend(self, *, leave: bool) -> None:
        rings = self._rings
        if rings is None:
            await self._inner.suspend()
        else:
            await self._suspend_rings(rings, leave=leave)
        await self._mark_if_stopped()

    async def _suspend_rings(self, rings: ShadowRings, *, leave: bool) -> None:
        await trio.to_thread.run_sync(rings.hold)
        try:
            await self._inner.suspend()
            await trio.to_thread.run_sync(rings.stop)
            rings.settle(leave=leave)
        except BridgeError:
            if self.state is State.SUSPENDED:
                await self._inner.resume()
            if self.state is State.RUNNING:
                await trio.to_thread.run_sync(rings.stop)
                rings.start()
            raise
        self._guest = dict(rings.vrings)
        await self._end_rings()

    # Where nothing tells what the device wrote, it may have been anything.
    async def _mark_if_stopped(self) -> None:
        if self._mark_all and self._dirty is not None:
            await trio.to_thread.run_sync(self._dirty.mark_all, self._memory)

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
        vring = self._guest.get(index)
        if vring is None or vring.base is None:
            raise BridgeError(f"vring {index} was never started")
        return vring.base

    @whole
    @journaled
    async def reset(self) -> None:
        await self._inner.reset()
        if self._rings is not None:
            await self._end_rings()
        self._guest, self._running = None, frozenset()

    def load(self, state: DeviceState) -> None:
        self._inner.load(state)
        self._guest = None

    async def capture(self) -> DeviceState:
        state = await super().capture()
        if self._inflight is not None:
            self._inflight.check_empty(state)
        return state

    async def aclose(self) -> None:
        if self._rings is not None:
            await self._end_rings()
        if self._inherited is not None:
            self._inherited.close()
        self._map.close()
        await self._inner.aclose()
        self._broken.close()

    # Changes while running

    def _shadow_vring(self, index: int) -> VringSetup | None:
        return None if self._rings is None else self._rings.vrings.get(index)

    async def _exchange(self, vring: VringSetup) -> None:
        assert self._rings is not None
        await trio.to_thread.run_sync(self._rings.replace_eventfd, vring.index, vring)
        self._guest = dict(self._rings.vrings)

    async def set_call(self, index: int, fd: OwnedFd | None) -> None:
        if vring := self._shadow_vring(index):
            await self._exchange(replace(vring, call=fd))
            await signal_eventfds(fd)
        else:
            await self._inner.set_call(index, fd)

    async def set_kick(self, index: int, fd: OwnedFd | None) -> None:
        if vring := self._shadow_vring(index):
            await self._exchange(replace(vring, kick=fd))
            await signal_eventfds(fd)
        else:
            await self._inner.set_kick(index, fd)

    async def set_err(self, index: int, fd: OwnedFd | None) -> None:
        if vring := self._shadow_vring(index):
            await self._exchange(replace(vring, err=fd))
        else:
            await self._inner.set_err(index, fd)

    async def set_enabled(self, index: int, enabled: bool) -> None:
        await self._inner.set_enabled(index, enabled)
        if vring := self._shadow_vring(index):
            await self._exchange(replace(vring, enabled=enabled))

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
            await self._inner.log_writes(log, used)
            self._logs_itself = log is not None
        elif self._tracking is Tracking.ALL:
            self._dirty, self._mark_all = log, log is not None
        else:
            await self._log_in_shadow(log, used)

    async def _log_in_shadow(self, log: DirtyLog | None, used: Mapping[int, int]) -> None:
        self._dirty, self._used_logs = log, dict(used)
        if self._rings is not None:
            await trio.to_thread.run_sync(self._rings.set_log, log, used)
        try:
            await self._set_shadowed(self._always or (log is not None and not self._mark_all))
        except Unsupported as error:
            if self._tracking is not Tracking.AUTO:
                raise
            _log.warning(
                "%s: all guest memory will be sent again when the guest stops: %s",
                self.info.target,
                error,
            )
            self._shadowed, self._mark_all = False, True
        if log is None:
            self._mark_all = False

    async def _set_shadowed(self, shadowed: bool) -> None:
        before, self._shadowed = self._shadowed, shadowed
        if before == shadowed or self.state is not State.RUNNING:
            return
        await self.suspend()
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

    async def make_inflight(self, queues: int, queue_size: int, *, packed: bool) -> InflightBuffer:
        if self._always:
            return InflightBuffer.make(queues, queue_size, packed=packed)
        return await self._inner.make_inflight(queues, queue_size, packed=packed)

    def use_inflight(self, buffer: InflightBuffer | None, *, leave: bool = False) -> None:
        if not self._always:
            self._inner.use_inflight(buffer)
            return
        self._inflight, self._may_leave = buffer, leave and buffer is not None

    # Breaks of vrings

    async def watch(self) -> None:
        """Report vrings that break to the guest and in the log, for ever."""
        while True:
            await trio.lowlevel.wait_readable(self._broken.fileno())
            with suppress(BlockingIOError):
                os.eventfd_read(self._broken.fileno())
            for vring, reason in self._rings.broken_vrings() if self._rings else ():
                _log.error("%s: vring %d stopped: %s", self.info.target, vring.index, reason)
                told = f"vring {vring.index}: {reason}"
                self.journal.tell(Kind.VRING_BROKEN, told, vring=vring.index, why=reason)
                await signal_eventfds(vring.err)


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
