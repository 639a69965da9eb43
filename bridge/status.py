"""What is known of a running bridge at one moment, and its form on the control socket."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from .pauses import Pause, Tally


@dataclass(frozen=True, slots=True)
class VringStatus:
    """One vring, as the device, guest memory and the bridge tell of it.

    Attributes:
        base: the device's position, encoded as vhost has it; ``None`` unless it is suspended.
        available, used: the indices in guest memory; ``None`` where they can't be read.
        problem: a disagreement between them, such as "used index 7 ≠ base 9"; empty if none.
        in_flight: requests that were made and not answered; ``None`` where nothing tells.
        requests, bytes, kicks, calls: what has passed through it while it was a shadow vring.
    """

    index: int
    size: int
    running: bool
    enabled: bool
    packed: bool
    base: int | None
    available: int | None
    used: int | None
    problem: str = ""
    in_flight: int | None = None
    requests: int = 0
    bytes: int = 0
    kicks: int = 0
    calls: int = 0


@dataclass(frozen=True, slots=True)
class BridgeStatus:
    """One bridge.

    Attributes:
        listen: where its front-end comes from.
        device: the name of the virtio device type, ``None`` where nothing tells it.
        state: the lifecycle state of the device.
        failure: why it failed; empty unless it has.
        held: the operator suspended it; the front-end can't start it.
        incoming: a state waits for a front-end.
        kept: it is the one that the front-end before left.
        front_end: the pid of the front-end that is connected.
        backend_pid: the process that the bridge started as its back-end; ``None`` for none.
        features: what was negotiated.
        status: the virtio device status byte.
        capabilities: for each ability ``how`` (native, emulated, no) and ``why``.
        control: of a network device: who drives its control vring, and what the device was told
            through it; empty where that is nobody's business.
        moment: when this was looked at, in seconds of the daemon's own clock.
        since: when the device came to its state, in seconds since 1970.
        front_end_since: when the front-end came.
        front_ends, failures, errors: how many front-ends came, back-ends failed, front-ends were
            cut off.
        shadow: why requests pass through shadow vrings; empty if they go straight to the device.
        dirty_log: by what means writes are logged; empty if they are not.
        pauses: by their reason.
        paused: the pause that has not ended yet.
    """

    name: str
    backend: str
    listen: str
    device: str | None
    state: str
    failure: str
    held: bool
    incoming: bool
    kept: bool
    front_end: int | None
    features: int
    status: int
    capabilities: Mapping[str, Mapping[str, str]]
    vrings: tuple[VringStatus, ...]
    backend_pid: int | None = None
    control: Mapping[str, str] = field(default_factory=dict)
    moment: float = 0.0
    since: float = 0.0
    front_end_since: float | None = None
    front_ends: int = 0
    failures: int = 0
    errors: int = 0
    shadow: str = ""
    dirty_log: str = ""
    pauses: Mapping[str, Tally] = field(default_factory=dict)
    paused: Pause | None = None


@dataclass(slots=True)
class SwitchReport:
    """How a switch went.

    Attributes:
        reasons: why the other back-end can't take over; nothing was done then.
        moved: whether it did.
        prepare: seconds before the pause.
        phases: the parts of the pause by name, in seconds, in their order.
        state: of the device afterwards.
    """

    reasons: list[str] = field(default_factory=list)
    moved: bool = False
    prepare: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)
    state: str = ""

    @property
    def pause(self) -> float:
        """Seconds in which no request was processed."""
        return sum(self.phases.values())

    @property
    def told(self) -> str:
        """The pause and its parts, for people."""
        parts = ", ".join(f"{name} {took * 1000:.1f}" for name, took in self.phases.items())
        return f"{self.pause * 1000:.1f} ms ({parts})"


# Members have camel case on the wire, as varlink's own have.
def _wire_name(name: str) -> str:
    first, *more = name.split("_")
    return first + "".join(word.capitalize() for word in more)


def pause_report(pause: Pause | None) -> dict[str, object] | None:
    """A pause on the wire, and in JSON."""
    if pause is None:
        return None
    return {
        "reason": pause.reason,
        "at": pause.at,
        "seconds": pause.seconds,
        "phases": dict(pause.phases),
    }


def tally_report(tally: Tally) -> dict[str, object]:
    """Pauses of one reason on the wire, and in JSON."""
    return {
        "count": tally.count,
        "seconds": tally.seconds,
        "phases": dict(tally.phases),
        "last": pause_report(tally.last),
        "longest": pause_report(tally.longest),
    }


def to_wire(status: BridgeStatus) -> dict[str, object]:
    """The object of type ``BridgeStatus`` in the interface's definition."""
    message = {_wire_name(f.name): getattr(status, f.name) for f in fields(status)}
    message["capabilities"] = {key: dict(one) for key, one in status.capabilities.items()}
    message["control"] = dict(status.control)
    message["vrings"] = [
        {_wire_name(f.name): getattr(vring, f.name) for f in fields(vring)}
        for vring in status.vrings
    ]
    message["pauses"] = {key: tally_report(tally) for key, tally in status.pauses.items()}
    message["paused"] = pause_report(status.paused)
    return message


def from_wire(message: Mapping[str, Any]) -> BridgeStatus:
    """The reverse of ``to_wire``. What only a newer daemon tells is left out; what an older one
    does not tell has its default.

    Raises:
        KeyError: something is missing that every daemon tells.
    """
    values = _values(BridgeStatus, message)
    values["vrings"] = tuple(
        VringStatus(**_values(VringStatus, vring)) for vring in message["vrings"]
    )
    values["paused"] = _pause(message.get("paused"))
    values["pauses"] = {
        key: Tally(
            tally["count"],
            tally["seconds"],
            dict(tally["phases"]),
            _pause(tally["last"]),
            _pause(tally["longest"]),
        )
        for key, tally in message.get("pauses", {}).items()
    }
    return BridgeStatus(**values)


def _values(kind: type[BridgeStatus | VringStatus], message: Mapping[str, Any]) -> dict[str, Any]:
    return {
        f.name: message[_wire_name(f.name)]
        for f in fields(kind)
        if _wire_name(f.name) in message or f.default is f.default_factory is MISSING
    }


def _pause(message: Mapping[str, Any] | None) -> Pause | None:
    if message is None:
        return None
    return Pause(message["reason"], message["at"], dict(message["phases"]))
