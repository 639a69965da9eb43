"""What one process tells the next of a front-end's session, beside descriptors: a CBOR map."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar, get_type_hints

import cbor2

from vhostbridge.backends.errors import StateError

# Raised whenever a fact is added or means something else: who does not know them cuts the front-end
# off, which then connects anew.
FORMAT = 3

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RegionFacts:
    """Guest memory, in bytes; ``fd`` and the like count the descriptors that go along."""

    guest_address: int
    size: int
    user_address: int
    offset: int
    fd: int


@dataclass(frozen=True, slots=True)
class VringFacts:
    """A vring as the front-end described it; ``address`` as in SET_VRING_ADDR."""

    index: int
    size: int
    base: int | None
    address: list[int] | None
    kick: int | None
    call: int | None
    err: int | None
    enabled: bool
    set_up: bool
    running: bool


@dataclass(frozen=True, slots=True)
class Facts:
    """All that is known of a session.

    Attributes:
        began: when this began, in ns of the monotonic clock.
        pause: why the device stands still, if it ran before.
        paused: when that pause began, and since when it stands, in the same ns.
        waits: where the device's state came from (``Origin``), if its vrings have not come yet.
        state: the stream with the device's state; ``None`` if it is RESET.
        log: size and offset in bytes, and the descriptor of the dirty log.
        inflight: size and offset in bytes, vrings, their size, and the descriptor of the in-flight
            buffer.
    """

    format: int
    producer: str
    began: int
    pause: str | None
    paused: list[int] | None
    features: int
    protocol: int
    status: int
    held: bool
    waits: str | None
    socket: int
    reverse: int | None
    state: int | None
    log: list[int] | None
    inflight: list[int] | None
    regions: list[dict[str, Any]]
    vrings: list[dict[str, Any]]


def unusable(why: str) -> StateError:
    """What was left has to be given up."""
    return StateError(
        f"what the process before left of a front-end can't be used: {why}",
        "the front-end is cut off and may connect anew",
    )


def facts_of(data: bytes) -> Facts:
    """Read and check what ``cbor2.dumps`` made of ``asdict(facts)``.

    Raises:
        StateError: they are not exactly the facts that are known here.
    """
    try:
        value = cbor2.loads(data)
    except (cbor2.CBORError, ValueError, RecursionError):
        raise unusable("it is damaged") from None
    known = isinstance(value, Mapping) and value.get("format") == FORMAT
    if not known:
        raise unusable("another version of vhost-bridge wrote it")
    return read_facts(Facts, value)


def read_facts(cls: type[T], value: Any) -> T:
    """Exactly these facts, each of its type; numbers are positive.

    Raises:
        StateError: they are others.
    """
    names = {field.name for field in fields(cls)}  # type: ignore[arg-type]
    if not isinstance(value, Mapping) or value.keys() != names:
        raise unusable(f"its {cls.__name__} are not the ones that are known")
    for name, hint in get_type_hints(cls).items():
        if not _is(value[name], str(hint)):
            raise unusable(f"{name} of its {cls.__name__} is malformed")
    return cls(**value)


def _is(value: object, hint: str) -> bool:
    if "None" in hint and value is None:
        return True
    if hint.startswith("list[dict"):
        return isinstance(value, list)
    if hint.startswith("list[int"):
        return isinstance(value, list) and all(_is(one, "<class 'int'>") for one in value)
    if "bool" in hint:
        return isinstance(value, bool)
    if "str" in hint:
        return isinstance(value, str)
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 128
