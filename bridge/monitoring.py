"""Following what happens to bridges, from outside their daemons. It blocks."""

from __future__ import annotations

import selectors
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from vhostbridge.backends.errors import TargetError, TransportLost

from .control_client import ControlClient, control_sockets, daemon_of
from .events import Event, Kind


class Monitor:
    """The events of several daemons, in the order in which they come."""

    def __init__(self, names: Sequence[str], control: Path | None) -> None:
        """Begin to follow the bridges ``names``, or all that there are.

        Raises:
            BridgeError: there is no such bridge, or no daemon.
        """
        with ExitStack() as stack:
            self._waiting = stack.enter_context(selectors.DefaultSelector())
            for client, chosen in _daemons(names, control, stack):
                client.start("Monitor", names=chosen or None)
                self._waiting.register(client, selectors.EVENT_READ)
            self._stack = stack.pop_all()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def events(self, seconds: float | None = None) -> Iterator[Event]:
        """Events as they come, until ``seconds`` have passed; for ever if they are ``None``.

        Raises:
            TransportLost: the last daemon has gone.
            BridgeError: what a daemon answered.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready = self._waiting.select(left)
            for key, _ in ready:
                assert isinstance(key.fileobj, ControlClient)
                yield from self._taken(key.fileobj)
            if not ready and deadline is not None and time.monotonic() >= deadline:
                return

    def _taken(self, client: ControlClient) -> Iterator[Event]:
        try:
            yield _event(client.take().parameters)
            while client.pending:
                yield _event(client.take().parameters)
        except TransportLost as error:
            self._waiting.unregister(client)
            if not self._waiting.get_map():
                raise TransportLost(f"no daemon is left: {error.message}") from None
            yield Event("", Kind.ERROR, error.message)


# Each daemon once, with the bridges of it that are meant; none of them are all.
def _daemons(
    names: Sequence[str], control: Path | None, stack: ExitStack
) -> Iterator[tuple[ControlClient, list[str]]]:
    found: dict[Path, tuple[ControlClient, list[str]]] = {}
    for name in names:
        client = stack.enter_context(daemon_of(name, control))
        found.setdefault(client.path, (client, []))[1].append(name)
    for path in [] if names else control_sockets() if control is None else [control]:
        try:
            found[path] = stack.enter_context(ControlClient(path)), []
        except TargetError:  # of a daemon that died
            if control is not None:
                raise
    if not found:
        raise TargetError("no daemon runs that this user may control", "--control PATH names one")
    return iter(found.values())


def _event(message: Mapping[str, Any]) -> Event:
    told = message["event"]
    return Event(told["bridge"], told["event"], told["text"], dict(told["details"]), told["time"])
