"""What a bridge's parts say of it at one moment, and where they disagree."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import asdict, replace

from vhostbridge.backends.device import Device
from vhostbridge.backends.errors import PeerError
from vhostbridge.backends.guest import VringSetup
from vhostbridge.backends.lifecycle import State
from vhostbridge.backends.ring_memory import available_index, used_index
from vhostbridge.backends.virtio import TransportFeature, device_name

from .back_end import BackEnd
from .events import Kind
from .facts import capabilities_report
from .incoming import Incoming, Origin
from .journal import Journal
from .session import Session
from .status import BridgeStatus, VringStatus
from .traffic import Count, Traffic


def survey(
    back_end: BackEnd,
    session: Session | None,
    incoming: Incoming | None,
    journal: Journal,
) -> BridgeStatus:
    """The status of one bridge, whether its back-end is there or not."""
    config, device = back_end.config, back_end.device
    device_id = None if device is None else device.info.device_id
    waiting = incoming if session is None else session.incoming
    return BridgeStatus(
        name=config.name,
        backend=config.backend,
        backend_pid=back_end.pid,
        listen=config.listen or config.connect or f"fd {config.fd}",
        device=None if device_id is None else device_name(device_id),
        state="closed" if device is None else device.state.value,
        failure="the back-end is not there" if device is None else device.failure,
        held=session is not None and session.held,
        incoming=waiting is not None,
        kept=waiting is not None and waiting.origin is Origin.KEPT,
        front_end=None if session is None else session.peer,
        features=0 if device is None else device.features,
        status=0 if session is None else session.status,
        capabilities={} if device is None else capabilities_report(device.capabilities),
        control={} if device is None else device.control_report(),
        vrings=() if device is None else _vrings(device, session, journal.traffic),
        moment=time.monotonic(),
        since=journal.since,
        front_end_since=journal.front_end_since,
        front_ends=journal.counts.get(Kind.FRONT_END_CONNECTED, 0),
        failures=journal.counts.get(Kind.BACK_END_FAILED, 0),
        errors=journal.counts.get(Kind.ERROR, 0),
        shadow="" if device is None else device.shadow,
        dirty_log="" if device is None else device.logged_by,
        pauses=journal.pauses.tallies,
        paused=journal.pauses.current,
    )


def _vrings(device: Device, session: Session | None, traffic: Traffic) -> tuple[VringStatus, ...]:
    setups = dict(device.vrings)
    counts = traffic.counts()
    indices = set(setups) | (set() if session is None else set(session.vrings)) | set(counts)
    return tuple(
        replace(
            _vring(index, setups.get(index), device, session, traffic.in_flight(index)),
            **asdict(counts.get(index, Count())),
        )
        for index in sorted(indices)
    )


def _vring(
    index: int,
    setup: VringSetup | None,
    device: Device,
    session: Session | None,
    in_flight: int | None,
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
    problem = _problem(size, base, available, used)
    if in_flight is None and available is not None and used is not None and not problem:
        in_flight = (available - used) & 0xFFFF
    return VringStatus(
        index=index,
        size=size,
        running=device.state is State.RUNNING and seen is not None and seen.running,
        enabled=seen.enabled if seen is not None else setup is not None and setup.enabled,
        packed=packed,
        base=base,
        available=available,
        used=used,
        problem=problem,
        in_flight=in_flight,
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
