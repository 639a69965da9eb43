"""How a vhost-vdpa device gets to run: what is said to one that was reset, and in which order."""

from __future__ import annotations

import errno
from collections.abc import Sequence

from vhostbridge.backends.control_vring import ControlVring
from vhostbridge.backends.errors import KernelRefused, Unsupported
from vhostbridge.backends.fds import OwnedFd
from vhostbridge.backends.guest import VringSetup
from vhostbridge.backends.lifecycle import Status
from vhostbridge.backends.virtio import TransportFeature

from .chardev import BackendFeature, Chardev
from .control_space import ControlSpace


def check_kicks(vrings: Sequence[VringSetup]) -> None:
    """Refuse a vring whose requests nobody tells of.

    Raises:
        Unsupported: its front-end wants it to be polled.
    """
    for vring in vrings:
        if vring.kick is None:
            raise Unsupported(
                f"vring {vring.index} has no kick eventfd, and vhost-vdpa does not poll",
                "use a front-end that kicks",
            )


class Launcher:
    """Brings one device up. Blocking; one thread at a time."""

    def __init__(
        self, device: Chardev, target: str, offered: BackendFeature, space: ControlSpace
    ) -> None:
        self._device = device
        self._target = target
        self._late = BackendFeature.ENABLE_AFTER_DRIVER_OK in offered
        self._space = space

    def launch(
        self,
        features: int,
        vrings: Sequence[VringSetup],
        control: ControlVring | None,
        config_call: OwnedFd,
    ) -> None:
        """Let a device that was reset run with these vrings, and before them with ``control``.

        Raises:
            BridgeError: it was refused somewhere on the way; the device has to be reset.
        """
        self._negotiate(features)
        for vring in vrings:
            self._set_up(vring)
        self._device.set_config_call(config_call)
        if control is None:
            self._enable(vrings)
            self._say(Status.DRIVER_OK)
        else:
            self._begin_with(control, features, vrings)

    def set_eventfds(self, vring: VringSetup) -> None:
        """Give a vring its eventfds, or take those away that it has no more."""
        self.set_kick(vring)
        self._device.set_vring_call(vring.index, vring.call)
        self._device.set_vring_err(vring.index, vring.err)

    def switch(self, vring: VringSetup) -> None:
        """Enable or disable a vring that runs."""
        if self._late:
            self._device.set_vring_enable(vring.index, vring.enabled)
        else:
            self.set_kick(vring)

    def set_kick(self, vring: VringSetup) -> None:
        """Let a vring be kicked, unless it is a disabled one of a device that can't be told so."""
        kicked = vring.enabled or self._late
        self._device.set_vring_kick(vring.index, vring.kick if kicked else None)

    def _negotiate(self, features: int) -> None:
        status = Status.ACKNOWLEDGE | Status.DRIVER
        self._device.set_status(status)
        # ACCESS_PLATFORM is the bridge's business: vdpa_sim and VDUSE insist on it, and the
        # front-end never sees it because IOVA equals guest physical address.
        self._device.set_features(features | TransportFeature.ACCESS_PLATFORM.mask)
        self._device.set_status(status | Status.FEATURES_OK)
        if not self._device.status() & Status.FEATURES_OK:
            raise Unsupported(f"{self._target} does not accept features {features:#x}")

    def _set_up(self, vring: VringSetup) -> None:
        self._device.set_vring_num(vring.index, vring.size)
        self._set_base(vring.index, vring.base or 0)
        self._device.set_vring_addr(
            vring.index, vring.descriptor_area, vring.driver_area, vring.device_area
        )
        self.set_eventfds(vring)

    # vp_vdpa and eni know the position of a new vring only, and so does an older SolidRun.
    def _set_base(self, index: int, base: int) -> None:
        try:
            self._device.set_vring_base(index, base)
        except KernelRefused as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            raise Unsupported(
                f"{self._target} can't go on: its kernel driver does not set a vring's position "
                f"({base:#x} of vring {index})",
                "a guest that resets the device can use it again: reboot it, or switch to another",
            ) from None

    # After a reset the others are disabled. vp_vdpa would say so as no virtio driver may, and
    # QEMU's devices break at it.
    def _enable(self, vrings: Sequence[VringSetup]) -> None:
        for vring in vrings:
            if vring.enabled:
                self._device.set_vring_enable(vring.index, True)

    def _say(self, status: Status) -> None:
        self._device.set_status(self._device.status() | status)

    # The others run once all is said: where the device takes that, they are enabled then, and
    # else only kicked.
    def _begin_with(
        self, control: ControlVring, features: int, vrings: Sequence[VringSetup]
    ) -> None:
        own = control.renew(features)
        self._space.place(control, vrings)
        self._set_up(own)
        if not self._late:
            for vring in vrings:
                self._device.set_vring_kick(vring.index, None)
            self._enable(vrings)
        self._enable([own])
        self._say(Status.DRIVER_OK)
        control.introduce(features, vrings)
        if self._late:
            self._enable(vrings)
        else:
            for vring in vrings:
                self.set_kick(vring)
