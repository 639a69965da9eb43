"""How long a device that ran stood still, how often, in which phases and why."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Reason(StrEnum):
    """Why a device paused."""

    #: it was moved to another back-end
    SWITCH = "switch"
    #: somebody asked for it: suspend, and what follows
    OPERATOR = "operator"
    #: a dirty log was turned on or off
    MIGRATION = "migration"
    #: guest memory changed under it
    MEMORY = "memory"
    #: the front-end stopped it, or set it up anew
    FRONT_END = "front-end"
    #: the back-end went away
    FAILURE = "failure"
    #: the daemon was restarted
    RESTART = "restart"


@dataclass(frozen=True, slots=True)
class Pause:
    """One time in which no request was processed.

    Attributes:
        at: when it began, in seconds since 1970.
        phases: its parts in seconds: ``suspend`` until the device stood still, ``state`` while it
            did, ``resume`` until it ran again.
    """

    reason: str
    at: float
    phases: Mapping[str, float]

    @property
    def seconds(self) -> float:
        return sum(self.phases.values())

    @property
    def told(self) -> str:
        """How long, and in which parts, for people."""
        parts = ", ".join(f"{name} {took * 1000:.1f}" for name, took in self.phases.items())
        return f"{self.seconds * 1000:.1f} ms ({parts})"


@dataclass(slots=True)
class Tally:
    """All pauses of one reason; ``seconds`` and ``phases`` are sums."""

    count: int = 0
    seconds: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)
    last: Pause | None = None
    longest: Pause | None = None

    def add(self, pause: Pause) -> None:
        self.count += 1
        self.seconds += pause.seconds
        for name, took in pause.phases.items():
            self.phases[name] = self.phases.get(name, 0.0) + took
        self.last = pause
        if self.longest is None or pause.seconds > self.longest.seconds:
            self.longest = pause


@dataclass(slots=True)
class Begun:
    """A pause that has not ended; times are those of the clock of ``Pauses``."""

    reason: str
    began: float
    stopped: float
    starting: float | None = None

    def phases(self, now: float) -> dict[str, float]:
        starting = now if self.starting is None else self.starting
        return {
            "suspend": self.stopped - self.began,
            "state": starting - self.stopped,
            "resume": now - starting,
        }


class Pauses:
    """The pauses of one bridge. Times are those of ``clock``, in seconds."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time
    ) -> None:
        self._clock = clock
        self._wall = wall
        #: The one that has not ended.
        self.begun: Begun | None = None
        #: By reason.
        self.tallies: dict[str, Tally] = {}

    @property
    def open(self) -> bool:
        """Whether the device pauses now."""
        return self.begun is not None

    @property
    def current(self) -> Pause | None:
        """The pause that has not ended, as long as it is so far."""
        return None if self.begun is None else self._pause(self.begun, self._clock())

    def _pause(self, begun: Begun, now: float) -> Pause:
        at = self._wall() - (self._clock() - begun.began)
        return Pause(begun.reason, at, begun.phases(now))

    def begin(self, reason: str, began: float, stopped: float) -> None:
        """A device that ran stands still since ``stopped``; that took since ``began``."""
        if self.begun is None:
            self.begun = Begun(reason, began, stopped)

    def starting(self, now: float | None) -> None:
        """It is being started again, since ``now``; ``None``: not yet after all."""
        if self.begun is not None:
            self.begun.starting = now

    def end(self, now: float) -> Pause | None:
        """It runs again; the pause, if there was one."""
        if self.begun is None:
            return None
        pause = self._pause(self.begun, now)
        self.begun = None
        self.tallies.setdefault(pause.reason, Tally()).add(pause)
        return pause

    def drop(self) -> None:
        """It will not run again for the one who waits: this was no pause."""
        self.begun = None
