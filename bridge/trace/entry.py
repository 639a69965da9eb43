"""One record of a trace, checked: from a line of bytes that anybody may have written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

from .format import LONGEST, VERSION

KINDS = ("message", "ioctl", "event", "start")
# How deep fields lie in each other: a table of regions with their fields.
_DEPTH = 4
_INT64 = 1 << 63


class Damaged(ValueError):
    """A line is no record; the text says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A record. Times are in nanoseconds; ``duration`` and ``result`` are an ioctl's.

    All text is as it stands in the file: whoever shows it makes it harmless first.
    """

    mono: int
    wall: int
    kind: str
    name: str
    bridge: str = ""
    sender: str = ""
    receiver: str = ""
    reply: bool = False
    need_reply: bool = False
    reverse: bool = False
    fds: int = 0
    repeat: int = 1
    result: int = 0
    errno: str = ""
    duration: int = 0
    fields: Mapping[str, object] | None = None

    @property
    def failed(self) -> bool:
        """Whether somebody said no."""
        refused = str((self.fields or {}).get("ack", "ok")) != "ok"
        return self.result < 0 or refused or (self.kind == "event" and self.name == "error")


def parse(line: bytes) -> Entry:
    """The record in a line.

    Raises:
        Damaged: it is none.
    """
    if len(line) > LONGEST:
        raise Damaged(f"it is longer than {LONGEST} bytes")
    try:
        found = json.loads(line, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise Damaged("it is no JSON") from None
    if not isinstance(found, dict):
        raise Damaged("it is no object")
    if found.get("kind") == "start":
        version = found.get("vhost-bridge-trace")
        if version != VERSION:
            raise Damaged(f"it is of format {str(version)[:20]}, this program reads {VERSION}")
    fields = found.get("fields", {})
    if not isinstance(fields, dict) or not _harmless(fields, _DEPTH):
        raise Damaged("its fields are nested too deep, or are no fields")
    entry = Entry(
        mono=_number(found, "mono"),
        wall=_number(found, "wall"),
        kind=_text(found, "kind"),
        name=_text(found, "name"),
        bridge=_text(found, "bridge", ""),
        sender=_text(found, "from", ""),
        receiver=_text(found, "to", ""),
        reply=found.get("reply") is True,
        need_reply=found.get("need_reply") is True,
        reverse=found.get("reverse") is True,
        fds=_number(found, "fds", 0),
        repeat=_number(found, "repeat", 1),
        result=_number(found, "result", 0, least=-_INT64),
        errno=_text(found, "errno", ""),
        duration=_number(found, "duration", 0),
        fields=fields,
    )
    if entry.kind not in KINDS:
        raise Damaged(f"there is no kind of record {entry.kind[:40]!r}")
    if entry.kind in ("message", "ioctl") and not (entry.sender and entry.receiver):
        raise Damaged("it does not say from whom to whom")
    return entry


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _number(found: Mapping[str, object], key: str, usual: int | None = None, least: int = 0) -> int:
    value = found.get(key, usual)
    if type(value) is not int or not least <= value < _INT64:
        raise Damaged(f"its {key} is no number")
    return value


def _text(found: Mapping[str, object], key: str, usual: str | None = None) -> str:
    value = found.get(key, usual)
    if not isinstance(value, str):
        raise Damaged(f"its {key} is no text")
    return value


def _harmless(value: object, depth: int) -> bool:
    if isinstance(value, dict):
        return depth > 0 and all(_harmless(one, depth - 1) for one in value.values())
    if isinstance(value, list):
        return depth > 0 and all(_harmless(one, depth - 1) for one in value)
    return True
