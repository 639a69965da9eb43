"""A virtio device behind ``/dev/vhost-vdpa-N``."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from types import MappingProxyType
from typing import TypeVar

import trio

from vhostbridge.backends.control_vring import ControlVring
from vhostbridge.backends.device import Device, DeviceInfo, whole
from vhostbridge.backends.errors import BridgeError, KernelRefused, Unsupported
from vhostbridge.backends.fds import OwnedFd, new_eventfd, signal_eventfds
from vhostbridge.backends.guest import MemoryRegion, VringSetup, base_of, kick_and_call, with_base
from vhostbridge.backends.lifecycle import Capabilities, How, State, Status, Verb, step
from vhostbridge.backends.pace import Pace
from vhostbridge.backends.ring_memory import used_index
from vhostbridge.backends.virtio import DeviceId

from .chardev import USED, BackendFeature, Chardev
from .control_space import ControlSpace
from .draining import check_drainable, wait_drained
from .launch import Launcher, check_kicks
from .memory import GuestMemory, HalfChanged, check_regions

T = TypeVar("T")

# How many configuration changes of a device a second are passed on.
CHANGES = 100


class VdpaDevice(Device):
    """A vhost-vdpa device. Made by ``open_vdpa``; ioctls run in threads, never abandoned."""

    transport = "vdpa"

    def __init__(self, chardev: Chardev, info: DeviceInfo, capabilities: Capabilities) -> None:
        super().__init__()
        self._dev = chardev
        self.backend_features = chardev.backend_features()
        acked = self.backend_features & USED
        chardev.set_backend_features(acked)
        self._persist = BackendFeature.IOTLB_PERSIST in acked
        self._memory = GuestMemory(chardev, batch=BackendFeature.IOTLB_BATCH in acked)
        self._control_space = ControlSpace(chardev, self._memory, acked)
        self._launcher = Launcher(chardev, info.target, self.backend_features, self._control_space)
        #: A control vring of the bridge's own, which runs with those of the next ``run``.
        self.control: ControlVring | None = None
        # The one that the device was started with.
        self._controlled: ControlVring | None = None
        # Each has a base only while the device is suspended.
        self._rings: dict[int, VringSetup] = {}
        # Those that the device has had enabled since it was started; the others have not moved.
        self._moving: set[int] = set()
        self._late = BackendFeature.ENABLE_AFTER_DRIVER_OK in self.backend_features
        # Whether a SUSPENDED device can't RESUME: it was reset, or its vrings are disabled.
        self._must_restart = False
        # A thread of its own: a VDUSE process that hangs must not use up everybody's threads.
        self._thread = trio.CapacityLimiter(1)
        self._config_call = new_eventfd()
        self._config_changed = False
        self.info = info
        self.capabilities = capabilities

    async def _call(self, function: Callable[..., T], *args: object) -> T:
        return await trio.to_thread.run_sync(function, *args, limiter=self._thread)

    # Configuration

    async def read_config(self, offset: int, size: int) -> bytes:
        have = max(0, min(size, self.info.config_size - offset))
        data = await self._call(self._dev.config, offset, have) if have else b""
        return data + bytes(size - len(data))

    async def write_config(self, offset: int, data: bytes, flags: int) -> None:
        if offset + len(data) > self.info.config_size:
            raise Unsupported(
                f"configuration bytes {offset}+{len(data)} lie beyond the device's "
                f"{self.info.config_size}"
            )
        await self._call(self._dev.set_config, offset, data)

    async def watch_config(self) -> None:
        """Pass configuration changes on, and notice a device that asks for a reset."""
        pace = Pace(CHANGES, CHANGES)
        while True:
            await pace.take()
            await trio.lowlevel.wait_readable(self._config_call.fileno())
            with suppress(BlockingIOError):
                os.eventfd_read(self._config_call.fileno())
            if await self._call(self._dev.status) & Status.NEEDS_RESET:
                self.fail("the device needs a reset (DEVICE_NEEDS_RESET)")
            elif self.state is State.RUNNING:
                self.on_config_change()
            else:
                self._config_changed = True

    # Memory

    @whole
    async def set_memory(self, regions: Sequence[MemoryRegion]) -> None:
        check_regions(regions, self.info.iova_first, self.info.iova_last)
        pause = self.state is State.RUNNING and self._memory.needs_removal(regions)
        pause = pause and self.capabilities.resume.how is How.NATIVE
        if pause:
            await self.suspend()
        try:
            await self._call(self._memory.update, regions)
        except HalfChanged as error:
            self.fail(str(error))
            raise
        finally:
            if pause and self.state is State.SUSPENDED:
                await self._run_on()

    # Life

    @property
    def vrings(self) -> Mapping[int, VringSetup]:
        return MappingProxyType(self._rings)

    @whole
    async def run(self, features: int, vrings: Sequence[VringSetup]) -> None:
        check_kicks(vrings)
        ran = self.state is State.RUNNING
        if ran:
            await self.suspend()
        before = (self._controlled, self.features, dict(self._rings))
        try:
            await self._go(features, [with_base(vring, self._rings) for vring in vrings])
        except BridgeError as error:
            await self._go_back(ran, *before, error)
            raise
        if self._config_changed:
            self._config_changed = False
            self.on_config_change()

    async def _go(self, features: int, vrings: Sequence[VringSetup]) -> None:
        if self.state is State.SUSPENDED and self._can_resume(features, vrings):
            await self._call(self._resume, vrings)
        else:
            await self._call(self._restart, self.control, features, vrings)
        await kick_and_call(vrings)

    # As it was before an operation that failed.
    async def _go_back(
        self,
        ran: bool,
        control: ControlVring | None,
        features: int,
        rings: dict[int, VringSetup],
        error: BridgeError,
    ) -> None:
        if not rings or self.state is State.FAILED:
            return
        self._place(features, list(rings.values()))
        self.state = State.SUSPENDED
        if not ran:
            return
        going = [v for v in rings.values() if v.kick is not None]
        try:
            await self._call(self._restart, control, features, going)
            await kick_and_call(going)
        except BridgeError as second:
            self.fail(f"{error}; going back failed too: {second}")

    # The same vrings, but for those that ``changed``, from where they are. A device that does not
    # resume is started anew.
    async def _run_on(self, *changed: VringSetup) -> None:
        rings = {**self._rings, **{v.index: v for v in changed}}
        going = [replace(v, base=None) for v in rings.values() if v.kick is not None]
        try:
            await self.run(self.features, going)
        except BridgeError as error:
            if self.state is not State.SUSPENDED:
                raise
            try:
                await self.run(self.features, going)
            except BridgeError as second:
                self.fail(f"{error}; going on failed too: {second}")
                raise

    def _can_resume(self, features: int, vrings: Sequence[VringSetup]) -> bool:
        return (
            self.capabilities.resume.how is How.NATIVE
            and not self._must_restart
            and features == self.features
            and self.control is self._controlled
            # RESUME lets all vrings run, on mlx5 and SolidRun those that are disabled too.
            and self._rings.keys() == {v.index for v in vrings}
            and all(
                (known := self._rings[v.index]).enabled
                and v.enabled
                and known.layout == v.layout
                and known.base == v.base
                for v in vrings
            )
        )

    # The status is not written: with DRIVER_OK in it, that un-suspends vdpa_sim behind our back.
    def _resume(self, vrings: Sequence[VringSetup]) -> None:
        for vring in vrings:
            self._launcher.set_eventfds(vring)
        self._dev.resume()
        self._rings = {v.index: v for v in vrings}
        self._enter_running()

    def _restart(
        self, control: ControlVring | None, features: int, vrings: Sequence[VringSetup]
    ) -> None:
        self._reset()
        try:
            self._launcher.launch(features, vrings, control, self._config_call)
        except BaseException:
            self._reset()
            raise
        self.features = features
        self._rings = {v.index: v for v in vrings}
        self._moving = {v.index for v in vrings if v.enabled}
        self._controlled = control
        self._enter_running()

    async def stop_vring(self, index: int) -> int:
        await self.suspend()
        return base_of(self._rings, index)

    @whole
    async def suspend(self) -> None:
        after = step(self.state, Verb.SUSPEND)
        if self.state is State.SUSPENDED:
            return
        native = self.capabilities.suspend.how is How.NATIVE
        rings = dict(self._rings)
        self.state = after
        try:
            await self._call(self._suspend if native else self._drain_and_reset)
        except BridgeError as error:
            if not self.failed.is_set():
                self.state = State.RUNNING
                await self._run_again(rings, error)
            raise

    # After a suspend that failed somewhere: the device may have stopped, or not.
    async def _run_again(self, rings: dict[int, VringSetup], error: BridgeError) -> None:
        if self._must_restart:
            self.fail(str(error))
            return
        try:
            if self.capabilities.resume.how is How.NATIVE:
                await self._call(self._dev.resume)
            else:
                for ring in rings.values():
                    await self._call(self._launcher.set_eventfds, ring)
            # RESUME lets those run too that are disabled, and ``_suspend`` may have disabled some.
            for index in self._moving if self._late else ():
                await self._call(self._dev.set_vring_enable, index, rings[index].enabled)
            self._rings = rings
            await kick_and_call(rings.values())
        except BridgeError as second:
            self.fail(f"{error}; going on failed too: {second}")

    def _suspend(self) -> None:
        whole = self._suspend_whole()
        if not whole:
            for index in self._moving:
                self._dev.set_vring_enable(index, False)
            self._dev.suspend()
        try:
            self._rings = {
                index: replace(ring, base=self._dev.vring_base(index))
                if index in self._moving
                else ring
                for index, ring in self._rings.items()
            }
        except KernelRefused:
            # Stopped, nobody knows where, and only RESUME could let it go on from there.
            self._must_restart = self.capabilities.resume.how is not How.NATIVE
            raise
        self._must_restart = not whole

    # mlx5 succeeds without suspending any vring where vring 0 is disabled, and refuses where
    # another one of a pair has never run.
    def _suspend_whole(self) -> bool:
        if self._late and not (0 in self._rings and self._rings[0].enabled):
            return False
        try:
            self._dev.suspend()
        except KernelRefused:
            if not self._late:
                raise
            return False
        return True

    def _place(self, features: int, vrings: Sequence[VringSetup]) -> None:
        self.features = features
        self._rings = {v.index: v for v in vrings}
        self._must_restart = True

    # Without SUSPEND: take the kicks away, let the device finish what it fetched, reset it, and
    # read from memory how far it got. For split rings that is exact; a packed ring has no index
    # in memory.
    def _drain_and_reset(self) -> None:
        check_drainable(self.info.target, self.features)
        for index in self._rings:
            self._dev.set_vring_kick(index, None)
        # A network device holds receive buffers for ever; they count as not fetched.
        if self.info.device_id != DeviceId.NET:
            moving = [ring for index, ring in self._rings.items() if index in self._moving]
            wait_drained(self._dev, self.info.target, self._memory.regions, moving)
        self._dev.set_status(0)
        self._must_restart = True
        self._rings = {
            index: replace(ring, base=used_index(self._memory.regions, ring))
            for index, ring in self._rings.items()
        }
        if not self._persist:
            self._memory.map_again()
            self._control_space.map_again()

    @whole
    async def reset(self) -> None:
        await self._call(self._reset)

    def _reset(self) -> None:
        self._dev.set_status(0)
        self._rings = {}
        self._moving = set()
        self.features = 0
        self._must_restart = False
        self._controlled = None
        self._enter(Verb.RESET)
        self._control_space.clear()
        if not self._persist:
            self._memory.map_again()

    # Changes while running

    def _running_ring(self, index: int) -> VringSetup | None:
        return self._rings.get(index) if self.state is State.RUNNING else None

    async def set_call(self, index: int, fd: OwnedFd | None) -> None:
        if ring := self._running_ring(index):
            await self._call(self._dev.set_vring_call, index, fd)
            self._rings[index] = replace(ring, call=fd)
            # An interrupt raised through the old descriptor may have found nobody listening.
            await signal_eventfds(fd)

    async def set_kick(self, index: int, fd: OwnedFd | None) -> None:
        if ring := self._running_ring(index):
            ring = replace(ring, kick=fd)
            await self._call(self._launcher.set_kick, ring)
            self._rings[index] = ring
            await signal_eventfds(fd)

    async def set_err(self, index: int, fd: OwnedFd | None) -> None:
        if ring := self._running_ring(index):
            await self._call(self._dev.set_vring_err, index, fd)
            self._rings[index] = replace(ring, err=fd)

    @whole
    async def set_enabled(self, index: int, enabled: bool) -> None:
        ring = self._running_ring(index)
        if ring is None or ring.enabled == enabled:
            return
        ring = replace(ring, enabled=enabled)
        if enabled and not self._can_enable(index):
            await self._run_on(ring)
            return
        await self._call(self._launcher.switch, ring)
        self._rings[index] = ring
        if enabled:
            self._moving.add(index)
            # vdpa_sim keeps the ring's position but needs a kick to look at it again.
            await signal_eventfds(ring.kick, ring.call)

    # Without being started again. One that was disabled got no kicks, and no more happened to it
    # where the device can't enable it late. mlx5 needs for it what it needs for RESUME.
    def _can_enable(self, index: int) -> bool:
        if index not in self._moving:
            return self._late
        return not self._late or self.capabilities.resume.how is How.NATIVE

    async def aclose(self) -> None:
        if self.state is State.CLOSED:
            return
        self.state = State.CLOSED
        with trio.CancelScope(shield=True):
            await self._call(self._close)

    # Closing the last descriptor resets the device and drops its mappings of our memory.
    def _close(self) -> None:
        self._dev.close()
        self._memory.close()
        self._control_space.close()
        self._config_call.close()
