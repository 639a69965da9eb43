"""A device goes away or is moved under its front-end, and another one takes its place."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from vhostbridge.backends.device import Device
from vhostbridge.backends.errors import BridgeError, TransportLost
from vhostbridge.backends.vhostuser.messages import ProtocolFeature

from .device_user import DeviceUser
from .offer import check_features, check_protocol
from .stand_in import StandIn


class ReplacingUser(DeviceUser):
    """A front-end that goes on with another device; while there is none, with a ``StandIn``."""

    # Put somebody in the place of a device that failed: whether that can be.
    def _stand_in(self) -> bool:
        if isinstance(self.device, StandIn):
            return True
        if not self.awaiting:
            return False
        lost = self.device
        lost.on_config_change = lambda: None
        ran = bool(self.running) and not self._stands_still
        self.device = StandIn(lost, self.absence, self.memory.regions, running=ran)
        self.use_inflight(self.inflight)
        return True

    @property
    def awaiting(self) -> bool:
        """Whether the device is gone and another one, from where it was, would do."""
        if isinstance(self.device, StandIn):
            return True
        if not self.device.failed.is_set():
            return False
        absence = self.absence
        # What a paused device has of its own is lost with it; the operator may have saved it.
        known = self.held or (self._stands_still and self.device.internal_owner is None)
        absence.notice(self.device, self.vrings.values(), self.memory.regions, held=known)
        return known or absence.state is not None

    # What fails because the device went away is done again when there is another one.
    async def _recovering(self, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except BridgeError:
            if isinstance(self.device, StandIn) or not self._stand_in():
                raise

    async def attach(self, device: Device) -> None:
        """Go over to ``device``, which takes the place of one that failed (``awaiting``).

        It goes on where the other one was, unless the operator holds it. One that has state of its
        own is RESET, to be loaded before ``release``.

        Raises:
            BridgeError: it does not take the guest's memory, or the features in use.
        """
        if not self._stand_in():
            raise TransportLost(f"the device failed: {self.device.failure}")
        check_features(device, self.features)
        check_protocol(device, self.protocol)
        if self.device.hangs and not self.absence.look_again(self.memory.regions):
            self.device.fail("it hung, and which requests it has done since is not known")
            return
        await device.set_memory(self.memory.regions)
        self.absence.load(device)
        try:
            await self._follow(device)
            if await self.absence.has_other_config(device):
                self.config_changed.set()
            await self._recovering(self.apply)
        except BridgeError as error:
            self.absence.stays(device)
            device.fail(str(error))

    async def go_on(self) -> None:
        """Begin with what another process left (``handover``), on a device in the same state.

        Raises:
            BridgeError: the device does not run.
        """
        self.device.on_config_change = lambda: None
        self.use_inflight(self.inflight)
        await self.update_log(self.log_to)
        self._paused = self.none_enabled and ProtocolFeature.STATUS not in self.protocol
        if self._stands_still:
            self.absence.state = await self.device.capture()
        if await self.absence.has_other_config(self.device):
            self.config_changed.set()
        await self._recovering(self.apply)

    async def move_to(self, device: Device) -> None:
        """Go over to ``device``, which was loaded with the state of the suspended one before it.

        Raises:
            BridgeError: it does not run; it is this session's device nevertheless.
        """
        given = self.absence.copy
        if given is not None and given.device is self.device:
            given.device = device
        await self._follow(device)
        if self._stands_still:
            self.absence.state = await device.capture()
        await self.apply()

    def belong_to(self, device: Device) -> None:
        """Have ``device`` for this session's, whatever became of it."""
        self.device.on_config_change = lambda: None
        self.device = device
        self._listen_to_device()
        self._replaced.set()
        self._replaced = trio.Event()

    async def _follow(self, device: Device) -> None:
        self.belong_to(device)
        self.use_inflight(self.inflight)
        await self.update_log(self.log_to)

    def _listen_to_device(self) -> None:
        self.device.on_config_change = lambda: self.config_changed.set()
