"""A device's life: its states, what may be asked in each, and by what means it does things.

The lifecycle is a table, and only this file decides by it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, IntFlag
from types import MappingProxyType

from .errors import InvalidTransition


class State(Enum):
    """Where a device is in its life."""

    #: status 0; nothing negotiated
    RESET = "reset"
    #: features, memory and vrings set; nothing runs
    CONFIGURED = "configured"
    #: vrings are processed
    RUNNING = "running"
    #: frozen, all state kept
    SUSPENDED = "suspended"
    #: DEVICE_NEEDS_RESET or a transport error
    FAILED = "failed"
    #: gone
    CLOSED = "closed"


class Status(IntFlag):
    """The virtio device status byte (virtio 1.4, section 2.1)."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    NEEDS_RESET = 64
    FAILED = 128


class Verb(Enum):
    """What one can ask of a device."""

    CONFIGURE = "configure"
    START = "start"
    SUSPEND = "suspend"
    RESUME = "resume"
    SAVE = "save"
    LOAD = "load"
    RESET = "reset"
    CLOSE = "close"


# fmt: off
TRANSITIONS: Mapping[State, Mapping[Verb, State]] = MappingProxyType({
    State.RESET: {
        Verb.CONFIGURE: State.CONFIGURED, Verb.LOAD: State.SUSPENDED,
        Verb.RESET: State.RESET, Verb.CLOSE: State.CLOSED,
    },
    State.CONFIGURED: {
        Verb.CONFIGURE: State.CONFIGURED, Verb.START: State.RUNNING, Verb.LOAD: State.SUSPENDED,
        Verb.RESET: State.RESET, Verb.CLOSE: State.CLOSED,
    },
    State.RUNNING: {
        Verb.SUSPEND: State.SUSPENDED, Verb.RESET: State.RESET, Verb.CLOSE: State.CLOSED,
    },
    State.SUSPENDED: {
        Verb.SUSPEND: State.SUSPENDED, Verb.RESUME: State.RUNNING, Verb.SAVE: State.SUSPENDED,
        Verb.LOAD: State.SUSPENDED, Verb.RESET: State.RESET, Verb.CLOSE: State.CLOSED,
    },
    State.FAILED: {Verb.RESET: State.RESET, Verb.CLOSE: State.CLOSED},
    State.CLOSED: {Verb.CLOSE: State.CLOSED},
})
# fmt: on


def step(state: State, verb: Verb) -> State:
    """The state after ``verb``.

    Raises:
        InvalidTransition: the table has no such step; the message names what is allowed.
    """
    try:
        return TRANSITIONS[state][verb]
    except KeyError:
        allowed = ", ".join(v.value for v in TRANSITIONS[state])
        raise InvalidTransition(
            f"cannot {verb.value} a device that is {state.value}", f"allowed now: {allowed}"
        ) from None


class How(Enum):
    """By what means a device does something."""

    NATIVE = "native"
    EMULATED = "emulated"
    NO = "no"


@dataclass(frozen=True, slots=True)
class Ability:
    """How one thing is done, and why it is done so or can't be."""

    how: How
    why: str

    def __bool__(self) -> bool:
        return self.how is not How.NO


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a device can do and how; errors quote it, ``inspect`` prints it."""

    suspend: Ability
    resume: Ability
    save: Ability
    load: Ability
    inflight: Ability
    dirty_log: Ability
    memory_hotplug: Ability
    vring_stop: Ability
