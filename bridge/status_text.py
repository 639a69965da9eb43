"""The status of bridges for JSON and for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from vhostbridge.backends.errors import ConfigError
from vhostbridge.backends.virtio import device_id_of, feature_names

from .render import table
from .saved import position_text
from .status import BridgeStatus, VringStatus

if TYPE_CHECKING:
    from vhostbridge.backends.vdpa.inventory import Report


def status_report(status: BridgeStatus) -> Report:
    """A bridge, for JSON; masks are hexadecimal strings."""
    report = asdict(status)
    report["features"] = {"mask": hex(status.features), "names": _features(status)}
    report["vrings"] = [asdict(vring) for vring in status.vrings]
    return report


def _features(status: BridgeStatus) -> list[str]:
    try:
        device_id = None if status.device is None else device_id_of(status.device)
    except ConfigError:  # a type that only a newer daemon knows
        device_id = None
    return feature_names(status.features, device_id)


def status_text(statuses: Sequence[BridgeStatus]) -> Iterator[str]:
    """The lines of ``vhost-bridge status``."""
    for number, status in enumerate(statuses):
        if number:
            yield ""
        yield from _bridge(status)


def _bridge(status: BridgeStatus) -> Iterator[str]:
    yield f"{status.name}: {_state(status)}"
    rows = {
        "device": f"{status.device or 'of unknown type'}, {status.backend}"
        + (f", pid {status.backend_pid}" if status.backend_pid is not None else ""),
        "front-end": f"{status.listen}, "
        + ("nobody" if status.front_end is None else f"pid {status.front_end}"),
    }
    if status.features:
        rows["features"] = f"{status.features:#x} {' '.join(_features(status))}"
    if missing := [
        key.replace("_", " ") for key, a in status.capabilities.items() if a["how"] == "no"
    ]:
        rows["can't"] = ", ".join(missing)
    if status.control:
        facts = dict(status.control)
        rows["control"] = ", ".join([facts.pop("driver"), *(f"{k} {v}" for k, v in facts.items())])
    for key, value in rows.items():
        yield f"  {key.ljust(10)} {value}"
    head = ("VRING", "SIZE", "STATE", "BASE", "AVAILABLE", "USED")
    yield from table(head, map(_vring, status.vrings), indent="  ")
    for vring in status.vrings:
        if vring.problem:
            yield f"  vring {vring.index}: {vring.problem}"


def _state(status: BridgeStatus) -> str:
    words = [status.state]
    if status.held:
        words.append("by an operator")
    if status.incoming:
        words.append(f"a {'kept' if status.kept else 'loaded'} state waits for a front-end")
    if status.failure:
        words.append(status.failure)
    return ", ".join(words)


def _vring(vring: VringStatus) -> Sequence[str]:
    stopped = "stopped" if vring.enabled else "disabled"
    state = "runs" if vring.running else stopped
    return (
        str(vring.index),
        str(vring.size),
        f"{state}, packed" if vring.packed else state,
        "-" if vring.base is None else position_text(vring.base, vring.packed),
        *("-" if one is None else str(one) for one in (vring.available, vring.used)),
    )
