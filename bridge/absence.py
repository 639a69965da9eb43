"""A device that went away under its front-end: where it was, and how another one goes on there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from vhostbridge.backends.errors import BridgeError, PeerError, StateError

from .recovery import last_state, moved_on
from .shadow import ShadowDevice
from .shadow_rings import GuestMap, ShadowRings

if TYPE_CHECKING:
    from vhostbridge.backends.device import Device
    from vhostbridge.backends.guest import MemoryRegion, VringSetup
    from vhostbridge.backends.inflight import InflightBuffer
    from vhostbridge.backends.state import DeviceState

    from .given_state import GivenState
    from .vring import FrontendVring


class Absence:
    """Where a session's device stopped last, or failed. Enough for another one to go on from, if
    the device has no state of its own.

    ``config`` is what is known of its configuration space, from its beginning on.
    """

    def __init__(self, config: bytes = b"") -> None:
        #: ``None`` if nobody knows where it was.
        self.state: DeviceState | None = None
        self.config = config
        # What of it is not the device's own (``ShadowDevice.shown``).
        self._shown: Mapping[int, bytes] = {}
        # Whose failure has been looked at.
        self._device: Device | None = None
        # Shadow vrings of a device that is gone, and whether the next one has got them.
        self._in_flight: ShadowRings | None = None
        self._given = False
        #: What the front-end was given of a device that has not run since.
        self.copy: GivenState | None = None

    def notice(
        self,
        device: Device,
        vrings: Iterable[FrontendVring],
        regions: list[MemoryRegion],
        *,
        held: bool,
    ) -> None:
        """Find out, once, where a device was that failed; of one that is ``held`` it is known."""
        if self._device is not device:
            self._device = device
            if isinstance(device, ShadowDevice):
                self._shown = device.shown
                # Its guest may be elsewhere before there is another one.
                with suppress(PeerError):
                    device.mark_written()
            if self.copy is not None:
                self.state = self.copy.state
            elif not held:
                self.state = self._last_state(device, vrings, regions)

    def stays(self, device: Device) -> None:
        """What is known holds for this device too: it failed, and did not get to run.

        Unless requests in flight do not fit it, and are lost with it.
        """
        self._device = device
        if isinstance(device, ShadowDevice):
            self._in_flight = device.give_back()
        if self._given and self._in_flight is None:
            self.state = None

    # A vring that was to start may have run already, from where the front-end said.
    def _last_state(
        self, device: Device, vrings: Iterable[FrontendVring], regions: list[MemoryRegion]
    ) -> DeviceState | None:
        started = [v for v in vrings if v.ready and v.index in device.vrings]
        for vring in started:
            vring.running, vring.base = True, None
        if isinstance(device, ShadowDevice) and device.internal_owner is None:
            if (rings := device.give_back()) is not None:
                self._in_flight = rings
                return self.state
            self._in_flight = self._in_flight or device.hand_over()
            if self._in_flight is not None or device.at_rest:
                return device.state_of(b"")
        return last_state(device, [v.index for v in started], regions)

    @property
    def known_state(self) -> DeviceState:
        """Where the device was, for another process.

        Raises:
            StateError: nobody knows, or it can't be told without memory of this process.
        """
        if self.state is None or self.state.internal_owner is not None or self._in_flight:
            raise StateError(
                "where the device was when it failed can't be handed over",
                "the front-end is cut off and may connect anew",
            )
        return replace(self.state, config=self.config)

    # Its state, which the front-end was given

    def keep_copy(self, given: GivenState | None) -> None:
        """It has that now, or the device goes on and what it had is worth nothing any more."""
        if self.copy is not None:
            self.copy.close()
        self.copy = given

    async def load_copy(self, device: Device) -> None:
        """Load it into ``device``, if that is another one than it was of.

        Raises:
            BridgeError: it does not fit, or was refused; it is given up, and the device FAILED.
        """
        if self.copy is None or self.copy.device is device:
            return
        try:
            await self.copy.load(device)
        except BridgeError as error:
            # Nobody may go on without it.
            self.keep_copy(None)
            self.state = None
            device.fail(str(error))
            raise
        self.copy.device = device

    # Its configuration

    def remember(self, offset: int, data: bytes) -> None:
        """Configuration that was read; what lies behind a gap is not kept."""
        if offset <= len(self.config):
            self.config = self.config[:offset] + data + self.config[offset + len(data) :]

    def config_at(self, offset: int, size: int) -> bytes | None:
        """The same; ``None`` where it was not read."""
        data = self.config[offset : offset + size]
        return data if len(data) == size else None

    async def has_other_config(self, device: Device) -> bool:
        """Whether it is another one than what the front-end has read, or can't be read."""
        with suppress(BridgeError):
            return (
                bool(self.config) and await device.read_config(0, len(self.config)) != self.config
            )
        return True

    # Its requests in flight

    def recall(
        self,
        features: int,
        vrings: Sequence[VringSetup],
        regions: Sequence[MemoryRegion],
        buffer: InflightBuffer,
    ) -> None:
        """Read from the front-end's buffer what is in flight, if nobody here knows it.

        Raises:
            PeerError: it is not a buffer of these vrings.
        """
        if self._in_flight is not None or not vrings:
            return
        # Until these are settled, or belong to a device, they touch neither. Nor eventfds: some of
        # what a front-end set up once is closed by now.
        silent = [replace(vring, kick=None, call=None, err=None) for vring in vrings]
        memory = GuestMap()
        try:
            memory.update(regions)
            self._in_flight = ShadowRings(features, silent, memory, 0, None, buffer)
        finally:
            memory.close()

    def settle(self, *, leave: bool = False) -> Mapping[int, int]:
        """Count requests in flight as not fetched; where each vring is then, if there are any.

        With ``leave`` they stay in the front-end's buffer, which has them.

        Raises:
            Unsupported: later requests overtook them. They stay, for another device to complete.
        """
        bases: dict[int, int] = {}
        if self._in_flight is not None:
            self._in_flight.settle(leave=leave)
            bases = {i: v.base or 0 for i, v in self._in_flight.vrings.items()}
            self.give_up_requests()
        return bases

    def give_up_requests(self) -> None:
        """Forget what is in flight."""
        if self._in_flight is not None:
            self._in_flight.close()
            self._in_flight = None

    # The device that comes

    def look_again(self, regions: list[MemoryRegion]) -> bool:
        """Whether the device, should it have come to life since, left the vrings in good order."""
        if self.state is None or self._in_flight is not None:
            return True
        moved = moved_on(self.state, regions)
        self.state = moved or self.state
        return moved is not None

    def load(self, device: Device) -> None:
        """Let ``device``, which is RESET, go on from there; not if it has state of its own.

        In any case it shows the configuration that the driver has read.
        """
        if isinstance(device, ShadowDevice):
            device.shown = self._shown
        state = self.state
        if state is None or state.internal_owner is not None or not state.vrings:
            return
        device.load(state)
        self._given = self._in_flight is not None and isinstance(device, ShadowDevice)
        if self._in_flight is not None and isinstance(device, ShadowDevice):
            device.take_over(self._in_flight)
            self._in_flight = None

    def close(self) -> None:
        self.give_up_requests()
        self.keep_copy(None)
