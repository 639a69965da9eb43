"""Device states to test with, and streams of them that are wrong in one respect."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import cbor2

from vhostbridge.backends.state import (
    LABEL,
    Decoder,
    DeviceState,
    Encoder,
    Event,
    InflightVring,
    VringState,
)

VERSION_1 = 1 << 32
PACKED = 1 << 34
BLOCK_MQ = 1 << 12
PRODUCER = "vhost-bridge 1.0 sample"


def vring(index: int, size: int = 256, base: int = 7) -> VringState:
    start = 0x1_0000_0000 + 0x10000 * index
    return VringState(index, size, base, True, start, start + 0x4000, start + 0x8000)


BLOCK = DeviceState(
    transport="vdpa",
    device_id=2,
    features=VERSION_1 | BLOCK_MQ | 1 << 29,
    queue_num=2,
    config=(8 << 20).to_bytes(8, "little") + bytes(52),
    vrings=(vring(0, base=0xFFFF), vring(1)),
    inflight=(InflightVring(1, (4, 255, 0)),),
    producer=PRODUCER,
)
NET = DeviceState(
    transport="vhost-user",
    device_id=None,
    features=VERSION_1 | PACKED | 1 << 70,
    queue_num=1,
    config=b"",
    vrings=(vring(0, 100, 0x8003_8003), vring(1, 1, 0xFFFF_FFFF), vring(6, 32768, 0)),
    control={"mac": b"\x52\x54\x00\x00\x00\x01", "rx": [True, None, -1, {"é": "x" * 30}]},
    producer=PRODUCER,
)
FILES = DeviceState(
    transport="vhost-user",
    device_id=26,
    features=VERSION_1,
    queue_num=2,
    config=b"shared".ljust(36, b"\0") + b"\1\0\0\0",
    vrings=(vring(0), vring(1)),
    internal_owner="vhost-user",
    producer=PRODUCER,
)
EMPTY = DeviceState("vdpa", None, 0, 0, b"", (), producer=PRODUCER)

#: Name → state and the chunks of its internal state. The files in data/states are these.
SAMPLES: dict[str, tuple[DeviceState, tuple[bytes, ...]]] = {
    "block": (BLOCK, ()),
    "net": (NET, ()),
    "files": (FILES, (b"inode table", bytes(range(256)), b"\xf6")),
    "files-without-internal-bytes": (FILES, ()),
    "empty": (EMPTY, ()),
}


def save(state: DeviceState, chunks: Iterable[bytes] = ()) -> bytes:
    """The whole stream."""
    encoder = Encoder()
    return encoder.begin(state) + b"".join(map(encoder.internal, chunks)) + encoder.end()


def read(raw: bytes, piece: int = 1 << 20) -> list[Event]:
    """All events of a stream, fed in pieces; raises as ``Decoder`` does."""
    decoder = Decoder()
    events = []
    for at in range(0, len(raw), piece):
        events += decoder.feed(raw[at : at + piece])
    decoder.close()
    return events


def items(raw: bytes) -> list[Any]:
    """The items of a stream, but for its label."""
    found = []
    at = raw.removeprefix(LABEL)
    while at:
        found.append(cbor2.loads(at))
        at = at[len(cbor2.dumps(found[-1], canonical=True)) :]
    return found


class Raw(bytes):
    """An item that is encoded already, rightly or not."""


def stream(parts: list[Any], digest: bytes | None = None) -> bytes:
    """The stream of some items, the last of which gets the digest that belongs there."""
    *before, end = parts
    head = LABEL + b"".join(map(_encoded, before))
    if isinstance(end, dict) and "sha256" in end:
        end = end | {"sha256": digest or hashlib.sha256(head).digest()}
    return head + _encoded(end)


def _encoded(part: object) -> bytes:
    return part if isinstance(part, Raw) else cbor2.dumps(part, canonical=True)


def changed(sample: str, change: Callable[[list[Any]], object]) -> bytes:
    """A sample's stream after ``change`` did something to its items; counts and digest fit."""
    parts = items(save(*SAMPLES[sample]))
    change(parts)
    return stream(parts)


def section(parts: list[Any], name: str) -> dict[str, Any]:
    """The first section with a name."""
    return next(p for p in parts if isinstance(p, dict) and p.get("name") == name)
