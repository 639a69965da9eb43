"""A sequence diagram as rows and lanes, for whoever draws it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from vhostbridge.backends.errors import ConfigError, TargetError

from .entry import Entry
from .words import Latencies, clean, details, moment, span, start_text, summary, title

#: More makes no picture.
MOST = 20_000
# A silence that is worth a line, in nanoseconds.
SILENCE = 100_000_000
# How many of the slowest are named, and what is slow at all.
SLOWEST, SLOW = 8, 1_000_000


@dataclass(frozen=True, slots=True)
class Lane:
    """One party: what it is, and which one."""

    name: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the picture.

    Attributes:
        number: counts from 1; 0 for a silence.
        kind: "message", "ioctl", "event", "start" or "silence".
        time: since the first record, in seconds, as text.
        source, target: indices of lanes; equal where nobody speaks.
        reply: whether it answers something.
        tone: "failed", "warning" or nothing.
        details: every field, by name.
    """

    number: int
    kind: str
    time: str
    source: int
    target: int
    name: str
    text: str = ""
    took: str = ""
    reply: bool = False
    tone: str = ""
    details: tuple[tuple[str, str], ...] = ()

    @property
    def kinds(self) -> list[str]:
        """What it is, for a style sheet."""
        return [kind for kind in (self.kind, "reply" if self.reply else "", self.tone) if kind]


@dataclass(slots=True)
class Diagram:
    """All that there is to draw."""

    lanes: list[Lane]
    rows: list[Row] = field(default_factory=list)
    #: What wrote the trace, when, and how much there is of it.
    facts: list[str] = field(default_factory=list)
    #: The rows that took longest, the longest first.
    slowest: list[Row] = field(default_factory=list)


BRIDGE = 1


def diagram(entries: Iterable[Entry]) -> Diagram:
    """The picture of records of one bridge.

    Raises:
        ConfigError: they are of several.
        TargetError: there are none, or too many.
    """
    return _Maker().make(entries)


class _Maker:
    def __init__(self) -> None:
        self._lanes = {"front-end": 0, "bridge": BRIDGE}
        self._bridges: set[str] = set()
        self._latencies = Latencies()
        self._first = self._last = 0
        self._took: list[tuple[int, Row]] = []
        self._counts: dict[str, int] = {}
        self._facts: list[str] = []
        self._rows: list[Row] = []

    def make(self, entries: Iterable[Entry]) -> Diagram:
        for entry in entries:
            self._add(entry)
        if not self._counts.keys() - {"start"}:
            raise TargetError("nothing to draw: no record was selected")
        if len(self._bridges) > 1:
            names = ", ".join(sorted(self._bridges)[:10])
            raise ConfigError(f"a picture is of one bridge, the trace has {names}", "--bridge NAME")
        counts = ", ".join(f"{n} {kind}s" for kind, n in self._counts.items() if kind != "start")
        length = span(self._last - self._first)
        name = next(iter(self._bridges), "")
        facts = [f"bridge {name}"] if name else []
        slowest = sorted(self._took, key=lambda one: -one[0])[:SLOWEST]
        return Diagram(
            lanes=[_lane(name) for name in self._lanes],
            rows=self._rows,
            facts=[*facts, *self._facts, f"{counts} in {length}"],
            slowest=[row for took, row in slowest if took >= SLOW],
        )

    def _add(self, entry: Entry) -> None:
        if len(self._rows) >= MOST:
            raise TargetError(
                f"more than {MOST} records make no picture", "--since, --only and --bridge select"
            )
        if not self._rows:
            self._first = self._last = entry.mono
        if entry.mono - self._last > SILENCE:
            self._silence(entry.mono - self._last)
        # Of calls in several threads one that began earlier may end, and be told, later.
        self._last = max(self._last, entry.mono + entry.duration)
        if entry.bridge:
            self._bridges.add(clean(entry.bridge))
        if entry.kind == "start" and len(self._facts) < 5:
            self._facts.append(start_text(entry))
        self._counts[entry.kind] = self._counts.get(entry.kind, 0) + 1
        latency = self._latencies.of(entry)
        row = self._row(entry, latency)
        self._rows.append(row)
        if latency is not None:
            self._took.append((latency, row))

    def _silence(self, length: int) -> None:
        self._rows.append(Row(0, "silence", "", BRIDGE, BRIDGE, span(length)))

    def _row(self, entry: Entry, latency: int | None) -> Row:
        tone = "failed" if entry.failed else "warning" if entry.name == "warning" else ""
        begins = entry.kind == "start"
        return Row(
            number=sum(self._counts.values()),
            kind=entry.kind,
            time=f"{(entry.mono - self._first) / 1e9:.6f}",
            source=self._lane(entry.sender),
            target=self._lane(entry.receiver),
            name="the trace begins" if begins else "" if entry.name == "info" else title(entry),
            text=moment(entry.wall) if begins else summary(entry, flags=False),
            took="" if latency is None else span(latency),
            reply=entry.reply,
            tone=tone,
            details=tuple(details(entry)),
        )

    def _lane(self, name: str) -> int:
        return self._lanes.setdefault(name or "bridge", len(self._lanes))


def _lane(name: str) -> Lane:
    if name in ("front-end", "bridge"):
        return Lane(name)
    if name.startswith("/dev/vhost-vdpa"):
        return Lane("kernel", clean(name))
    kind, _, target = name.partition(" ")
    return Lane(clean(kind), clean(target)) if target else Lane("back-end", clean(name))
