"""A device that shows a driver what it has read on another one, and relies on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from vhostbridge.backends.state_compatibility import relied_on

from .wrapped import WrappedDevice

if TYPE_CHECKING:
    from vhostbridge.backends.device import Device
    from vhostbridge.backends.state import DeviceState


class FamiliarDevice(WrappedDevice):
    """A device whose configuration is in parts that of the one its state is from."""

    def __init__(self, inner: Device) -> None:
        super().__init__(inner)
        #: What of its configuration is not its own, by offset.
        self.shown: Mapping[int, bytes] = {}

    async def read_config(self, offset: int, size: int) -> bytes:
        return self._as_shown(offset, await super().read_config(offset, size))

    async def full_config(self) -> bytes:
        return self._as_shown(0, await super().full_config())

    def _as_shown(self, offset: int, data: bytes) -> bytes:
        changed = bytearray(data)
        for begin, part in self.shown.items():
            for at, byte in enumerate(part, begin - offset):
                if 0 <= at < len(changed):
                    changed[at] = byte
        return bytes(changed)

    def load(self, state: DeviceState) -> None:
        self._inner.load(state)
        device_id = self.info.device_id if state.device_id is None else state.device_id
        self.shown = {**self.shown, **relied_on(device_id, state.config, state.features)}
