"""What a device is, whichever transport it is on: lifecycle, capabilities and the contract.

The lifecycle is a table, and only this file decides by it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, IntFlag
from types import MappingProxyType

from .errors import BridgeError, InvalidTransition
from .fds import OwnedFd


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


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """What a device offers; constant while it is open.

    Attributes:
        target: the URI it was opened by.
        device_id: virtio device id, ``None`` where the transport doesn't tell (vhost-user).
        features: virtio feature bits, without the vhost-only bits 26 and 30.
        vring_limit: vrings have indices below this.
        queue_num: the answer to GET_QUEUE_NUM: pairs for net, else vrings.
        vring_size_max: largest vring, in descriptors.
        config_size: bytes of configuration space; 0 where there is none or it can't be read.
        iova_first, iova_last: usable IOVAs, both inclusive.
        region_max: how many memory regions it takes.
    """

    target: str
    device_id: int | None
    features: int
    vring_limit: int
    queue_num: int
    vring_size_max: int
    config_size: int
    iova_first: int
    iova_last: int
    region_max: int
    forwards_mtu: bool = False
    forwards_rarp: bool = False


@dataclass(frozen=True, slots=True)
class MemoryRegion:
    """Guest memory: ``size`` bytes at ``guest_address``, in ``fd`` from ``offset`` on.

    The one who made it owns ``fd`` and keeps it open until another ``set_memory`` has replaced
    the region. ``identity`` (device, inode, offset) tells whether two regions are the same memory
    although their descriptors differ.
    """

    guest_address: int
    size: int
    fd: OwnedFd
    offset: int
    identity: tuple[int, int, int]

    @property
    def key(self) -> tuple[int, int, int, int, int]:
        return (self.guest_address, self.size, *self.identity)

    @property
    def end(self) -> int:
        """First guest address behind the region."""
        return self.guest_address + self.size


@dataclass(frozen=True, slots=True)
class VringSetup:
    """One vring, ready to run. Area addresses are guest physical; descriptors are borrowed.

    ``base`` is encoded as vhost has it: split rings the 16-bit available index, packed rings
    available index and wrap counter below used index and wrap counter. ``None`` means where the
    device left off when it was last suspended.
    """

    index: int
    size: int
    descriptor_area: int
    driver_area: int
    device_area: int
    base: int | None
    kick: OwnedFd | None
    call: OwnedFd | None
    err: OwnedFd | None
    enabled: bool

    @property
    def layout(self) -> tuple[int, int, int, int]:
        """What makes it the same ring, whatever its position and eventfds are."""
        return (self.size, self.descriptor_area, self.driver_area, self.device_area)


class Device(ABC):
    """A virtio device on either transport.

    All methods are called from one task at a time. Addresses are guest physical, which are the
    IOVAs too. An operation that raises leaves the device as it was, or FAILED with the reason.
    """

    info: DeviceInfo
    capabilities: Capabilities

    def __init__(self) -> None:
        self.state = State.RESET
        #: Why the device is FAILED; empty otherwise.
        self.failure = ""
        #: Called when the device's configuration changed; never while it is suspended.
        self.on_config_change: Callable[[], None] = lambda: None
        #: Called with the reason when the device fails outside any operation.
        self.on_failure: Callable[[str], None] = lambda reason: None

    def _enter(self, verb: Verb) -> None:
        self.state = step(self.state, verb)

    def _enter_running(self) -> None:
        if self.state is State.SUSPENDED:
            self._enter(Verb.RESUME)
        elif self.state is not State.RUNNING:
            self._enter(Verb.CONFIGURE)
            self._enter(Verb.START)

    def fail(self, reason: str) -> None:
        """Mark the device FAILED; only reset and close are left."""
        if self.state is not State.CLOSED:
            self.state = State.FAILED
            self.failure = reason

    @abstractmethod
    async def read_config(self, offset: int, size: int) -> bytes:
        """``size`` bytes of configuration space; zeros stand for what lies past its end."""

    @abstractmethod
    async def write_config(self, offset: int, data: bytes, flags: int) -> None:
        """Write configuration space; ``flags`` as in SET_CONFIG (1: migration)."""

    @abstractmethod
    async def set_memory(self, regions: Sequence[MemoryRegion]) -> None:
        """Make ``regions`` the guest's memory: all of it, in any state but FAILED.

        Memory that stays is not touched. When it returns, memory that went away is no longer
        accessed. If it raises, the previous memory is in force.
        """

    @abstractmethod
    async def run(self, features: int, vrings: Sequence[VringSetup]) -> None:
        """Make exactly ``vrings`` run with ``features``, whatever ran before.

        From RESET it configures and starts; from SUSPENDED it resumes, or restarts where set-up
        changed; a RUNNING device is suspended first if the change needs it. Afterwards every
        vring got one kick and one call, so that no notification is lost on the way.
        """

    @abstractmethod
    async def stop_vring(self, index: int) -> int:
        """Stop a vring and return its base; all its requests are complete.

        On vhost-vdpa this suspends the whole device; ``run`` lets the others go on.
        """

    @abstractmethod
    async def suspend(self) -> None:
        """Freeze the device.

        When it returns, no descriptor is read, no used entry or buffer is written, no interrupt
        and no configuration change notification is sent, and requests in flight are complete.
        Idempotent.
        """

    @abstractmethod
    async def reset(self) -> None:
        """Back to RESET from any state; all but memory is lost."""

    @abstractmethod
    async def set_call(self, index: int, fd: OwnedFd | None) -> None:
        """Replace the call eventfd of a running vring."""

    @abstractmethod
    async def set_kick(self, index: int, fd: OwnedFd | None) -> None:
        """Replace the kick eventfd of a running vring."""

    @abstractmethod
    async def set_err(self, index: int, fd: OwnedFd | None) -> None:
        """Replace the error eventfd of a running vring."""

    @abstractmethod
    async def set_enabled(self, index: int, enabled: bool) -> None:
        """Switch a running vring on or off; it keeps its position."""

    @abstractmethod
    async def aclose(self) -> None:
        """Release everything. Idempotent; never raises for a transport that is already gone."""

    async def send_rarp(self, mac: int) -> None:
        """Announce the guest's MAC (vhost-user SEND_RARP's payload) to the network."""
        raise BridgeError(f"{self.info.target} does not announce guests by RARP")

    async def set_mtu(self, mtu: int) -> None:
        """Tell the device the MTU in bytes."""
        raise BridgeError(f"{self.info.target} does not take an MTU")
