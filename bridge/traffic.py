"""What passed through a bridge's shadow vrings in all, although these come and go."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .shadow_rings import ShadowRings


@dataclass(frozen=True, slots=True)
class Count:
    """What passed through one vring: requests, bytes of their buffers, and notifications."""

    requests: int = 0
    bytes: int = 0
    kicks: int = 0
    calls: int = 0

    def plus(self, other: Count, sign: int = 1) -> Count:
        """Both together; with -1, this without the other."""
        return Count(*(getattr(self, f.name) + sign * getattr(other, f.name) for f in fields(self)))


class Traffic:
    """Counts by vring, as long as the bridge lives. They never go back."""

    def __init__(self) -> None:
        self._past: dict[int, Count] = {}
        self._rings: ShadowRings | None = None
        # What was counted before these came here: with another device, before a crash.
        self._before: dict[int, Count] = {}

    def begin(self, rings: ShadowRings) -> None:
        """Requests pass through these now."""
        self._rings = rings
        self._before = {index: _count(rings, index) for index in rings.vrings}

    def end(self, rings: ShadowRings) -> None:
        """They don't any more; called while these are still there."""
        if rings is self._rings:
            self._past = self.counts()
            self._rings, self._before = None, {}

    def counts(self) -> dict[int, Count]:
        """What passed through each vring that was ever a shadow one."""
        counts = dict(self._past)
        if self._rings is not None:
            for index in self._rings.vrings:
                new = _count(self._rings, index).plus(self._before[index], -1)
                counts[index] = counts.get(index, Count()).plus(new)
        return counts

    def in_flight(self, index: int) -> int | None:
        """Requests of a shadow vring that the device has now; ``None`` if it is none."""
        if self._rings is None or index not in self._rings.vrings:
            return None
        return self._rings.stats(index).inflight


def _count(rings: ShadowRings, index: int) -> Count:
    stats = rings.stats(index)
    return Count(stats.requests, stats.bytes, stats.kicks, stats.calls)
