"""What happens to the bridges of one daemon, told to whoever follows it.

Telling never waits. Each follower has a queue of limited length; one that is too slow for it loses
events, and is told how many.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum

import trio

_log = logging.getLogger("vhostbridge.events")

#: Events that wait for one follower; more are lost.
QUEUE = 1000


class Kind(StrEnum):
    """What can happen."""

    STATE = "state"
    PAUSE = "pause"
    FRONT_END_CONNECTED = "front-end-connected"
    FRONT_END_LEFT = "front-end-left"
    BACK_END_READY = "back-end-ready"
    BACK_END_FAILED = "back-end-failed"
    SHADOW_ON = "shadow-on"
    SHADOW_OFF = "shadow-off"
    DIRTY_LOG_ON = "dirty-log-on"
    DIRTY_LOG_OFF = "dirty-log-off"
    VRING_BROKEN = "vring-broken"
    SWITCHED = "switched"
    LOADED = "loaded"
    SAVED = "saved"
    BRIDGE_ADDED = "bridge-added"
    BRIDGE_REMOVED = "bridge-removed"
    RELOADED = "reloaded"
    ERROR = "error"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened.

    Attributes:
        bridge: to which bridge; empty for the daemon itself.
        kind: what, one of ``Kind``; a newer daemon may have others.
        text: what, for people, in a few words.
        details: the same for programs, depending on ``kind``: JSON's own types only.
        time: when, in seconds since 1970.
    """

    bridge: str
    kind: str
    text: str
    details: Mapping[str, object] = field(default_factory=dict)
    time: float = field(default_factory=time.time)


class Follower:
    """The events that one follower has not taken yet."""

    def __init__(self, bridges: Collection[str], limit: int) -> None:
        self._bridges = bridges
        self._limit = limit
        self._queue: deque[Event] = deque()
        self._lost = 0
        self._news = trio.Event()

    def put(self, event: Event) -> None:
        """Append an event, unless it is of no interest or there is no room."""
        if self._bridges and event.bridge and event.bridge not in self._bridges:
            return
        if len(self._queue) >= self._limit:
            self._lost += 1
            return
        self._tell_lost()
        self._queue.append(event)
        self._news.set()

    # Where they would have been.
    def _tell_lost(self) -> None:
        if self._lost:
            text = f"{self._lost} events lost, this follower is too slow"
            self._queue.append(Event("", Kind.LOST, text, {"count": self._lost}))
            self._lost = 0

    async def next(self) -> Event:
        """The next event; waits for it."""
        while not self._queue:
            self._tell_lost()
            if not self._queue:
                self._news = trio.Event()
                await self._news.wait()
        return self._queue.popleft()


class Events:
    """The followers of one daemon."""

    def __init__(self) -> None:
        self._followers: set[Follower] = set()

    @property
    def followers(self) -> int:
        """How many there are."""
        return len(self._followers)

    def tell(self, event: Event) -> None:
        """Tell all followers. Only from the event loop's thread."""
        for follower in self._followers:
            follower.put(event)
        whose = event.bridge or "daemon"
        _log.debug("%s: %s: %s", whose, event.kind, event.text, extra={"event": event})

    @contextmanager
    def follow(self, bridges: Collection[str] = (), limit: int = QUEUE) -> Iterator[Follower]:
        """Follow some bridges, or all, and the daemon itself, for the block's length."""
        follower = Follower(bridges, limit)
        self._followers.add(follower)
        try:
            yield follower
        finally:
            self._followers.discard(follower)
