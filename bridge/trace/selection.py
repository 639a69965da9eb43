"""Which records of a trace are wanted."""

from __future__ import annotations

import re
from collections.abc import Collection
from datetime import UTC, datetime

from vhostbridge.backends.errors import ConfigError

from .entry import Entry
from .words import clean

_SECONDS = re.compile(r"\d{1,9}(\.\d{1,9})?\Z")


class Selection:
    """Tells of a stream of records which ones are wanted."""

    def __init__(self, bridge: str | None, since: str | None, only: Collection[str]) -> None:
        """Those of a bridge, from a time on, of some kinds; nothing given is everything.

        Raises:
            ConfigError: ``since`` is no time.
        """
        self._bridge = bridge
        self._since = None if since is None else _Since(since)
        self._only = set(only)
        self._others: set[str] = set()
        #: Whether there was anything of the bridge.
        self.matched = False

    @property
    def known(self) -> str:
        """The bridges that were seen, for people."""
        names = ", ".join(sorted(self._others)[:10])
        return f"the trace has: {names}" if names else "it has none"

    def has(self, entry: Entry) -> bool:
        """Whether a record is wanted; beginnings are, and what belongs to no bridge."""
        late = self._since is None or self._since.reached(entry)
        if entry.kind == "start":
            return True
        if self._bridge is not None and entry.bridge:
            if entry.bridge != self._bridge:
                if len(self._others) < 100:
                    self._others.add(clean(entry.bridge))
                return False
            self.matched = True
        return late and (not self._only or entry.kind in self._only)


class _Since:
    def __init__(self, text: str) -> None:
        self._text = text
        self._wall: int | None = None
        self._first: int | None = None
        self._seconds: float | None = None
        if _SECONDS.match(text):
            self._seconds = float(text)
        else:
            self._at(datetime.now(UTC))

    def reached(self, entry: Entry) -> bool:
        if self._first is None:
            self._first = entry.mono
            if self._seconds is None:
                self._wall = self._at(_day(entry.wall))
        if self._seconds is not None:
            return entry.mono - self._first >= self._seconds * 1e9
        return self._wall is not None and entry.wall >= self._wall

    # Nanoseconds since 1970 of what was asked, with the day of ``day`` where none was named.
    def _at(self, day: datetime) -> int:
        try:
            if "T" in self._text:
                at = datetime.fromisoformat(self._text)
            else:
                at = datetime.fromisoformat(f"{day:%Y-%m-%d}T{self._text}")
            return int((at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp() * 1e9)
        except (ValueError, OverflowError):
            raise ConfigError(
                f"{self._text!r} is no time", "seconds (12.5), 14:03:07 or 2026-11-25T14:03:07"
            ) from None


def _day(wall: int) -> datetime:
    try:
        return datetime.fromtimestamp(wall // 10**9, UTC)
    except (OverflowError, ValueError, OSError):
        return datetime.fromtimestamp(0, UTC)
