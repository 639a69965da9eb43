"""What a device is, whichever transport it is on: facts, operations and their contract."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import trio

from .errors import BridgeError, TransportLost, Unsupported
from .fds import OwnedFd
from .guest import MemoryRegion, VringSetup
from .lifecycle import Capabilities, State, Verb, step
from .trace import OFF, Tracer

if TYPE_CHECKING:
    from .dirty_log import DirtyLog
    from .inflight import InflightBuffer
    from .state import DeviceState


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
        takes_control: whether a network device can be told again what its driver said through the
            control vring.
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
    takes_control: bool = False
    forwards_mtu: bool = False
    forwards_rarp: bool = False


# How long one operation may take, in seconds. VDUSE gives its processes 30 for one request.
WHOLE = 35.0

P = ParamSpec("P")
T = TypeVar("T")
D = TypeVar("D", bound="Device")


def whole(
    method: Callable[Concatenate[D, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[D, P], Coroutine[Any, Any, T]]:
    """Make a device's operation run to its end although its task is cancelled.

    Half an operation is a stopped device. One that takes longer than ``WHOLE`` fails the device.
    """

    @functools.wraps(method)
    async def run(self: D, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + WHOLE):
            return await method(self, *args, **kwargs)
        self.fail(f"it did not finish what it was asked for ({method.__name__}) in {WHOLE:g} s")
        raise TransportLost(f"{self.info.target}: {self.failure}")

    return run


class Device(ABC):
    """A virtio device on either transport.

    All methods are called from one task at a time. Addresses are guest physical, which are the
    IOVAs too. An operation that raises leaves the device as it was, or FAILED with the reason.
    """

    info: DeviceInfo
    capabilities: Capabilities
    #: "vdpa" or "vhost-user".
    transport: str

    def __init__(self) -> None:
        self.trace: Tracer = OFF
        self._state = State.RESET
        #: What was negotiated last, without what the transport adds.
        self.features = 0
        #: Why the device is FAILED; empty otherwise.
        self.failure = ""
        #: Called when the device's configuration changed; never while it is suspended.
        self.on_config_change: Callable[[], None] = lambda: None
        #: The process behind it, where the kernel tells; 0 where it does not.
        self.process = 0
        #: Whether it failed because that did not answer: it may live on, and come to life again.
        self.hangs = False
        #: Set when the device becomes FAILED.
        self.failed = trio.Event()
        #: How often it began to run, or went on.
        self.starts = 0

    @property
    def state(self) -> State:
        return self._state

    @state.setter
    def state(self, value: State) -> None:
        before, self._state = self._state, value
        if self.trace.on and value is not before:
            self.trace.event("state", device=self.info.target, before=before.value, now=value.value)

    def _enter(self, verb: Verb) -> None:
        self.state = step(self.state, verb)
        if self.state is State.RESET and self.failed.is_set():
            self.failed, self.failure = trio.Event(), ""

    def _enter_running(self) -> None:
        self.starts += self.state is not State.RUNNING
        if self.state is State.SUSPENDED:
            self._enter(Verb.RESUME)
        elif self.state is not State.RUNNING:
            self._enter(Verb.CONFIGURE)
            self._enter(Verb.START)

    def fail(self, reason: str) -> None:
        """Mark the device FAILED; only reset and close are left."""
        if self.state not in (State.CLOSED, State.FAILED):
            self.state = State.FAILED
            self.failure = reason
            self.trace.event("failed", device=self.info.target, reason=reason)
            self.failed.set()

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

    @property
    @abstractmethod
    def vrings(self) -> Mapping[int, VringSetup]:
        """The vrings by index; while the device is SUSPENDED each has the base where it stopped."""

    async def resume(self) -> None:
        """Go on exactly where ``suspend`` stopped; every vring gets one kick and one call.

        Raises:
            InvalidTransition: the device is not SUSPENDED.
        """
        step(self.state, Verb.RESUME)
        await self.run(self.features, [replace(v, base=None) for v in self.vrings.values()])

    @property
    def internal_owner(self) -> str | None:
        """Whose state ``internal_source`` gives; ``None`` for devices that have no such state."""
        return None

    async def capture(self) -> DeviceState:
        """The state of a SUSPENDED device, all but the internal one. Changes nothing.

        Raises:
            InvalidTransition: the device is not SUSPENDED.
        """
        step(self.state, Verb.SAVE)
        return self.state_of(await self.full_config())

    def state_of(self, config: bytes) -> DeviceState:
        """What is known without asking the device."""
        from .state import DeviceState, VringState

        return DeviceState(
            transport=self.transport,
            device_id=self.info.device_id,
            features=self.features,
            queue_num=self.info.queue_num,
            config=config,
            vrings=tuple(
                VringState(
                    index=v.index,
                    size=v.size,
                    base=v.base or 0,
                    enabled=v.enabled,
                    descriptor_area=v.descriptor_area,
                    driver_area=v.driver_area,
                    device_area=v.device_area,
                )
                for _, v in sorted(self.vrings.items())
            ),
            control=self.control_state(),
            internal_owner=self.internal_owner,
        )

    async def full_config(self) -> bytes:
        """The whole configuration space; empty where there is none to read."""
        size = self.info.config_size
        return await self.read_config(0, size) if size else b""

    def load(self, state: DeviceState) -> None:
        """Take over negotiated features and vring positions; SUSPENDED afterwards.

        Nothing is done to the device itself before the next ``run``, whose eventfds and memory
        come from the front-end. Whether the state fits is the caller's to check
        (``state.compatibility``).

        Raises:
            InvalidTransition: the device runs.
        """
        after = step(self.state, Verb.LOAD)
        self._place(
            state.features,
            [vring.setup() for vring in state.vrings],
        )
        self.state = after

    @abstractmethod
    def _place(self, features: int, vrings: Sequence[VringSetup]) -> None:
        """Remember loaded vrings as the ones that stopped."""

    def internal_source(self) -> AbstractAsyncContextManager[OwnedFd]:
        """A pipe to read the back-end's internal state from, up to its end.

        The block's end asks the back-end whether it was all. The state is not consumed.

        Raises:
            PeerError: the back-end refused, or says that it failed.
        """
        raise Unsupported(f"{self.info.target} has no internal state to save")

    def internal_sink(self) -> AbstractAsyncContextManager[OwnedFd]:
        """A pipe to write internal state into, for a device that was just loaded.

        The block closes the descriptor when all is written; its end asks the back-end whether it
        took it. If anything fails the device is FAILED: half a state is none.

        Raises:
            PeerError: the back-end refused, or says that it failed.
        """
        raise Unsupported(f"{self.info.target} takes no internal state")

    async def log_writes(self, log: DirtyLog | None, used: Mapping[int, int]) -> None:
        """Mark every page that the device writes in ``log`` from now on; ``None`` ends it.

        ``used`` has the vrings whose used rings are logged too, each with the guest address that
        stands for its first byte. When it returns, a log before it is not touched any more.

        Raises:
            Unsupported: the device can't; it goes on as before.
        """
        if log is not None:
            raise Unsupported(f"{self.info.target} does not log what it writes")

    @property
    def control_vring(self) -> int | None:
        """The guest's control vring, if the bridge answers it: in order, one request at a time."""
        return None

    def control_state(self) -> dict[str, object] | None:
        """What the driver told the device through it, for a state; ``None`` if nothing is known."""
        return None

    def new_driver(self) -> None:
        """Another driver begins: what the one before told the device is void."""
        return  # nothing is remembered

    def control_report(self) -> dict[str, str]:
        """Of a network device: the ``driver`` of its control vring and what it was told; or
        nothing."""
        return {}

    async def make_inflight(self, queues: int, queue_size: int, features: int) -> InflightBuffer:
        """A new buffer for ``use_inflight`` of vrings with these features; the caller's.

        Raises:
            Unsupported: the device does not know its requests in flight.
        """
        raise Unsupported(f"{self.info.target}: {self.capabilities.inflight.why}")

    def use_inflight(self, buffer: InflightBuffer | None, *, leave: bool = False) -> None:
        """Note what is in flight in ``buffer`` when vrings run next, and go on with what it has.

        It is borrowed until another call. With ``leave`` a vring that stops may have requests in
        flight, which the buffer tells of.

        Raises:
            Unsupported: the device does not know its requests in flight.
        """
        if buffer is not None:
            raise Unsupported(f"{self.info.target}: {self.capabilities.inflight.why}")

    async def send_rarp(self, mac: int) -> None:
        """Announce the guest's MAC (vhost-user SEND_RARP's payload) to the network."""
        raise BridgeError(f"{self.info.target} does not announce guests by RARP")

    async def set_mtu(self, mtu: int) -> None:
        """Tell the device the MTU in bytes."""
        raise BridgeError(f"{self.info.target} does not take an MTU")
