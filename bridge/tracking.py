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


_KEPT = Ability(How.EMULATED, "shadow vrings note it in the front-end's buffer")
_UNKNOWN = Ability(
    How.NO, "requests go straight to the device, which does not tell (serve --shadow knows them)"
)
_COMES_AND_GOES = Ability(
    How.NO, "shadow vrings come and go with migrations, and the back-end knows before and after"
)


def able(device: Device, tracking: Tracking, *, always: bool = False) -> Capabilities:
    """What a device can do when its writes are tracked so; ``always``: with shadow vrings."""
    abilities = device.capabilities
    dirty_log = _WHY.get(tracking, abilities.dirty_log)
    if tracking is Tracking.AUTO and dirty_log.how is not How.NATIVE:
        dirty_log = _WHY[Tracking.SHADOW]
    inflight = abilities.inflight
    if always:
        inflight = _KEPT
    elif not inflight:
        inflight = _UNKNOWN
    elif dirty_log is _WHY[Tracking.SHADOW]:
        inflight = _COMES_AND_GOES
    return replace(abilities, dirty_log=dirty_log, inflight=inflight)
