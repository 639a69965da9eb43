"""Where a control vring of the bridge's own lies: in an address space of its own if possible."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from vhostbridge.backends.control_vring import ControlVring
from vhostbridge.backends.errors import BridgeError, KernelRefused
from vhostbridge.backends.guest import VringSetup

from .chardev import BackendFeature, Chardev
from .memory import GuestMemory

# Guest memory is in 0.
_ASID = 1


class ControlSpace:
    """The memory of the control vring of one device. Blocking; one thread at a time."""

    def __init__(self, device: Chardev, guest: GuestMemory, features: BackendFeature) -> None:
        self._device = device
        self._guest = guest
        self._has_spaces = BackendFeature.IOTLB_ASID in features
        batch = BackendFeature.IOTLB_BATCH in features
        self._apart = GuestMemory(device, batch=batch, asid=_ASID)

    def place(self, control: ControlVring, vrings: Sequence[VringSetup]) -> None:
        """Let a device whose features are negotiated reach the control vring.

        Raises:
            BridgeError: the kernel does not map its memory.
        """
        group = self._group_apart(control, vrings)
        control.isolated = group is not None
        self._guest.own = [] if control.isolated else [control.region]
        self._guest.update(self._guest.regions)
        if group is not None:
            self._apart.update([control.region])
            self._device.set_group_asid(group, _ASID)

    # The group of the control vring, if no other vring is in it. Devices without groups refuse.
    def _group_apart(self, control: ControlVring, vrings: Sequence[VringSetup]) -> int | None:
        if not self._has_spaces:
            return None
        with suppress(KernelRefused):
            group = self._device.vring_group(control.index)
            others = {self._device.vring_group(vring.index) for vring in vrings}
            if group not in others and self._device.address_space_count() > _ASID:
                return group
        return None

    def clear(self) -> None:
        """After a reset: the device does not need it any more."""
        with suppress(BridgeError):
            if self._guest.own:
                self._guest.own = []
                self._guest.update(self._guest.regions)
            if self._apart.regions:
                self._apart.update([])

    def map_again(self) -> None:
        """After a reset that lost the parent's entries."""
        self._apart.map_again()

    def close(self) -> None:
        """Unmap everything; the device must be closed already."""
        self._apart.close()
