"""The status of bridges for JSON and for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import datetime
from time import time
from typing import TYPE_CHECKING

from vhostbridge.backends.errors import ConfigError
from vhostbridge.backends.virtio import device_id_of, feature_names

from .rates import Rates
from .render import table
from .saved import position_text
from .status import BridgeStatus, VringStatus, pause_report, tally_report

if TYPE_CHECKING:
    from vhostbridge.backends.vdpa.inventory import Report


def status_report(status: BridgeStatus, rates: Rates) -> Report:
    """A bridge, for JSON; masks are hexadecimal strings."""
    report = asdict(status)
    report["features"] = {"mask": hex(status.features), "names": _features(status)}
    report["vrings"] = [
        {**asdict(vring), "rate": asdict(rate) if rate is not None else None}
        for vring in status.vrings
        for rate in [rates.get((status.name, vring.index))]
    ]
    report["pauses"] = {reason: tally_report(tally) for reason, tally in status.pauses.items()}
    report["paused"] = pause_report(status.paused)
    return report


def _since(status: BridgeStatus) -> str:
    return "" if status.front_end_since is None else f" since {clock(status.front_end_since)}"


def _features(status: BridgeStatus) -> list[str]:
    try:
        device_id = None if status.device is None else device_id_of(status.device)
    except ConfigError:  # a type that only a newer daemon knows
        device_id = None
    return feature_names(status.features, device_id)


def status_text(statuses: Sequence[BridgeStatus], rates: Rates) -> Iterator[str]:
    """The lines of ``vhost-bridge status``."""
    for number, status in enumerate(statuses):
        if number:
            yield ""
        yield from _bridge(status, rates)


def _bridge(status: BridgeStatus, rates: Rates) -> Iterator[str]:
    yield f"{status.name}: {_state(status)}"
    for key, value in (*_parts(status), *_going_on(status), *_past(status)):
        yield f"  {key.ljust(10)} {value}"
    yield from _table(status, rates)
    for vring in status.vrings:
        if vring.problem:
            yield f"  vring {vring.index}: {vring.problem}"


# Columns of what is known of no vring are left out.
def _table(status: BridgeStatus, rates: Rates) -> Iterator[str]:
    head = ["VRING", "SIZE", "STATE", "BASE", "AVAILABLE", "USED", "IN FLIGHT"]
    rows = [[*_vring(vring)] for vring in status.vrings]
    found = [rates.get((status.name, vring.index)) for vring in status.vrings]
    for title, name, text in (
        ("REQUESTS/S", "requests", _per_second),
        ("BYTES/S", "bytes", _bytes_per_second),
        ("KICKS/S", "kicks", _per_second),
        ("CALLS/S", "calls", _per_second),
    ):
        values = [None if rate is None else getattr(rate, name) for rate in found]
        if any(value is not None for value in values):
            head.append(title)
            for row, value in zip(rows, values, strict=True):
                row.append("-" if value is None else text(value))
    yield from table(head, rows, indent="  ")


def _per_second(value: float) -> str:
    return f"{value:.0f}" if value >= 10 or value == 0 else f"{value:.1f}"


def _bytes_per_second(value: float) -> str:
    for unit in ("", "Ki", "Mi"):
        if value < 1024:
            return f"{value:.0f} {unit}".rstrip() if not unit else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} Gi"


def _parts(status: BridgeStatus) -> Iterator[tuple[str, str]]:
    pid = "" if status.backend_pid is None else f", pid {status.backend_pid}"
    yield "device", f"{status.device or 'of unknown type'}, {status.backend}{pid}"
    peer = "nobody" if status.front_end is None else f"pid {status.front_end}{_since(status)}"
    yield "front-end", f"{status.listen}, {peer}"
    if status.features:
        yield "features", f"{status.features:#x} {' '.join(_features(status))}"
    missing = [key for key, ability in status.capabilities.items() if ability["how"] == "no"]
    if missing:
        yield "can't", ", ".join(key.replace("_", " ") for key in missing)
    if status.control:
        facts = dict(status.control)
        yield "control", ", ".join([facts.pop("driver"), *(f"{k} {v}" for k, v in facts.items())])


def _going_on(status: BridgeStatus) -> Iterator[tuple[str, str]]:
    if status.shadow:
        yield "shadow", f"requests pass through shadow vrings: {status.shadow}"
    if status.dirty_log:
        yield "dirty log", f"on, by {status.dirty_log}"
    if status.paused is not None:
        yield "paused", f"{status.paused.reason}, for {_length(status.paused.seconds)} so far"


def _past(status: BridgeStatus) -> Iterator[tuple[str, str]]:
    key = "pauses"
    for reason, tally in sorted(status.pauses.items()):
        told = f"{tally.count} {reason}, {_length(tally.seconds)}"
        if tally.last is not None:
            told += f"; last {clock(tally.last.at)}, {tally.last.told}"
        if tally.longest is not None and tally.longest != tally.last:
            told += f"; longest {tally.longest.told}"
        yield key, told
        key = ""
    counts = {"back-ends failed": status.failures, "front-ends cut off": status.errors}
    errors = [f"{count} {what}" for what, count in counts.items() if count]
    if errors:
        yield "errors", ", ".join(errors)


def _length(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms" if seconds < 10 else f"{seconds:.0f} s"


def clock(at: float) -> str:
    """A time of the recent past, here, for people."""
    when = datetime.fromtimestamp(at)
    return when.strftime("%H:%M:%S" if time() - at < 43200 else "%Y-%m-%d %H:%M:%S")


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
        *(
            "-" if one is None else str(one)
            for one in (vring.available, vring.used, vring.in_flight)
        ),
    )
