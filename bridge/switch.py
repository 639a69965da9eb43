"""Moving what runs on one device to another one, behind the back of its front-end.

The other device is opened, checked and given guest memory while the first one runs. The guest
pauses only while it is suspended, its state is carried over, and the other one starts from there.
"""

from __future__ import annotations

import time

import trio

from vhostbridge.backends.device import Device
from vhostbridge.backends.errors import BridgeError, PeerError, TransportLost
from vhostbridge.backends.guest import MemoryRegion
from vhostbridge.backends.lifecycle import State
from vhostbridge.backends.ring_memory import used_index, was_used
from vhostbridge.backends.state_compatibility import relied_on
from vhostbridge.backends.state_stream import Sink, Source
from vhostbridge.backends.trace import Tracer
from vhostbridge.backends.virtio import TransportFeature, device_name

from .offer import offered_protocol
from .recovery import last_state
from .session import Session
from .shadow import ShadowDevice
from .state_transfer import misfits
from .status import SwitchReport


async def hindrances(old: Device, new: Device, session: Session | None) -> list[str]:
    """Why ``new`` can't take over from ``old``; all of it. Neither is changed."""
    if session is None and old.state is State.RESET:
        kinds = [device.info.device_id for device in (old, new)]
        if None in kinds or kinds[0] == kinds[1]:
            return []
        names = [device_name(kind) for kind in kinds if kind is not None]
        return [f"it is a {names[1]} device, the bridge's is a {names[0]} device"]
    reasons = await misfits(new, old.state_of(await old.full_config()))
    if session is not None:
        missing = session.protocol & ~offered_protocol(new)
        if missing:
            reasons.append(f"the front-end uses {missing.name}, which can't be had with it")
        regions = len(session.memory.regions)
        if regions > new.info.region_max:
            reasons.append(
                f"it takes {new.info.region_max} memory regions, the guest has {regions}"
            )
    return reasons


async def switch(
    old: ShadowDevice, new: ShadowDevice, session: Session | None, report: SwitchReport
) -> None:
    """Let ``new`` go on where ``old`` is, with the vrings of ``session``.

    Raises:
        BridgeError: it could not; ``old`` goes on as before, or is FAILED and says why.
    """
    began = time.monotonic()
    regions = [] if session is None else session.memory.regions
    await new.set_memory(regions)
    if session is not None:
        device_id = new.info.device_id or old.info.device_id
        new.shown = relied_on(device_id, await old.full_config(), old.info.features)
        changed = await session.absence.has_other_config(new)
    report.prepare += time.monotonic() - began
    ran = old.state is State.RUNNING
    lap = _Laps(report, old.trace)
    try:
        if ran:
            await old.suspend()
        lap("suspend")
        await _carry(old, new)
        lap("state")
        if session is not None:
            await session.move_to(new)
        lap("resume")
    except BaseException as error:
        with trio.CancelScope(shield=True):
            await _go_back(old, new, session, regions, error)
        raise
    report.moved = True
    if session is not None and changed:
        session.config_changed.set()


class _Laps:
    def __init__(self, report: SwitchReport, trace: Tracer) -> None:
        self._report = report
        self._trace = trace
        self._last = time.monotonic()

    def __call__(self, name: str) -> None:
        now = time.monotonic()
        self._report.phases[name] = now - self._last
        self._trace.event("switch", phase=name, seconds=round(now - self._last, 6))
        self._last = now


async def _carry(old: Device, new: Device) -> None:
    if old.state is not State.SUSPENDED:
        return
    new.load(await old.capture())
    if old.internal_owner is None:
        return
    async with new.internal_sink() as into, old.internal_source() as out:
        with Source(out.dup()) as source, Sink(into.dup()) as sink:
            while data := await source.read_chunk():
                await sink.write(data)


# The new device is stopped for good before the old one goes on; what it did meanwhile is done.
async def _go_back(
    old: ShadowDevice,
    new: Device,
    session: Session | None,
    regions: list[MemoryRegion],
    error: BaseException,
) -> None:
    await new.aclose()
    if session is None:
        return
    if old.state is State.FAILED:
        # A third one goes on where the other one came to.
        old.at_rest = old.at_rest and not _moved(old, regions)
        session.belong_to(old)
        return
    try:
        if old.state is State.SUSPENDED and _moved(old, regions):
            state = last_state(old, list(old.vrings), regions)
            if state is None:
                old.at_rest = False  # and so does where they are
                raise TransportLost("requests that the other device had taken are in doubt")
            old.load(state)
        if session.device is not old:
            await session.move_to(old)
        else:
            await session.apply()
    except BridgeError as second:
        old.fail(f"after a switch that failed ({error}) it can't go on: {second}")
        # Its failure is the session's to notice; the new one is closed.
        session.belong_to(old)


def _moved(old: Device, regions: list[MemoryRegion]) -> bool:
    packed = old.features & TransportFeature.RING_PACKED.mask
    try:
        if packed:
            return any(was_used(regions, v) for v in old.vrings.values())
        return any(v.base != used_index(regions, v) for v in old.vrings.values())
    except PeerError:
        return True
