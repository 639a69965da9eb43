"""Which fields the header and each section of a state have, and what may be in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from .errors import StateError
from .state_items import invalid

if TYPE_CHECKING:
    from .state import DeviceState

#: Sections that we know, in the order they have in a stream.
SECTIONS = ("config", "vring", "inflight", "control", "internal")
#: Those that there is one of for each vring.
REPEATED = ("vring", "inflight")

MAX_VRINGS = 1024
MAX_RING = 32768
_MAX_CONFIG = 65536
_MAX_NAME = 255


@dataclass(frozen=True, slots=True)
class _Field:
    accepts: Callable[[object], bool]
    wanted: str
    optional: bool = False


def _number(value: object, low: int, high: int) -> bool:
    # A bool is an int to Python, and is none in CBOR.
    return type(value) is int and low <= value <= high


def _is_name(value: object) -> bool:
    # Names are shown on terminals, in messages of one line.
    return isinstance(value, str) and value.isprintable() and 0 < len(value.encode()) <= _MAX_NAME


def _integer(low: int, high: int, optional: bool = False) -> _Field:
    return _Field(lambda v: _number(v, low, high), f"a number from {low} to {high}", optional)


def _data(low: int, high: int) -> _Field:
    return _Field(
        lambda v: isinstance(v, bytes) and low <= len(v) <= high, f"{low} to {high} bytes"
    )


def _choice(*values: str) -> _Field:
    return _Field(lambda v: isinstance(v, str) and v in values, " or ".join(values))


def _list(each: Callable[[object], bool], low: int, high: int, wanted: str) -> _Field:
    return _Field(
        lambda v: isinstance(v, list) and low <= len(v) <= high and all(map(each, v)), wanted
    )


_U32, _U64 = (1 << 32) - 1, (1 << 64) - 1
_NAME = _Field(_is_name, f"printable text of 1 to {_MAX_NAME} bytes")
_BOOL = _Field(lambda v: isinstance(v, bool), "true or false")
_ADDRESS = _integer(0, _U64)
_INDEX = _integer(0, MAX_VRINGS - 1)


def _is_word(value: object) -> bool:
    return _number(value, 0, _U64)


_FEATURES = _Field(
    lambda v: isinstance(v, list) and 1 <= len(v) <= 2 and all(map(_is_word, v)) and v[1:] != [0],
    "one or two 64-bit words, the second not 0",
)
_COMMON = {"name": _NAME, "critical": _BOOL}

FIELDS: Mapping[str, Mapping[str, _Field]] = {
    "header": {
        "version": _list(lambda v: _number(v, 0, 65535), 2, 2, "two numbers"),
        "producer": _NAME,
        "transport": _choice("vdpa", "vhost-user"),
        "device_id": _integer(0, _U32, optional=True),
        "features": _FEATURES,
        "queue_num": _integer(0, 65536),
        "vrings": _integer(0, MAX_VRINGS),
        "sections": _list(_is_name, 0, 4096, "a list of names"),
    },
    "config": {"data": _data(1, _MAX_CONFIG)},
    "vring": {
        "index": _INDEX,
        "size": _integer(1, MAX_RING),
        "layout": _choice("split", "packed"),
        "base": _integer(0, _U32),
        "enabled": _BOOL,
        "descriptor_area": _ADDRESS,
        "driver_area": _ADDRESS,
        "device_area": _ADDRESS,
    },
    "inflight": {
        "index": _INDEX,
        "heads": _list(lambda v: _number(v, 0, 65535), 1, 65536, "a list of numbers below 65536"),
    },
    "control": {"state": _Field(lambda v: isinstance(v, dict), "a map")},
    "internal": {"owner": _NAME},
    "end": {
        "sections": _integer(0, _U32),
        "internal": _integer(0, _U64),
        "sha256": _data(32, 32),
    },
}


def check_fields(what: str, item: Mapping[str, object], newer: bool = False) -> None:
    """Check an item that is called ``what``: each field there and right, and none besides.

    ``newer`` permits fields that we don't know.

    Raises:
        StateError: not so; names the first that is wrong.
    """
    fields = FIELDS[what] if what == "header" else {**_COMMON, **FIELDS[what]}
    for key, field in fields.items():
        if key not in item:
            if not field.optional:
                raise invalid(f"{what} has no {key}")
        elif not field.accepts(item[key]):
            raise invalid(f"{key} of {what} is not {field.wanted}")
    if what != "header" and item["critical"] is not True:
        raise invalid(f"critical of {what} is not true")
    if not newer and (unknown := sorted(item.keys() - fields)):
        raise invalid(f"{what} has an unknown field {unknown[0]!r}")


def check_section(item: Mapping[str, object]) -> str:
    """The name of a section, of whatever kind.

    Raises:
        StateError: it has no name, or does not say whether it may be left out.
    """
    name = item.get("name")
    if not _is_name(name) or not isinstance(item.get("critical"), bool):
        raise invalid("a section has no name, or does not say whether it is critical")
    return str(name)


def check_version(header: Mapping[str, object], ours: tuple[int, int]) -> bool:
    """Whether the stream is of a newer minor version than ``ours``.

    Raises:
        StateError: it is of another major version, or tells none.
    """
    version = header.get("version")
    if not isinstance(version, list) or not FIELDS["header"]["version"].accepts(version):
        raise invalid("its version is missing")
    if version[0] != ours[0]:
        producer = header.get("producer")
        by = f"; {producer} wrote it" if _is_name(producer) else ""
        raise StateError(
            f"the device state has format {version[0]}.{version[1]}, and this version reads "
            f"{ours[0]}.x",
            f"load it with a version that knows that format{by}",
        )
    return bool(version[1] > ours[1])


def check_state(state: DeviceState) -> None:
    """Check what no single field tells: vrings and requests in relation to each other.

    Raises:
        StateError: they can't be.
    """
    _check_ascending("vring", [vring.index for vring in state.vrings])
    _check_ascending("inflight", [vring.index for vring in state.inflight])
    sizes = {vring.index: vring.size for vring in state.vrings}
    for vring in state.vrings:
        if not state.packed and vring.size & (vring.size - 1):
            raise invalid(f"vring {vring.index} is split, and {vring.size} is no power of two")
        if not state.packed and vring.base >> 16:
            raise invalid(f"vring {vring.index} is split, and its base has more than 16 bits")
    for inflight in state.inflight:
        if inflight.index not in sizes:
            raise invalid(f"requests are in flight on vring {inflight.index}, which is not there")
        if len(set(inflight.heads)) != len(inflight.heads):
            raise invalid(f"a request of vring {inflight.index} is in flight twice")
        limit = 1 << 16 if state.packed else sizes[inflight.index]
        if max(inflight.heads) >= limit:
            raise invalid(f"a request of vring {inflight.index} has a head above {limit - 1}")


def _check_ascending(what: str, indices: list[int]) -> None:
    if any(a >= b for a, b in pairwise(indices)):
        raise invalid(f"{what} sections are not in the order of their indices, each once")
