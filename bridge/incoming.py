"""A state that waits for its front-end: does the front-end go on where it stopped?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import TYPE_CHECKING

from vhostbridge.backends.errors import PeerError
from vhostbridge.backends.guest import MemoryRegion, VringSetup
from vhostbridge.backends.ring_memory import used_index
from vhostbridge.backends.virtio import TransportFeature, feature_names

from .vring import check_packed_base

if TYPE_CHECKING:
    from vhostbridge.backends.state import DeviceState, VringState

_HINT = (
    "the state is another device's, or the guest was not stopped at its save: load the right one"
)


class Origin(Enum):
    """Who gave the device a state that waits."""

    #: an operator: the front-end that comes must be the one it belongs to
    LOADED = auto()
    #: the front-end itself, which takes it along when it leaves
    FRONT_END = auto()
    #: the front-end before: the next one may go on, or begin anew
    KEPT = auto()


@dataclass(frozen=True, slots=True)
class Incoming:
    """A state that the device was given, or kept, and that waits for its vrings."""

    state: DeviceState
    origin: Origin = Origin.LOADED


def compare_features(state: DeviceState, features: int) -> None:
    """Compare the features that the front-end acknowledged with those of the state.

    Raises:
        PeerError: they differ; names both sides.
    """
    if features != state.features:
        raise PeerError(_feature_difference(state, features), _HINT)


def _feature_difference(state: DeviceState, features: int) -> str:
    sides = {
        "only the front-end has": features & ~state.features,
        "only the state has": state.features & ~features,
    }
    told = "; ".join(
        f"{side} {', '.join(feature_names(bits, state.device_id))}"
        for side, bits in sides.items()
        if bits
    )
    return f"the front-end's features are not those of the state: {told}"


def disagreements(state: DeviceState, features: int, vrings: Mapping[int, VringSetup]) -> list[str]:
    """Why a state is not that of a front-end whose vrings these are; all of it."""
    reasons = []
    if vrings and features != state.features:
        reasons.append(_feature_difference(state, features))
    for saved in state.vrings:
        here = vrings.get(saved.index)
        told = [] if here is None else _layout_difference(here, saved)
        if told:
            reasons.append(f"vring {saved.index} of the front-end has {', '.join(told)}")
    missing = [str(index) for index in vrings if index not in {v.index for v in state.vrings}]
    if missing:
        reasons.append(f"the front-end runs vring {', '.join(missing)}, which the state lacks")
    return reasons


def _layout_difference(here: VringSetup, saved: VringState) -> list[str]:
    names = ("size", "descriptor_area", "driver_area", "device_area")
    return [
        f"{name.replace('_', ' ')} {getattr(here, name):#x} where the state has "
        f"{getattr(saved, name):#x}"
        for name in names
        if getattr(here, name) != getattr(saved, name)
    ]


def arriving(state: DeviceState, setup: VringSetup, base: int | None) -> VringSetup:
    """The vring as it goes on from ``state``; ``base`` is where the front-end says that it is.

    Raises:
        PeerError: position, size or addresses differ; names both values.
    """
    saved = next((v for v in state.vrings if v.index == setup.index), None)
    if saved is None:
        return setup
    told = _layout_difference(setup, saved)
    if base is not None and base != saved.base:
        told.insert(0, f"base {base:#x} where the state has {saved.base:#x}")
    if told:
        raise PeerError(
            f"the front-end does not go on where the loaded state stopped: vring {setup.index} "
            f"has {', '.join(told)}",
            _HINT,
        )
    if state.packed:
        check_packed_base(saved.index, saved.size, saved.base)
    return replace(setup, base=saved.base)


def strangeness(
    state: DeviceState,
    features: int,
    setups: Sequence[VringSetup],
    bases: Mapping[int, int | None],
    regions: Sequence[MemoryRegion],
) -> str:
    """Why a front-end is not the one that left ``state``; empty if it is.

    Guest memory decides where it can be asked: the used index of a split ring is where the device
    stopped. ``bases`` are what the front-end says, ``None`` where it said nothing.
    """
    if features != state.features:
        return _feature_difference(state, features)
    saved = {v.index: v for v in state.vrings}
    for setup in setups:
        there = saved.get(setup.index)
        if there is None:
            return f"vring {setup.index} did not run"
        told = _layout_difference(setup, there)
        base = bases.get(setup.index)
        if base is not None and base != there.base:
            told.append(f"base {base:#x} where the state has {there.base:#x}")
        if not told and not features & TransportFeature.RING_PACKED.mask:
            used = used_index(regions, setup)
            if used != there.base:
                told.append(f"used index {used:#x} where the state has {there.base:#x}")
        if told:
            return f"vring {setup.index} has {', '.join(told)}"
    return ""
