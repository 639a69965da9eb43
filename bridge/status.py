"""What is known of a running bridge at one moment, and its form on the control socket."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True, slots=True)
class VringStatus:
    """One vring, as the device, guest memory and the bridge tell of it.

    Attributes:
        base: the device's position, encoded as vhost has it; ``None`` unless it is suspended.
        available, used: the indices in guest memory; ``None`` where they can't be read.
        problem: a disagreement between them, such as "used index 7 ≠ base 9"; empty if none.
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
    control: Mapping[str, str]
    vrings: tuple[VringStatus, ...]
    backend_pid: int | None = None


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
_ON_WIRE = {"front_end": "frontEnd", "backend_pid": "backendPid"}


def to_wire(status: BridgeStatus) -> dict[str, object]:
    """The object of type ``BridgeStatus`` in the interface's definition."""
    message = {_ON_WIRE.get(f.name, f.name): getattr(status, f.name) for f in fields(status)}
    message["capabilities"] = {key: dict(one) for key, one in status.capabilities.items()}
    message["control"] = dict(status.control)
    message["vrings"] = [
        {f.name: getattr(vring, f.name) for f in fields(vring)} for vring in status.vrings
    ]
    return message


def from_wire(message: Mapping[str, Any]) -> BridgeStatus:
    """The reverse of ``to_wire``. A newer daemon may tell more: that is left out.

    Raises:
        KeyError: something is missing.
    """
    values = {f.name: message[_ON_WIRE.get(f.name, f.name)] for f in fields(BridgeStatus)}
    values["vrings"] = tuple(
        VringStatus(**{f.name: vring[f.name] for f in fields(VringStatus)})
        for vring in message["vrings"]
    )
    return BridgeStatus(**values)
