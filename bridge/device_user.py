"""What a front-end has set up of its device, and the device that is kept in step with it.

vhost-vdpa wants everything before DRIVER_OK, front-ends come in several orders and some never say
"start". So messages only change what is known here; ``apply`` brings the device to it, at
DRIVER_OK, at the first kick, or when the front-end has fallen silent.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import TYPE_CHECKING

import trio

from vhostbridge.backends.device import Device
from vhostbridge.backends.dirty_log import DirtyLog
from vhostbridge.backends.errors import BridgeError, PeerError
from vhostbridge.backends.guest import VringSetup, with_base
from vhostbridge.backends.lifecycle import How, State
from vhostbridge.backends.vhostuser.messages import ProtocolFeature
from vhostbridge.backends.virtio import VHOST_ONLY_FEATURES, TransportFeature

from .absence import Absence
from .departure import recognise
from .front_end import FrontEnd
from .guest_commands import ask_for_kicks
from .incoming import Incoming, Origin, arriving, compare_features
from .memory import MemoryTable
from .stand_in import StandIn
from .vring import FrontendVring

if TYPE_CHECKING:
    from vhostbridge.backends.inflight import InflightBuffer


class DeviceUser(FrontEnd):
    """What a front-end has set up, and when its device follows."""

    def __init__(
        self,
        name: str,
        device: Device,
        *,
        lock: trio.Lock | None = None,
        incoming: Incoming | None = None,
        config: bytes = b"",
    ) -> None:
        super().__init__()
        self.name = name
        self.device = device
        #: Held by whoever works on the device.
        self.lock = lock or trio.Lock()
        #: A state that waits for its vrings.
        self.incoming = incoming
        #: Whether the operator suspended the device: the front-end can't start it meanwhile.
        self.held = False
        # Whether the front-end has, by disabling every vring.
        self._paused = False
        self.log = logging.LoggerAdapter(logging.getLogger("vhostbridge.session"), {"bridge": name})
        #: Where the front-end wants writes to be logged, while LOG_ALL is acknowledged.
        self.log_to: DirtyLog | None = None
        #: What the front-end keeps of requests in flight.
        self.inflight: InflightBuffer | None = None
        self.absence = device.absence if isinstance(device, StandIn) else Absence(config)
        #: Set for the front-end to be told that it should read the configuration again.
        self.config_changed = trio.Event()
        self._replaced = trio.Event()

    def vring(self, index: int) -> FrontendVring:
        """The record of a vring, made at its first mention.

        Raises:
            PeerError: the device has no such vring.
        """
        if index >= self.device.info.vring_limit:
            raise PeerError(
                f"vring {index} is beyond the {self.device.info.vring_limit} vrings of "
                f"{self.device.info.target}"
            )
        if index not in self.vrings:
            self.vrings[index] = FrontendVring(index, enabled=self.enables_at_once)
        return self.vrings[index]

    @property
    def paused(self) -> bool:
        """Whether the front-end paused the device, by disabling every vring."""
        return self._paused and self.none_enabled

    # A vring of the next driver is there, beside vrings of the one before: of those that libkrun's
    # guest does not set up again nobody tells anything any more.
    @property
    def _begins_anew(self) -> bool:
        return any(v.enabled and v.ready and not v.running for v in self.vrings.values())

    @property
    def _stands_still(self) -> bool:
        return self.held or (self.paused and not self._begins_anew)

    @property
    def _out_of_step(self) -> bool:
        if self._stands_still or self.device.failed.is_set():
            return False
        if self.running and self.device.state in (State.SUSPENDED, State.RESET):
            return not self._memory_is_away
        return self.may_start and any(v.ready and not v.running for v in self.vrings.values())

    # The device was suspended for that, and goes on when it is there again (``set_memory``). Of a
    # driver that begins anew the vrings before do not matter.
    @property
    def _memory_is_away(self) -> bool:
        if self.device.state is not State.SUSPENDED or self.paused:
            return False
        return not all(vring.regions(self.memory, self.packed) for vring in self.running)

    async def apply(self) -> None:
        """Make the device run what the front-end has set up, unless it is to stand still: the
        operator holds it, the front-end paused it, or a vring's memory is away.

        Raises:
            PeerError: it does not go on where the incoming state stopped.
            BridgeError: the device can't; it does not run.
        """
        if self._stands_still or self._memory_is_away:
            return
        await self._stop_leftovers()
        may_start = self.may_start
        vrings = [v for v in self.vrings.values() if v.running or (v.ready and may_start)]
        if not vrings:
            return
        features = self.features & ~VHOST_ONLY_FEATURES
        self._look_for_bases(vrings)
        await recognise(self, features, vrings)
        if self.incoming is not None:
            compare_features(self.incoming.state, features)
        setups = [self._setup(v) for v in vrings]
        if self.incoming is None and all(v.begins(self.packed) for v in vrings):
            self.device.new_driver()
        await self._run(features, setups)
        self.incoming, self._paused = None, False
        for vring in vrings:
            vring.running, vring.base = True, None
        there = not isinstance(self.device, StandIn)
        what = "%s: running vrings %s" if there else "%s: vrings %s wait for the back-end"
        self.log.info(what, self.name, ", ".join(str(v.index) for v in vrings))

    async def _stop_leftovers(self) -> None:
        if self.paused:
            for vring in self.running:
                vring.stop(await self.device.stop_vring(vring.index), keep_call=True)

    # A device that holds no requests begins with what was not used. Where the front-end keeps a
    # buffer of a vring's requests, that knows.
    def _look_for_bases(self, vrings: list[FrontendVring]) -> None:
        fresh = self.device.state is State.RESET or self.left_behind is not None
        for vring in vrings if fresh and not self.packed else ():
            if self.inflight is None or self.inflight.is_blank(vring.index):
                vring.look_for_base(self.memory)

    # What stands in for a device gives nothing back: the next one does.
    async def _run(self, features: int, setups: list[VringSetup]) -> None:
        there = not isinstance(self.device, StandIn)
        if there and self.incoming is None:
            await self.absence.load_copy(self.device)
        if there and self.device.state is not State.RUNNING:
            with suppress(BridgeError):  # which the device tells
                places = [with_base(setup, self.device.vrings) for setup in setups]
                ask_for_kicks(features, places, self.memory.regions)
        await self.device.run(features, setups)
        if there:
            self.absence.keep_copy(None)

    def _setup(self, vring: FrontendVring) -> VringSetup:
        setup = vring.setup(self.memory, self.packed)
        return setup if self.incoming is None else arriving(self.incoming.state, setup, vring.base)

    async def hold(self) -> None:
        """Suspend the device for the operator; its front-end's requests wait.

        Raises:
            BridgeError: it can't be suspended; it runs as before.
        """
        ran = self.device.state is State.RUNNING
        try:
            await self._stand_still()
        except BaseException:
            # Also if the operator asks no more: where it was held last is not where it is.
            if ran and self.device.state is State.SUSPENDED:
                # Not the device's ``resume``: it knows of vrings that the front-end has stopped.
                with trio.CancelScope(shield=True):
                    await self.apply()
            raise
        self.held = True

    async def _stand_still(self) -> None:
        await self.device.suspend()
        self.absence.state = await self.device.capture()

    async def release(self) -> None:
        """Go on after ``hold``, with all that the front-end changed meanwhile.

        Raises:
            BridgeError: the device can't; it stays suspended.
        """
        self.held = False
        try:
            await self.apply()
        except BaseException:
            self.held = True
            raise

    async def enable(self, vring: FrontendVring, enabled: bool) -> None:
        """Enable or disable a vring.

        A front-end that does not speak STATUS may pause a guest by disabling every vring, and save
        or migrate it then: cloud-hypervisor reads the dirty log a last time and does not ask for
        bases. So the device is suspended before that is acknowledged. Others ask for the bases.

        Raises:
            BridgeError: the device can't; nothing changed.
        """
        before, vring.enabled = vring.enabled, enabled
        ran = self.device.state is State.RUNNING and not isinstance(self.device, StandIn)
        pauses = vring.running and before and ProtocolFeature.STATUS not in self.protocol
        try:
            if pauses and self.none_enabled:
                # Also where it stands still already, or is away: it must not go on by itself.
                if self.device.state is not State.RESET:
                    await self._stand_still()
                self._paused = True
            elif vring.running:
                await self.device.set_enabled(vring.index, enabled)
        except BridgeError:
            vring.enabled = before
            if ran and self._out_of_step:
                await self.apply()
            raise

    # What else the device has to know

    def use_inflight(self, buffer: InflightBuffer | None) -> None:
        """Let the device note its requests in flight in ``buffer``, which becomes the session's.

        Raises:
            Unsupported: it does not know them; nothing changed.
        """
        leave = ProtocolFeature.GET_VRING_BASE_INFLIGHT in self.protocol
        self.device.use_inflight(buffer, leave=leave)
        old, self.inflight = self.inflight, buffer
        if old is not None and old is not buffer:
            old.close()

    def forget_vrings(self) -> None:
        """After a reset: vrings have no positions and don't run; their calls stay."""
        for vring in self.vrings.values():
            vring.stop(None, keep_call=True)
            vring.enabled = False
        self.use_inflight(None)
        self.absence.keep_copy(None)
        self.status = 0
        self.held = self._paused = False

    async def stop_all(self) -> None:
        """Suspend the device and remember where every vring stopped."""
        for vring in self.running:
            vring.stop(await self.device.stop_vring(vring.index))

    async def set_memory(self, table: MemoryTable) -> None:
        """Replace guest memory; on failure the old table stays and the new one is the caller's.

        Where that takes away the region that a running vring lies in, the device is suspended until
        the vring is in memory again: it would look for it where it was. QEMU removes and adds a
        region that grows.
        """
        device = self.device
        goes_on = device.capabilities.resume.how is How.NATIVE and not isinstance(device, StandIn)
        if device.state is State.RUNNING and goes_on and self.loses_vrings(table):
            await device.suspend()
        await device.set_memory(table.regions)
        old, self.memory = self.memory, table
        old.close_unused(table)

    # The dirty log

    async def update_log(self, log: DirtyLog | None) -> None:
        """Bring logging in step with LOG_ALL and the vrings' addresses, with ``log`` as the log.

        Raises:
            BridgeError: the device does not log, or the log is too small; nothing changed.
        """
        wanted = bool(self.features & TransportFeature.LOG_ALL.mask)
        if wanted and log is not None and not log.covers(self.memory.regions):
            raise PeerError(
                f"the dirty log of {log.size} bytes is too small for the guest's memory"
            )
        await self.device.log_writes(log if wanted else None, self.used_logs)
        old, self.log_to = self.log_to, log
        if old is not None and old is not log:
            old.close()

    @property
    def left_behind(self) -> Incoming | None:
        """The state that waits for the next front-end."""
        waiting = self.incoming
        return None if waiting is None or waiting.origin is Origin.FRONT_END else waiting
