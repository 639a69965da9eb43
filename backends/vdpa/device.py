"""A virtio device behind ``/dev/vhost-vdpa-N``."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import trio

from vhostbridge.backends.device import (
    Ability,
    Capabilities,
    Device,
    DeviceInfo,
    How,
    MemoryRegion,
    State,
    Status,
    Verb,
    VringSetup,
)
from vhostbridge.backends.errors import BridgeError, KernelRefused, Unsupported
from vhostbridge.backends.fds import OwnedFd, new_eventfd, signal_eventfds
from vhostbridge.backends.virtio import DeviceId, TransportFeature

from .chardev import BackendFeature, Chardev
from .memory import GuestMemory, check_regions

T = TypeVar("T")

# What the kernel has besides these is of no use to a bridge: descriptor address spaces belong to
# shadow rings.
_WANTED = (
    BackendFeature.IOTLB_MSG_V2
    | BackendFeature.IOTLB_BATCH
    | BackendFeature.IOTLB_ASID
    | BackendFeature.SUSPEND
    | BackendFeature.RESUME
    | BackendFeature.ENABLE_AFTER_DRIVER_OK
    | BackendFeature.IOTLB_PERSIST
)

# The kernel has no limit of its own before 7.2, which takes 2048 IOTLB entries; 509 is what
# vhost-user back-ends commonly offer.
REGION_MAX = 509

# How long a device without SUSPEND may take to finish what it has fetched, in seconds.
DRAIN_SECONDS = 5.0


@dataclass(slots=True)
class _Ring:
    """A programmed vring; ``base`` is known only while the device is suspended."""

    setup: VringSetup
    base: int | None = None


class VdpaDevice(Device):
    """A vhost-vdpa device. Made by ``open_vdpa``; ioctls run in threads, never abandoned."""

    def __init__(self, target: str, chardev: Chardev) -> None:
        super().__init__()
        self._dev = chardev
        self.backend_features = chardev.backend_features()
        acked = self.backend_features & _WANTED
        chardev.set_backend_features(acked)
        self._persist = BackendFeature.IOTLB_PERSIST in acked
        self._memory = GuestMemory(chardev, batch=BackendFeature.IOTLB_BATCH in acked)
        self._rings: dict[int, _Ring] = {}
        self._features = 0
        # Whether the device itself was reset although the model says SUSPENDED (no SUSPEND ioctl).
        self._must_restart = False
        # A thread of its own: a VDUSE process that hangs must not use up everybody's threads.
        self._thread = trio.CapacityLimiter(1)
        self._config_call = new_eventfd()
        self._config_changed = False
        self.info = _describe(target, chardev)
        self.capabilities = _capabilities(self.backend_features)

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
        while True:
            await trio.lowlevel.wait_readable(self._config_call.fileno())
            with suppress(BlockingIOError):
                os.eventfd_read(self._config_call.fileno())
            if await self._call(self._dev.status) & Status.NEEDS_RESET:
                self.fail("the device needs a reset (DEVICE_NEEDS_RESET)")
                self.on_failure(self.failure)
            elif self.state is State.RUNNING:
                self.on_config_change()
            else:
                self._config_changed = True

    # Memory

    async def set_memory(self, regions: Sequence[MemoryRegion]) -> None:
        check_regions(regions, self.info.iova_first, self.info.iova_last)
        pause = self.state is State.RUNNING and self._memory.needs_removal(regions)
        pause = pause and self.capabilities.resume.how is How.NATIVE
        if pause:
            await self.suspend()
        try:
            await self._call(self._memory.update, regions)
        finally:
            if pause:
                await self._run_on()

    # Life

    async def run(self, features: int, vrings: Sequence[VringSetup]) -> None:
        for vring in vrings:
            if vring.kick is None:
                raise Unsupported(
                    f"vring {vring.index} has no kick eventfd, and vhost-vdpa does not poll",
                    "use a front-end that kicks",
                )
        if self.state is State.RUNNING:
            await self.suspend()
        vrings = [self._with_base(vring) for vring in vrings]
        if self.state is State.SUSPENDED and self._can_resume(features, vrings):
            await self._call(self._resume, vrings)
        else:
            await self._call(self._restart, features, vrings)
        await signal_eventfds(*(fd for v in vrings for fd in (v.kick, v.call)))
        if self._config_changed:
            self._config_changed = False
            self.on_config_change()

    # The same vrings with the same features, from where they are.
    async def _run_on(self) -> None:
        rings = self._rings.values()
        await self.run(self._features, [replace(r.setup, base=None) for r in rings])

    def _with_base(self, vring: VringSetup) -> VringSetup:
        if vring.base is not None:
            return vring
        ring = self._rings.get(vring.index)
        if ring is None or ring.base is None:
            raise BridgeError(f"vring {vring.index} has no base to go on from")
        return replace(vring, base=ring.base)

    def _can_resume(self, features: int, vrings: Sequence[VringSetup]) -> bool:
        return (
            self.capabilities.resume.how is How.NATIVE
            and not self._must_restart
            and features == self._features
            and all(
                (ring := self._rings.get(v.index)) is not None
                and ring.setup.layout == v.layout
                and ring.base == v.base
                for v in vrings
            )
        )

    # The status is not written: with DRIVER_OK in it, that un-suspends vdpa_sim behind our back.
    def _resume(self, vrings: Sequence[VringSetup]) -> None:
        wanted = {v.index: v for v in vrings}
        for index, ring in self._rings.items():
            vring = wanted.get(index)
            if vring is not None:
                self._set_eventfds(vring)
                ring.setup, ring.base = vring, None
            self._dev.set_vring_enable(index, vring is not None and vring.enabled)
        self._dev.resume()
        self._enter_running()

    def _restart(self, features: int, vrings: Sequence[VringSetup]) -> None:
        self._reset()
        try:
            self._configure(features, vrings)
            self._dev.set_status(self._dev.status() | Status.DRIVER_OK)
        except BaseException:
            self._reset()
            raise
        self._enter_running()

    def _configure(self, features: int, vrings: Sequence[VringSetup]) -> None:
        status = Status.ACKNOWLEDGE | Status.DRIVER
        self._dev.set_status(status)
        # ACCESS_PLATFORM is the bridge's business: vdpa_sim and VDUSE insist on it, and the
        # front-end never sees it because IOVA equals guest physical address.
        self._dev.set_features(features | TransportFeature.ACCESS_PLATFORM.mask)
        self._dev.set_status(status | Status.FEATURES_OK)
        if not self._dev.status() & Status.FEATURES_OK:
            raise Unsupported(f"{self.info.target} does not accept features {features:#x}")
        for vring in vrings:
            self._dev.set_vring_num(vring.index, vring.size)
            self._dev.set_vring_base(vring.index, vring.base or 0)
            self._dev.set_vring_addr(
                vring.index, vring.descriptor_area, vring.driver_area, vring.device_area
            )
            self._set_eventfds(vring)
        self._dev.set_config_call(self._config_call)
        for vring in vrings:
            self._dev.set_vring_enable(vring.index, vring.enabled)
        self._features = features
        self._rings = {v.index: _Ring(v) for v in vrings}

    def _set_eventfds(self, vring: VringSetup) -> None:
        self._dev.set_vring_kick(vring.index, vring.kick)
        self._dev.set_vring_call(vring.index, vring.call)
        self._dev.set_vring_err(vring.index, vring.err)

    async def stop_vring(self, index: int) -> int:
        await self.suspend()
        ring = self._rings.get(index)
        if ring is None or ring.base is None:
            raise BridgeError(f"vring {index} was never started")
        return ring.base

    async def suspend(self) -> None:
        if self.state is State.SUSPENDED:
            return
        if self.capabilities.suspend.how is How.NATIVE:
            await self._call(self._suspend)
        else:
            await self._call(self._drain_and_reset)

    def _suspend(self) -> None:
        self._enter(Verb.SUSPEND)
        try:
            self._dev.suspend()
            for index, ring in self._rings.items():
                ring.base = self._dev.vring_base(index)
        except KernelRefused as error:
            self.fail(str(error))
            raise

    # Without SUSPEND: take the kicks away, let the device finish what it fetched, reset it, and
    # read from memory how far it got. For split rings that is exact; a packed ring has no index
    # in memory.
    def _drain_and_reset(self) -> None:
        if self._features & TransportFeature.RING_PACKED.mask:
            raise Unsupported(
                f"{self.info.target} can't be stopped: it has no SUSPEND, and a packed ring's "
                "position can't be read from memory",
                "use split rings (packed=off) with this device",
            )
        self._enter(Verb.SUSPEND)
        try:
            self._drain()
        except BridgeError as error:
            self.fail(str(error))
            raise
        self._must_restart = True

    def _drain(self) -> None:
        for index in self._rings:
            self._dev.set_vring_kick(index, None)
        # A network device holds receive buffers for ever; they count as not fetched.
        if self.info.device_id != DeviceId.NET:
            self._wait_drained()
        self._dev.set_status(0)
        for ring in self._rings.values():
            ring.base = self._used_index(ring)
        if not self._persist:
            self._memory.map_again()

    def _wait_drained(self) -> None:
        deadline = time.monotonic() + DRAIN_SECONDS
        for index, ring in self._rings.items():
            while self._dev.vring_base(index) != self._used_index(ring):
                if time.monotonic() > deadline:
                    raise Unsupported(
                        f"{self.info.target} can't be stopped: vring {index} did not finish its "
                        f"requests in {DRAIN_SECONDS:g} s"
                    )
                time.sleep(0.001)

    def _used_index(self, ring: _Ring) -> int:
        return self._memory.read_u16(ring.setup.device_area + 2)

    async def reset(self) -> None:
        await self._call(self._reset)

    def _reset(self) -> None:
        self._dev.set_status(0)
        self._rings.clear()
        self._features = 0
        self._must_restart = False
        self._enter(Verb.RESET)
        if not self._persist:
            self._memory.map_again()

    # Changes while running

    def _running_ring(self, index: int) -> _Ring | None:
        return self._rings.get(index) if self.state is State.RUNNING else None

    async def set_call(self, index: int, fd: OwnedFd | None) -> None:
        if ring := self._running_ring(index):
            await self._call(self._dev.set_vring_call, index, fd)
            ring.setup = replace(ring.setup, call=fd)
            # An interrupt raised through the old descriptor may have found nobody listening.
            await signal_eventfds(fd)

    async def set_kick(self, index: int, fd: OwnedFd | None) -> None:
        if ring := self._running_ring(index):
            await self._call(self._dev.set_vring_kick, index, fd)
            ring.setup = replace(ring.setup, kick=fd)
            await signal_eventfds(fd)

    async def set_err(self, index: int, fd: OwnedFd | None) -> None:
        if ring := self._running_ring(index):
            await self._call(self._dev.set_vring_err, index, fd)
            ring.setup = replace(ring.setup, err=fd)

    async def set_enabled(self, index: int, enabled: bool) -> None:
        ring = self._running_ring(index)
        if ring is None or ring.setup.enabled == enabled:
            return
        ring.setup = replace(ring.setup, enabled=enabled)
        if enabled and BackendFeature.ENABLE_AFTER_DRIVER_OK not in self.backend_features:
            await self._run_on()
            return
        await self._call(self._dev.set_vring_enable, index, enabled)
        if enabled:
            # vdpa_sim keeps the ring's position but needs a kick to look at it again.
            await signal_eventfds(ring.setup.kick, ring.setup.call)

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
        self._config_call.close()


def _describe(target: str, dev: Chardev) -> DeviceInfo:
    device_id = dev.device_id()
    features = dev.features()
    first, last = dev.iova_range()
    config_size = dev.config_size()
    count = dev.vring_count()
    return DeviceInfo(
        target=target,
        device_id=device_id,
        features=features,
        vring_limit=count,
        # vhost-user counts queue pairs for net. More than one would need the control vring, which
        # a vhost-user net front-end keeps to itself.
        queue_num=1 if device_id == DeviceId.NET else count,
        vring_size_max=dev.vring_size_max(),
        config_size=config_size,
        iova_first=first,
        iova_last=last,
        region_max=REGION_MAX,
    )


def _capabilities(features: BackendFeature) -> Capabilities:
    can_suspend = BackendFeature.SUSPEND in features
    can_resume = can_suspend and BackendFeature.RESUME in features
    no = How.NO
    return Capabilities(
        suspend=Ability(How.NATIVE, "VHOST_VDPA_SUSPEND")
        if can_suspend
        else Ability(
            How.EMULATED,
            "no VHOST_VDPA_SUSPEND: kicks are held, requests finish, the device is reset; "
            "split rings only",
        ),
        resume=Ability(How.NATIVE, "VHOST_VDPA_RESUME")
        if can_resume
        else Ability(How.EMULATED, "no VHOST_VDPA_RESUME: reset and programmed again"),
        save=Ability(no, "not implemented yet"),
        load=Ability(no, "not implemented yet"),
        inflight=Ability(no, "vhost-vdpa has no in-flight interface; requests are drained"),
        dirty_log=Ability(no, "vhost-vdpa has no dirty log"),
        memory_hotplug=Ability(How.NATIVE, "IOTLB update while running")
        if can_resume
        else Ability(How.NATIVE, "IOTLB update while running; removal does not pause the device"),
        vring_stop=Ability(How.EMULATED, "the whole device is suspended, the others resume")
        if can_suspend
        else Ability(How.EMULATED, "the whole device is drained and started again"),
    )


@asynccontextmanager
async def open_vdpa(target: str, node: Path) -> AsyncIterator[VdpaDevice]:
    """Open a vhost-vdpa device for the block's length; it is reset on both ends.

    Raises:
        TargetError: the node is missing, busy or not permitted.
    """

    def open_blocking() -> VdpaDevice:
        chardev = Chardev(node)
        try:
            return VdpaDevice(target, chardev)
        except BaseException:
            chardev.close()
            raise

    device = await trio.to_thread.run_sync(open_blocking)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(device.watch_config)
            yield device
            nursery.cancel_scope.cancel()
    finally:
        await device.aclose()
