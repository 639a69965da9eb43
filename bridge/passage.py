"""The way of a device's requests through shadow vrings, which come and go while it stands still."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import trio

from vhostbridge.backends.device import Device
from vhostbridge.backends.dirty_log import DirtyLog
from vhostbridge.backends.errors import BridgeError, Unsupported
from vhostbridge.backends.fds import OwnedFd, new_eventfd, signal_eventfds
from vhostbridge.backends.guest import MemoryRegion, VringSetup
from vhostbridge.backends.inflight import InflightBuffer
from vhostbridge.backends.lifecycle import State
from vhostbridge.backends.mapping import unmap

from .events import Kind
from .journal import Journal
from .shadow_rings import GuestMap, ShadowRings, memory_size
from .window import CEILING, free_window

_log = logging.getLogger("vhostbridge.shadow")


def check_kick(index: int, kick: OwnedFd | None) -> None:
    """Refuse a vring whose requests nobody tells of.

    Raises:
        Unsupported: its front-end wants it to be polled.
    """
    if kick is None:
        raise Unsupported(
            f"vring {index} has no kick eventfd, and shadow vrings do not poll",
            "use a front-end that kicks",
        )


# Its owner may close it, and its number be another file's, while it is signalled.
async def _signal_copy(fd: OwnedFd | None) -> None:
    if fd is not None and not fd.closed:
        with fd.dup() as copy:
            await signal_eventfds(copy)


class Passage:
    """Shadow vrings between a guest and ``device``; they need memory beside the guest's."""

    def __init__(self, device: Device, journal: Journal) -> None:
        self._device = device
        self._journal = journal
        #: Those that relay now.
        self.rings: ShadowRings | None = None
        # Those of a device that is gone, with what was in flight there.
        self._inherited: ShadowRings | None = None
        #: The guest's memory.
        self.memory: Sequence[MemoryRegion] = ()
        self._map = GuestMap()
        #: What vrings begin with: where requests in flight are noted, and what is written.
        self.inflight: InflightBuffer | None = None
        self.log: DirtyLog | None = None
        self.used_logs: Mapping[int, int] = {}
        # Readable when a vring broke.
        self._broken = new_eventfd()

    def keeps_vrings(self, regions: Sequence[MemoryRegion]) -> bool:
        """Whether shadow vrings, if there are any, can go on as they are with other memory."""
        if self.rings is None:
            return True
        removed = {r.key for r in self.memory} - {r.key for r in regions}
        own = self.rings.region
        return not removed and all(
            r.end <= own.guest_address or own.end <= r.guest_address for r in regions
        )

    async def set_memory(self, regions: Sequence[MemoryRegion]) -> None:
        """Make ``regions`` the guest's memory; if vrings relay, only what they can go on with."""
        if self.rings is None:
            await self._device.set_memory(regions)
        else:
            await self._device.set_memory([*regions, self.rings.region])
            gone = self._map.update(regions)
            await trio.to_thread.run_sync(self.rings.set_memory, self._map)
            unmap(gone)
        self.memory = regions

    async def set_log(self, log: DirtyLog | None, used: Mapping[int, int]) -> None:
        """Mark what is written in ``log``, now and whenever vrings begin."""
        self.log, self.used_logs = log, used
        if self.rings is not None:
            await trio.to_thread.run_sync(self.rings.set_log, log, used)

    async def begin(self, features: int, vrings: Sequence[VringSetup]) -> Mapping[int, VringSetup]:
        """Let the device run with shadow vrings; returns the guest's.

        Raises:
            BridgeError: it does not run with them; memory is the guest's alone.
        """
        for vring in vrings:
            check_kick(vring.index, vring.kick)
        self._map.update(self.memory)
        size = memory_size(features, vrings)
        iova = free_window(self._device.info, self.memory, size, CEILING)
        inherited = self._inherited
        rings = await self._make_rings(features, vrings, iova)
        try:
            rings.set_log(self.log, self.used_logs)
            # Before the device runs: what it does then can't be taken back.
            await trio.to_thread.run_sync(rings.prepare)
            await self._device.set_memory([*self.memory, rings.region])
            await self._device.run(rings.features, rings.setups)
            # Before the start: ``watch`` may look as soon as the first one breaks.
            self.rings = rings
            # As is this: requests pass from the first moment on.
            self._journal.traffic.begin(rings)
            await trio.to_thread.run_sync(rings.start)
        except BaseException:
            self.rings = None
            with trio.CancelScope(shield=True), suppress(BridgeError):
                if self._device.state is State.RUNNING:
                    await self._device.suspend()
                if self._device.state is not State.FAILED:
                    await self._device.set_memory(self.memory)
            rings.stop()
            self._journal.traffic.end(rings)
            # What was in flight in a device before is for the one after this.
            self._inherited = inherited
            if inherited is None:
                rings.close()
            raise
        return dict(rings.vrings)

    async def _make_rings(
        self, features: int, vrings: Sequence[VringSetup], iova: int
    ) -> ShadowRings:
        rings, self._inherited = self._inherited, None
        if rings is None:
            return await trio.to_thread.run_sync(
                ShadowRings, features, vrings, self._map, iova, self._broken, self.inflight
            )
        try:
            await trio.to_thread.run_sync(rings.renew, vrings, self._map, iova, self._broken)
        except BridgeError:
            rings.close()
            raise
        return rings

    async def suspend(self, *, leave: bool) -> Mapping[int, VringSetup]:
        """Suspend the device; returns where the guest's vrings are. ``end`` comes next.

        With ``leave`` they may have requests in flight, which the in-flight buffer tells of.

        Raises:
            BridgeError: requests pass as before, or the device is FAILED.
        """
        rings = self.rings
        assert rings is not None
        await trio.to_thread.run_sync(rings.hold)
        try:
            await self._device.suspend()
            await trio.to_thread.run_sync(rings.stop)
            rings.settle(leave=leave)
        except BridgeError as error:
            await self._go_on(rings, error)
            raise
        return dict(rings.vrings)

    # After a suspend that failed. If this fails too, another device goes on with what is in flight.
    async def _go_on(self, rings: ShadowRings, error: BridgeError) -> None:
        try:
            if self._device.state is State.SUSPENDED:
                # Of other vrings, which stopped before, the device has only the places.
                again = [replace(vring, base=None) for vring in rings.setups]
                await self._device.run(rings.features, again)
            if self._device.state is State.RUNNING:
                await trio.to_thread.run_sync(rings.stop)
                await trio.to_thread.run_sync(rings.start)
        except BridgeError as second:
            self._device.fail(f"{error}; going on failed too: {second}")

    async def stop(self) -> None:
        """Relay no more: the guest's eventfds are about to be closed. ``end`` gives vrings up."""
        if self.rings is not None:
            await trio.to_thread.run_sync(self.rings.stop)

    async def end(self) -> None:
        """Give up the vrings of a device that stands still, if there are any."""
        rings, self.rings = self.rings, None
        try:
            if rings is not None:
                self._journal.traffic.end(rings)
                if self._device.state not in (State.FAILED, State.CLOSED):
                    await self._device.set_memory(self.memory)
        finally:
            if rings is not None:
                await trio.to_thread.run_sync(rings.close)
            self._map.close()

    def hand_over(self) -> ShadowRings | None:
        """The vrings of a device that FAILED, for ``take_over`` of one in its place."""
        rings, self.rings = self.rings, None
        if rings is not None:
            rings.stop()
            # They may outlive us.
            rings.mute()
            self._journal.traffic.end(rings)
        return rings

    @property
    def inherits(self) -> bool:
        """Whether vrings will begin with what is in flight in those of another device."""
        return self._inherited is not None

    def take_over(self, rings: ShadowRings) -> None:
        """Begin next with what is in flight in these vrings."""
        self._inherited = rings

    def give_back(self) -> ShadowRings | None:
        """What ``take_over`` was given, if the device did not get to run with it."""
        rings, self._inherited = self._inherited, None
        if rings is not None:
            rings.mute()
        return rings

    async def watch(self) -> None:
        """Report vrings that break to the guest and in the log, for ever."""
        while True:
            await trio.lowlevel.wait_readable(self._broken.fileno())
            with suppress(BlockingIOError):
                os.eventfd_read(self._broken.fileno())
            for vring, reason in self.rings.broken_vrings() if self.rings else ():
                _log.error(
                    "%s: vring %d stopped: %s", self._device.info.target, vring.index, reason
                )
                told = f"vring {vring.index}: {reason}"
                self._journal.tell(Kind.VRING_BROKEN, told, vring=vring.index, why=reason)
                await _signal_copy(vring.err)

    async def aclose(self) -> None:
        await self.end()
        if self._inherited is not None:
            self._inherited.close()
        self._broken.close()
