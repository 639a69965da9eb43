"""A trace's records as bytes, one line of JSON each, and what every trace begins with.

Nothing here does I/O. docs/tracing.md describes the format.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator, Mapping

from vhostbridge import __version__
from vhostbridge.backends.trace import Item

#: What a trace's first bytes are.
MAGIC = b'{"vhost-bridge-trace":'
#: Raised when readers of older ones would misunderstand it.
VERSION = 1
#: No record is longer, in bytes.
LONGEST = 1 << 20


# Made once: what json.dumps would make for each record.
_ENCODER = json.JSONEncoder(separators=(",", ":"), default=str)


def header(continued: bool) -> bytes:
    """The first record of a file: what wrote it, where, and when it began."""
    record = {
        "vhost-bridge-trace": VERSION,
        "mono": time.monotonic_ns(),
        "wall": time.time_ns(),
        "kind": "start",
        "name": "continued" if continued else "start",
        "fields": {"version": __version__, "kernel": platform.release(), "pid": os.getpid()},
    }
    return line(record)


def line(record: Mapping[str, object]) -> bytes:
    """One record, with the end of its line."""
    return _ENCODER.encode(record).encode("ascii") + b"\n"


def lines(item: Item) -> Iterator[bytes]:
    """The lines of what a tracer told. A mistake of ours becomes a record of its own."""
    mono, wall, bridge, device_id, describe, arguments = item
    common = {"mono": mono, "wall": wall, "bridge": bridge}
    try:
        for record in describe(device_id, *arguments):
            yield line({**common, **record})
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        yield line({**common, "kind": "event", "name": "not traced", "fields": {"reason": reason}})


def event(name: str, **fields: object) -> bytes:
    """The line of an event that belongs to no bridge and happens now."""
    times = {"mono": time.monotonic_ns(), "wall": time.time_ns()}
    return line({**times, "kind": "event", "name": name, "fields": fields})
