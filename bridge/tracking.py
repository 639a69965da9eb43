"""By what means a bridge tells a front-end that migrates which memory its device wrote."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from typing import TYPE_CHECKING

from vhostbridge.backends.lifecycle import Ability, Capabilities, How

if TYPE_CHECKING:
    from vhostbridge.backends.device import Device


class Tracking(Enum):
    """The choice of an operator."""

    #: the device itself where it can, else shadow vrings, else everything
    AUTO = "auto"
    #: shadow vrings, also where the device could
    SHADOW = "shadow"
    #: all guest memory counts as written, each time the device stops
    ALL = "all"
    #: migrations fail
    REFUSE = "refuse"


_WHY = {
    Tracking.SHADOW: Ability(How.EMULATED, "shadow vrings"),
    Tracking.ALL: Ability(How.EMULATED, "all guest memory is sent again when the guest stops"),
    Tracking.REFUSE: Ability(How.NO, "refused by the configuration"),
}


def able(device: Device, tracking: Tracking) -> Capabilities:
    """What a device can do when its writes are tracked in this way."""
    abilities = device.capabilities
    if tracking is Tracking.AUTO:
        if abilities.dirty_log.how is How.NATIVE:
            return abilities
        tracking = Tracking.SHADOW
    return replace(abilities, dirty_log=_WHY[tracking])
