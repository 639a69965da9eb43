"""What a bridge says and does, told to a trace as it happens: the side that tells.

Each bridge has a ``Tracer``. While nobody writes a trace it is off, and what is traced costs one
look at ``on``. Otherwise records go to the writer's queue as a function and its arguments; its
thread turns them into text. So arguments are what nobody changes any more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from enum import IntFlag

#: What a record says besides its times and its bridge; see docs/tracing.md.
Record = Mapping[str, object]
#: Makes records. Its first argument is the virtio device id, or ``None`` where that is unknown.
Describe = Callable[..., Iterable[Record]]
#: Monotonic and wall clock in nanoseconds, bridge, device id, and what describes it.
Item = tuple[int, int, str, int | None, Describe, tuple[object, ...]]


class Tracer:
    """Where one bridge's records go. Any thread may use it.

    Attributes:
        on: whether anybody writes them; who traces asks first.
        bridge: the bridge's name.
        device_id: the virtio device type, by which feature bits get names.
    """

    __slots__ = ("_put", "bridge", "device_id", "on")

    def __init__(self, bridge: str = "") -> None:
        self.bridge = bridge
        self.device_id: int | None = None
        self.on = False
        self._put: Callable[[Item], None] = _nowhere

    def attach(self, put: Callable[[Item], None]) -> None:
        """Hand records to ``put`` from now on; it must not block."""
        self._put, self.on = put, True

    def detach(self) -> None:
        self.on = False
        self._put = _nowhere

    def record(self, describe: Describe, *args: object, began: int = 0) -> None:
        """Tell what ``describe`` makes of ``args``; it happened now, or at ``began``.

        ``began`` is a reading of ``time.monotonic_ns``.
        """
        now = time.monotonic_ns()
        at = began or now
        self._put((at, time.time_ns() - (now - at), self.bridge, self.device_id, describe, args))

    def event(self, event: str, **fields: object) -> None:
        """Tell what the bridge does; fields are text and numbers."""
        if self.on:
            self.record(_event, event, fields)


def bit_names(flags: type[IntFlag], value: int) -> list[str]:
    """The names of the bits that are set, lowest first; ``bit_N`` for one that has none."""
    names = {flag.value: flag.name or "" for flag in flags}
    bits = [bit for bit in range(value.bit_length()) if value >> bit & 1]
    return [names.get(1 << bit) or f"bit_{bit}" for bit in bits]


def _nowhere(item: Item) -> None:
    pass


def _event(device_id: int | None, name: str, fields: Mapping[str, object]) -> Iterable[Record]:
    yield {"kind": "event", "name": name, "fields": fields}


#: For what belongs to no bridge; never on.
OFF = Tracer()
