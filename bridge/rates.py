"""How fast vrings go, from what is known of them at two moments or three."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .status import BridgeStatus, VringStatus

#: Between two looks at a vring, in seconds. Its used index has 16 bits and must not go around
#: meanwhile: right for up to 1.3 million requests a second.
SAMPLE = 0.05

_AROUND = 1 << 16


@dataclass(frozen=True, slots=True)
class Rate:
    """What happens in a second; ``None`` where only shadow vrings tell it."""

    requests: float
    bytes: float | None = None
    kicks: float | None = None
    calls: float | None = None


Rates = dict[tuple[str, int], Rate]


def rates(
    first: Sequence[BridgeStatus],
    second: Sequence[BridgeStatus],
    before: Sequence[BridgeStatus] = (),
) -> Rates:
    """By bridge and vring, from two looks that are ``SAMPLE`` apart.

    With a look long ``before``, over the time since that; the two others tell how often the used
    index went around since.
    """
    found: Rates = {}
    short, long = _vrings(first), _vrings(before)
    for key, (bridge, vring) in _vrings(second).items():
        burst = _rate(*short[key], bridge, vring, 0.0) if key in short else None
        whole = None
        if burst is not None and key in long:
            whole = _rate(*long[key], bridge, vring, burst.requests)
        rate = whole or burst
        if rate is not None:
            found[key] = rate
    return found


def _vrings(
    statuses: Sequence[BridgeStatus],
) -> dict[tuple[str, int], tuple[BridgeStatus, VringStatus]]:
    return {(one.name, v.index): (one, v) for one in statuses for v in one.vrings}


# `expected` requests a second tell how often the index went around.
def _rate(
    bridge: BridgeStatus, old: VringStatus, now: BridgeStatus, new: VringStatus, expected: float
) -> Rate | None:
    seconds = now.moment - bridge.moment
    if seconds <= 0 or not new.running:
        return None
    if now.shadow and bridge.shadow:
        names = ("requests", "bytes", "kicks", "calls")
        gone = [(getattr(new, name) - getattr(old, name)) / seconds for name in names]
        return None if min(gone) < 0 else Rate(*gone)  # another daemon since
    if old.used is None or new.used is None:
        return None
    count = (new.used - old.used) % _AROUND
    around = round((expected * seconds - count) / _AROUND)
    return Rate((count + max(0, around) * _AROUND) / seconds)
