"""Events for one follower of the control interface, one reply each."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from typing import NoReturn, Protocol

from vhostbridge.backends.errors import BridgeError

from .events import Event, Events, Kind
from .status import BridgeStatus

#: Followers at a time, of one daemon.
FOLLOWERS = 16


class Followed(Protocol):
    """A bridge, as far as its followers look at it themselves."""

    @property
    def name(self) -> str: ...

    def status(self) -> BridgeStatus: ...


def event_report(event: Event) -> dict[str, object]:
    """The object of type ``Event`` in the interface's definition."""
    return {
        "time": event.time,
        "bridge": event.bridge,
        "event": str(event.kind),
        "text": event.text,
        "details": dict(event.details),
    }


async def follow(
    events: Events,
    bridges: Iterable[Followed],
    names: Collection[str],
    tell: Callable[[Mapping[str, object]], Awaitable[None]],
) -> NoReturn:
    """Tell the states of ``bridges``, and then what happens to ``names`` (or to all), for ever.

    Raises:
        BridgeError: too many follow already.
    """
    if events.followers >= FOLLOWERS:
        raise BridgeError(
            f"{FOLLOWERS} followers of events are all that a daemon has", "end one of them"
        )
    with events.follow(names) as follower:
        for bridge in bridges:
            state = bridge.status().state
            details = {"state": state, "before": state, "failure": ""}
            await tell({"event": event_report(Event(bridge.name, Kind.STATE, state, details))})
        while True:
            await tell({"event": event_report(await follower.next())})
