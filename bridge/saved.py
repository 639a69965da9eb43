"""Saved states as plain values for tables and JSON, read and checked without any device."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import IO, Any

from vhostbridge.backends.errors import StateError
from vhostbridge.backends.state import MAX_CHUNK, Chunk, Decoder, DeviceState, End, Head
from vhostbridge.backends.virtio import describe_vring, device_name, feature_names
from vhostbridge.backends.virtio_config import decode_config

from .render import table


@dataclass(frozen=True, slots=True)
class Saved:
    """A state that was read whole; size and SHA-256 of its stream, and of its internal state."""

    state: DeviceState
    size: int
    digest: str
    internal_size: int
    internal_digest: str


def read_saved(stream: IO[bytes], progress: Callable[[int], None]) -> Saved:
    """Read a stream to its end and check it, in constant memory.

    Raises:
        StateError: it is damaged, needs a newer version, or can't be read.
    """
    decoder = Decoder()
    internal, internal_size, size = hashlib.sha256(), 0, 0
    state: DeviceState | None = None
    digest = ""
    while data := _read(stream):
        for event in decoder.feed(data):
            if isinstance(event, Head):
                state = event.state
            elif isinstance(event, Chunk):
                internal.update(event.data)
                internal_size += len(event.data)
            elif isinstance(event, End):
                digest = event.digest.hex()
        size += len(data)
        progress(size)
    decoder.close()
    assert state is not None
    return Saved(state, size, digest, internal_size, internal.hexdigest())


def _read(stream: IO[bytes]) -> bytes:
    try:
        return stream.read(MAX_CHUNK)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise StateError(f"cannot read the device state: {reason}") from None


def saved_report(saved: Saved) -> dict[str, Any]:
    """What a state holds, for JSON; masks and addresses are hexadecimal strings."""
    state = saved.state
    known = state.device_id is not None
    report: dict[str, Any] = {
        "bytes": saved.size,
        "sha256": saved.digest,
        "version": ".".join(map(str, state.version)),
        "producer": state.producer,
        "transport": state.transport,
        "device_id": state.device_id,
        "type": device_name(state.device_id) if state.device_id is not None else None,
        "features": {
            "mask": hex(state.features),
            "names": feature_names(state.features, state.device_id),
        },
        "queue_num": state.queue_num,
        "config": state.config.hex(),
        "vrings": [_vring(state, index) for index in range(len(state.vrings))],
        "inflight": {str(one.index): list(one.heads) for one in state.inflight},
        "control": _plain(state.control),
    }
    if known and state.device_id is not None and state.config:
        report["config_fields"] = decode_config(state.device_id, state.config, state.features)
    if state.internal_owner is not None:
        report["internal"] = {
            "owner": state.internal_owner,
            "bytes": saved.internal_size,
            "sha256": saved.internal_digest,
        }
    report["unknown"] = list(state.unknown)
    return report


def _vring(state: DeviceState, position: int) -> dict[str, Any]:
    vring = asdict(state.vrings[position])
    for key in ("descriptor_area", "driver_area", "device_area"):
        vring[key] = hex(vring[key])
    if state.device_id is not None:
        vring["name"] = describe_vring(state.device_id, vring["index"], state.features)
    vring["position"] = position_text(vring["base"], state.packed)
    return vring


# Bytes of control state are hexadecimal in JSON.
def _plain(value: object) -> object:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def position_text(base: int, packed: bool) -> str:
    """A vring's position for people: its index, or of a packed one both with wrap counters."""
    if not packed:
        return str(base)
    available, used = base & 0xFFFF, base >> 16
    return "/".join(f"{one & 0x7FFF}{'+' if one >> 15 else '-'}" for one in (available, used))


def saved_text(name: str, report: Mapping[str, Any]) -> Iterator[str]:
    """The lines of ``vhost-bridge state show``."""
    kind = report["type"] or "device of unknown type"
    features = report["features"]
    yield f"{name}: {kind}, saved on {report['transport']} by {report['producer']}"
    rows = {
        "format": report["version"],
        "size": f"{report['bytes']} bytes",
        "sha256": report["sha256"],
        "features": f"{features['mask']} {' '.join(features['names'])}",
        "queues": report["queue_num"],
        "internal": (
            f"{report['internal']['bytes']} bytes of {report['internal']['owner']}"
            if "internal" in report
            else "none"
        ),
    }
    for key, value in rows.items():
        yield f"  {key.ljust(10)} {value}"
    for section in report["unknown"]:
        yield f"  {'unknown'.ljust(10)} section {section} was not understood, and need not be"
    for key, value in report.get("config_fields", {}).items():
        yield f"  config     {key.ljust(24)} {value}"
    for key, value in (report["control"] or {}).items():
        yield f"  control    {key.ljust(24)} {value}"
    yield from table(
        ("VRING", "NAME", "SIZE", "POSITION", "ENABLED", "IN FLIGHT", "DESCRIPTORS"),
        (
            (
                str(one["index"]),
                one.get("name", ""),
                str(one["size"]),
                one["position"],
                "yes" if one["enabled"] else "no",
                str(len(report["inflight"].get(str(one["index"]), ()))),
                one["descriptor_area"],
            )
            for one in report["vrings"]
        ),
        indent="  ",
    )


_IDENTITY = ("sha256", "bytes")


def differences(
    before: Mapping[str, Any], after: Mapping[str, Any]
) -> list[tuple[str, object, object]]:
    """What differs between two reports: path, before, after. Size and digest follow from it."""
    return [
        found
        for key in {**before, **after}
        if key not in _IDENTITY
        for found in _differences(key, before.get(key), after.get(key))
    ]


def _differences(path: str, before: object, after: object) -> Iterator[tuple[str, object, object]]:
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in {**before, **after}:
            yield from _differences(f"{path}.{key}", before.get(key), after.get(key))
    elif path == "vrings" and isinstance(before, list) and isinstance(after, list):
        yield from _differences(
            "vring", {one["index"]: one for one in before}, {one["index"]: one for one in after}
        )
    elif before != after:
        yield path, before, after
