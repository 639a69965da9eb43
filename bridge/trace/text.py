"""A trace as lines of text: time, an arrow between the three parties, what was said."""

from __future__ import annotations

from collections.abc import Callable

from .entry import Entry
from .words import Latencies, clean, span, start_text, summary, title

Style = Callable[[str, str], str]

_TIME, _BRIDGE, _NAME = 12, 10, 28
# Towards whom: a request goes in a full line, what answers it in a broken one.
_ARROWS = {
    ("front-end", "request"): ("──────▶│       ", "◀──────│       "),
    ("front-end", "reply"): ("┄┄┄┄┄┄▶│       ", "◀┄┄┄┄┄┄│       "),
    ("back-end", "request"): ("       │──────▶", "       │◀──────"),
    ("back-end", "reply"): ("       │┄┄┄┄┄┄▶", "       │◀┄┄┄┄┄┄"),
}
_EVENT = "       ●       "
HEADING = f"{'seconds':>{_TIME}}  {'bridge':<{_BRIDGE}} front-end    back-end"


def plain(text: str, style: str) -> str:
    """No colours."""
    return text


class TextTrace:
    """Turns records into lines. ``style`` colours a text as what it is."""

    def __init__(self, style: Style = plain) -> None:
        self._style = style
        self._latencies = Latencies()
        self._first: int | None = None
        self._back_end = ""

    def line(self, entry: Entry) -> str:
        """The line of a record; those before it are known."""
        latency = self._latencies.of(entry)
        if self._first is None:
            self._first = entry.mono
        if entry.kind == "start":
            return self._style(f"--- {start_text(entry)}", "start")
        tone = _tone(entry)
        time = f"{(entry.mono - self._first) / 1e9:{_TIME}.6f}"
        took = f"  ({span(latency)})" if latency is not None else ""
        head = f"{time}  {clean(entry.bridge):<{_BRIDGE}} {_arrow(entry)} "
        text = summary(entry)
        name = title(entry)
        return (
            self._other(entry)
            + head
            + self._style(f"{name:<{_NAME}}" if text or took else name, tone)
            + (f" {text}" if text else "")
            + self._style(took, "quiet")
        ).rstrip()

    # A line that names the back-end, where it is another one than before.
    def _other(self, entry: Entry) -> str:
        other = entry.receiver if entry.sender == "bridge" else entry.sender
        if other in ("", "front-end", self._back_end):
            return ""
        self._back_end = other
        return self._style(f"{'':{_TIME + _BRIDGE + 10}}{clean(other):>12}", "quiet") + "\n"


def _arrow(entry: Entry) -> str:
    if not entry.sender:
        return _EVENT
    out = entry.sender == "bridge"
    other = entry.receiver if out else entry.sender
    side = "front-end" if other == "front-end" else "back-end"
    rightwards = out == (side == "back-end")
    return _ARROWS[side, "reply" if entry.reply else "request"][0 if rightwards else 1]


def _tone(entry: Entry) -> str:
    if entry.failed:
        return "failed"
    if entry.kind == "event":
        return "warning" if entry.name == "warning" else "event"
    return "reply" if entry.reply else entry.kind
