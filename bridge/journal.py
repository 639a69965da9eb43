"""What happened to one bridge: its pauses, what it counts, and the events that it tells.

The device's operations are watched from outside: each says where the device is before and after.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from vhostbridge.backends.lifecycle import State
from vhostbridge.backends.trace import OFF, Tracer

from .events import Event, Events, Kind
from .pauses import Pauses, Reason
from .traffic import Traffic

#: What a pause is for that begins in one of these operations, where nothing else is known.
_REASONS = {"log_writes": Reason.MIGRATION, "set_memory": Reason.MEMORY}


# The others are in the log, or told by the device itself.
_TRACED = {
    *(Kind.PAUSE, Kind.SHADOW_ON, Kind.SHADOW_OFF, Kind.DIRTY_LOG_ON, Kind.DIRTY_LOG_OFF),
    *(Kind.VRING_BROKEN, Kind.SAVED),
}


class Watched(Protocol):
    """A device, as far as it is looked at here."""

    @property
    def state(self) -> State: ...

    @property
    def failure(self) -> str: ...

    @property
    def starts(self) -> int: ...

    @property
    def shadow(self) -> str:
        """Why requests pass through shadow vrings; empty if they don't."""

    @property
    def logged_by(self) -> str:
        """By what means writes are logged now; empty if they are not."""


class Journal:
    """The record of one bridge, which lives as long as it does."""

    def __init__(
        self,
        name: str = "",
        events: Events | None = None,
        clock: Callable[[], float] = time.monotonic,
        trace: Tracer = OFF,
    ) -> None:
        self.name = name
        self.pauses = Pauses(clock)
        self.traffic = Traffic()
        #: How often something happened, by its kind.
        self.counts: dict[Kind, int] = {}
        #: When the device came to its state, in seconds since 1970.
        self.since = time.time()
        #: When its front-end came.
        self.front_end_since: float | None = None
        self._events = events or Events()
        self._trace = trace
        self._clock = clock
        self._device: Watched | None = None
        self._told = (State.CLOSED, "", "")
        # Of the operations on a device, which may need each other.
        self._depth = 0
        self._verb = ""
        self._began = 0.0
        self._ran = False
        self._reason: Reason | None = None

    def tell(self, kind: Kind, text: str, **details: object) -> None:
        """Something happened, now."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        self._events.tell(Event(self.name, kind, text, details))
        if kind in _TRACED:
            self._trace.event(kind.value, text=text, **details)

    @contextmanager
    def because(self, reason: Reason) -> Iterator[None]:
        """Pauses that begin in the block are for this reason."""
        before = self._reason
        self._reason = before or reason
        try:
            yield
        finally:
            self._reason = before

    # The device

    def watch(self, device: Watched | None) -> None:
        """This is the bridge's device from now on; ``None``: there is none at the moment."""
        self._device = device
        self._look()

    @contextmanager
    def operation(self, device: Watched, verb: str) -> Iterator[None]:
        """An operation on a device, which may be one that a switch prepares."""
        now = self._clock()
        outermost = self._depth == 0
        starts = device.starts
        if outermost:
            self._verb, self._began, self._ran = verb, now, device.state is State.RUNNING
        if verb == "run":
            self.pauses.starting(now)
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            self._after(device, verb, outermost, again=device.starts != starts)

    def _after(self, device: Watched, verb: str, outermost: bool, *, again: bool) -> None:
        now = self._clock()
        if device.state is State.SUSPENDED:
            if self._ran:
                self.pauses.begin(self._because(), self._began, now)
                self._ran = False
            self.pauses.starting(None if outermost else now)
        elif device.state is State.RUNNING and outermost:
            if self._ran and again:  # it stopped and went on by itself
                self.pauses.begin(self._because(), self._began, self._began)
                self.pauses.starting(now)
            self._end_pause(now)
        elif verb == "reset" and device is self._device:
            self.pauses.drop()
        if outermost:
            self._look()

    def _because(self) -> Reason:
        return self._reason or _REASONS.get(self._verb, Reason.FRONT_END)

    def _end_pause(self, now: float) -> None:
        pause = self.pauses.end(now)
        if pause is not None:
            self.tell(
                Kind.PAUSE,
                f"{pause.reason}, {pause.told}",
                reason=pause.reason,
                seconds=pause.seconds,
                phases=dict(pause.phases),
            )

    # Tells what is not as it was told last.
    def _look(self) -> None:
        device = self._device
        before, was_shadow, was_logging = self._told
        state, shadow, logging = State.CLOSED, was_shadow, was_logging
        if device is not None:
            state, shadow, logging = device.state, device.shadow, device.logged_by
        self._told = state, shadow, logging
        if state is not before:
            self.since = time.time()
            failure = device.failure if device is not None else ""
            text = f"{state.value}, {failure}" if failure else state.value
            self.tell(Kind.STATE, text, state=state.value, before=before.value, failure=failure)
        if bool(shadow) != bool(was_shadow):
            self.tell(Kind.SHADOW_ON if shadow else Kind.SHADOW_OFF, shadow, why=shadow)
        if bool(logging) != bool(was_logging):
            self.tell(Kind.DIRTY_LOG_ON if logging else Kind.DIRTY_LOG_OFF, logging, by=logging)

    def failed(self, backend: str, failure: str) -> None:
        """The device is FAILED; another one may go on where it was."""
        now = self._clock()
        if self._told[0] is State.RUNNING:
            self.pauses.begin(Reason.FAILURE, now, now)
        self._look()
        self.tell(Kind.BACK_END_FAILED, f"{backend}: {failure}", backend=backend, why=failure)

    # The front-end

    def front_end_came(self, pid: int) -> None:
        self.front_end_since = time.time()
        self.tell(Kind.FRONT_END_CONNECTED, f"pid {pid}", pid=pid)

    def front_end_left(self, pid: int) -> None:
        self.front_end_since = None
        self.pauses.drop()
        self.tell(Kind.FRONT_END_LEFT, f"pid {pid}", pid=pid)


P = ParamSpec("P")
T = TypeVar("T")


class _Journaled(Watched, Protocol):
    @property
    def journal(self) -> Journal: ...


D = TypeVar("D", bound=_Journaled)


def journaled(
    method: Callable[Concatenate[D, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[D, P], Coroutine[Any, Any, T]]:
    """Note an operation of a device in its journal."""

    @functools.wraps(method)
    async def run(self: D, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with self.journal.operation(self, method.__name__):
            return await method(self, *args, **kwargs)

    return run
