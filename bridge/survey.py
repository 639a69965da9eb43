"""What a bridge's parts say of it at one moment, and where they disagree."""

from __future__ import annotations

from contextlib import suppress

from vhostbridge.backends.device import Device, VringSetup
from vhostbridge.backends.errors import PeerError
from vhostbridge.backends.lifecycle import State
from vhostbridge.backends.ring_memory import available_index, used_index
from vhostbridge.backends.virtio import TransportFeature, device_name

from .config import BridgeConfig
from .facts import capabilities_report
from .incoming import Incoming, Origin
from .session import Session
from .status import BridgeStatus, VringStatus


def survey(
    config: BridgeConfig,
    device: Device | None,
    session: Session | None,
    front_end: int | None,
    incoming: Incoming | None,
) -> BridgeStatus:
    """The status of one bridge; ``device`` is ``None`` while its back-end is not there."""
    device_id = None if device is None else device.info.device_id
    waiting = incoming if session is None else session.incoming
    return BridgeStatus(
        name=config.name,
        backend=config.backend,
        listen=config.listen or config.connect or f"fd {config.fd}",
        device=None if device_id is None else device_name(device_id),
        state="closed" if device is None else device.state.value,
        failure="the back-end is not there" if device is None else device.failure,
        held=session is not None and session.held,
        incoming=waiting is not None,
        kept=waiting is not None and waiting.origin is Origin.KEPT,
        front_end=front_end,
        features=0 if device is None else device.features,
        status=0 if session is None else session.status,
        capabilities={} if device is None else capabilities_report(device.capabilities),
        control={} if device is None else device.control_report(),
        vrings=() if device is None else _vrings(device, session),
    )


def _vrings(device: Device, session: Session | None) -> tuple[VringStatus, ...]:
    setups = dict(device.vrings)
    indices = set(setups) | (set() if session is None else set(session.vrings))
    return tuple(_vring(index, setups.get(index), device, session) for index in sorted(indices))


def _vring(
    index: int, setup: VringSetup | None, device: Device, session: Session | None
) -> VringStatus:
    seen = None if session is None else session.vrings.get(index)
    packed = bool(device.features & TransportFeature.RING_PACKED.mask)
    base = setup.base if setup is not None and device.state is State.SUSPENDED else None
    available = used = None
    if setup is not None and session is not None and not packed:
        with suppress(PeerError):
            available = available_index(session.memory.regions, setup)
            used = used_index(session.memory.regions, setup)
    size = setup.size if setup is not None else seen.size if seen is not None else 0
    return VringStatus(
        index=index,
        size=size,
        running=device.state is State.RUNNING and seen is not None and seen.running,
        enabled=seen.enabled if seen is not None else setup is not None and setup.enabled,
        packed=packed,
        base=base,
        available=available,
        used=used,
        problem=_problem(size, base, available, used),
    )


# Split rings: used never runs ahead of available, a suspended device has completed all it took.
def _problem(size: int, base: int | None, available: int | None, used: int | None) -> str:
    if available is None or used is None:
        return ""
    if (available - used) & 0xFFFF > size:
        return f"available index {available} and used index {used} are more than {size} apart"
    if base is not None and base != used:
        return f"used index {used} is not the device's base {base}"
    return ""
