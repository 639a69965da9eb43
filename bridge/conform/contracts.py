"""The contracts: each a sentence of the model, and the check that tries a device on it."""

from __future__ import annotations

import difflib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from vhostbridge.backends.errors import ConfigError

from . import keeping, running
from .bench import Bench


@dataclass(frozen=True, slots=True)
class Contract:
    """One row of the table. ``needs`` names the capabilities without which it isn't offered."""

    name: str
    statement: str
    check: Callable[[Bench], Awaitable[None]]
    needs: tuple[str, ...] = ()
    needs_requests: bool = False


_SUSPEND, _RESUME = ("suspend",), ("suspend", "resume")

# fmt: off
CONTRACTS = (
    Contract(
        "requests-complete",
        "A running device completes each available request once (virtio 1.4, 2.7.8).",
        running.requests_complete, needs_requests=True,
    ),
    Contract(
        "suspend-stops",
        "When suspend returns, no descriptor is read, no used entry, buffer or log bit is "
        "written, no interrupt and no config-change notification is sent.",
        running.suspend_stops, _RESUME,
    ),
    Contract(
        "suspend-completes",
        "Requests that were in flight at suspend are complete, or listed in the state.",
        running.suspend_completes, _RESUME,
    ),
    Contract("suspend-twice", "suspend is idempotent.", running.suspend_twice, _RESUME),
    Contract(
        "resume-continues", "resume goes on exactly where it stopped.",
        running.resume_continues, _RESUME,
    ),
    Contract(
        "kick-kept", "Kicks that arrive while it is suspended are not lost.",
        running.kick_kept, _RESUME, needs_requests=True,
    ),
    Contract(
        "call-after-resume",
        "Interrupts are not lost: with resume every vring is signalled, and later used entries "
        "are again.",
        running.call_after_resume, _RESUME, needs_requests=True,
    ),
    Contract(
        "save-twice", "save changes nothing; twice gives the same state.",
        keeping.save_twice, (*_RESUME, "save"),
    ),
    Contract(
        "internal-state-twice",
        "save changes nothing; twice gives the same internal state.",
        keeping.internal_twice, (*_RESUME, "save"),
    ),
    Contract(
        "load-continues",
        "After load the device is SUSPENDED, and running it goes on where the state was saved.",
        keeping.load_continues, (*_SUSPEND, "save", "load"),
    ),
    Contract(
        "internal-state-loads",
        "The internal state that was saved loads into the device after a reset.",
        keeping.internal_loads, (*_SUSPEND, "save", "load"),
    ),
    Contract(
        "illegal-refused",
        "Every transition that the lifecycle lacks is refused, and changes nothing.",
        keeping.transitions, (*_RESUME, "save"),
    ),
    Contract(
        "reset-running", "reset: any state becomes RESET; everything is lost.",
        keeping.reset_running, _SUSPEND,
    ),
    Contract(
        "reset-suspended", "reset: everything is lost, SUSPENDED included.",
        keeping.reset_suspended, _SUSPEND,
    ),
    Contract(
        "config-change-held",
        "While it is suspended no configuration change notification is sent.",
        keeping.config_change_held, _SUSPEND,
    ),
    Contract(
        "base-wraps",
        "A vring starts at the base it is given; the base runs freely through 65535.",
        keeping.base_wraps, _RESUME,
    ),
    Contract(
        "other-ring-size",
        "A suspended device whose set-up changed restarts with the new one.",
        keeping.other_ring_size, _SUSPEND,
    ),
    Contract(
        "vring-stops",
        "A vring stops alone: all its requests are complete, and running it lets it go on.",
        keeping.vring_stops, (*_SUSPEND, "vring_stop"),
    ),
)
# fmt: on


def named(names: Sequence[str]) -> Sequence[Contract]:
    """The contracts of those names in the table's order; all if there are none.

    Raises:
        ConfigError: there is no contract of a name.
    """
    known = [contract.name for contract in CONTRACTS]
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            raise ConfigError(
                f"there is no contract {name!r}",
                f"did you mean {close[0]}?" if close else f"contracts are {', '.join(known)}",
            )
    return [contract for contract in CONTRACTS if contract.name in names or not names]
