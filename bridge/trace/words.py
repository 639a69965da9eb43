"""Records in words, harmless on a terminal and in a page: fields, times, what took how long."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime

from vhostbridge.backends.vhostuser.messages import Request
from vhostbridge.backends.vhostuser.specs import FRONTEND_SPECS

from .entry import Entry

# What moves cursors, changes directions or does not print: never shown as it is.
_BAD = re.compile(
    "[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff0-\uffff\ud800-\udfff]"
)
LONG = 4096


def clean(text: str) -> str:
    """Text of a trace without what could do anything but be read."""
    cut = text if len(text) <= LONG else f"{text[:LONG]}…"
    return _BAD.sub("\N{REPLACEMENT CHARACTER}", cut)


def fields_text(fields: Mapping[str, object] | None) -> str:
    """Fields in one line; the names of bits stand behind the word that they are in."""
    return " ".join(
        f"{{{value_text(value)}}}" if key == "names" else f"{clean(key)}={value_text(value)}"
        for key, value in (fields or {}).items()
        if value not in ([], {})
    )


def value_text(value: object) -> str:
    """One field's value in one line."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return fields_text(value)
    if isinstance(value, list):
        whole = any(isinstance(one, Mapping) for one in value)
        texts = [f"[{value_text(one)}]" if whole else value_text(one) for one in value]
        return " ".join(texts)
    return clean(str(value))


def summary(entry: Entry, *, flags: bool = True) -> str:
    """What a record says besides its name; ``flags`` are NEED_REPLY."""
    fields = dict(entry.fields or {})
    if entry.kind == "event":
        return event_text(entry.name, fields)
    acknowledged = fields.pop("ack", None)
    parts = [fields_text(fields), "" if acknowledged is None else value_text(acknowledged)]
    if entry.fds:
        parts.append(f"+{entry.fds} fd{'s' if entry.fds > 1 else ''}")
    if entry.need_reply and flags:
        parts.append("need_reply")
    if entry.repeat > 1:
        parts.append(f"×{entry.repeat}")
    if entry.kind == "ioctl":
        parts.append(f"= {entry.result}" + (f" {clean(entry.errno)}" if entry.errno else ""))
    return "  ".join(part for part in parts if part)


def event_text(name: str, fields: Mapping[str, object]) -> str:
    """An event's fields; what is meant for people is shown without its key."""
    text = fields.get("text")
    if isinstance(text, str):
        return clean(text)
    if name == "state":
        change = f"{value_text(fields.get('before'))} → {value_text(fields.get('now'))}"
        return f"{change}  ({value_text(fields.get('device'))})"
    return fields_text(fields)


def title(entry: Entry) -> str:
    """What a record is called."""
    name = clean(entry.name)
    if entry.reply and "ack" in (entry.fields or {}):
        name += " ack"
    return f"{name} (reverse)" if entry.reverse else name


def span(nanoseconds: int) -> str:
    """A length of time, for people."""
    for unit, size in (("s", 10**9), ("ms", 10**6), ("µs", 10**3)):
        if nanoseconds >= size * 0.9995:
            value = nanoseconds / size
            return f"{value:.3g} {unit}" if value < 999.5 else f"{value:.0f} {unit}"
    return f"{nanoseconds} ns"


def moment(wall: int, digits: int = 6) -> str:
    """A point of time in UTC, from nanoseconds since 1970."""
    try:
        whole = datetime.fromtimestamp(wall // 10**9, UTC)
    except (OverflowError, ValueError, OSError):
        return "?"
    return f"{whole:%Y-%m-%d %H:%M:%S}.{wall % 10**9 // 10 ** (9 - digits):0{digits}d} UTC"


def start_text(entry: Entry) -> str:
    """What a trace's first record says."""
    fields = {key: value_text(value) for key, value in (entry.fields or {}).items()}
    began = "goes on" if entry.name == "continued" else "began"
    return (
        f"vhost-bridge {fields.get('version', '?')}, pid {fields.get('pid', '?')}, "
        f"Linux {fields.get('kernel', '?')}; the trace {began} {moment(entry.wall)}"
    )


class Latencies:
    """How long each answer took, from a stream of records."""

    # One-way requests leave nothing to wait for, and a peer that never answers only so much.
    _WAITING = 64

    def __init__(self) -> None:
        self._asked: dict[tuple[object, ...], deque[int]] = {}

    def of(self, entry: Entry) -> int | None:
        """Nanoseconds from the request, or of the ioctl; ``None`` for what takes no time."""
        if entry.kind == "ioctl":
            return entry.duration
        if entry.kind != "message":
            return None
        ends = (entry.receiver, entry.sender) if entry.reply else (entry.sender, entry.receiver)
        key = (entry.bridge, *ends, entry.name, entry.reverse)
        if not entry.reply:
            if entry.need_reply or _always_answered(entry):
                self._asked.setdefault(key, deque(maxlen=self._WAITING)).append(entry.mono)
            return None
        asked = self._asked.get(key)
        if not asked:
            return None
        began = asked.popleft()
        if not asked:
            del self._asked[key]
        return max(0, entry.mono - began)


def _always_answered(entry: Entry) -> bool:
    if entry.reverse or entry.name not in Request.__members__:
        return False
    return FRONTEND_SPECS[Request[entry.name]].reply is not None


def details(entry: Entry) -> Iterator[tuple[str, str]]:
    """All that a record says, as a table."""
    yield "when", moment(entry.wall, 9)
    if entry.bridge:
        yield "bridge", clean(entry.bridge)
    if entry.sender:
        yield "from", clean(entry.sender)
        yield "to", clean(entry.receiver)
    if entry.kind == "message":
        channel = "reverse (SET_BACKEND_REQ_FD)" if entry.reverse else "main"
        yield "channel", f"{channel}, {'reply' if entry.reply else 'request'}"
        if entry.need_reply:
            yield "flags", "NEED_REPLY"
        if entry.fds:
            yield "descriptors", str(entry.fds)
        if entry.repeat > 1:
            yield "sent", f"{entry.repeat} times in a row"
    for key, value in (entry.fields or {}).items():
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            for number, one in enumerate(value):
                yield f"{clean(key)} {number}", value_text(one)
        else:
            yield clean(key), value_text(value)
    if entry.kind == "ioctl":
        yield "result", f"{entry.result}" + (f" ({clean(entry.errno)})" if entry.errno else "")
        yield "took", span(entry.duration)
