"""What a front-end talks to while its device is not there.

QEMU stands still until a message is answered. So the messages are answered from what is known: a
vring's position, the configuration that was read before, what the front-end set up since. Another
device goes on from there (``Absence.load``), as if it had been asked all of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from vhostbridge.backends.device import Device
from vhostbridge.backends.errors import BridgeError, Unsupported
from vhostbridge.backends.guest import MemoryRegion, VringSetup, base_of, with_base
from vhostbridge.backends.inflight import InflightBuffer
from vhostbridge.backends.lifecycle import How, State, Verb, step
from vhostbridge.backends.vhostuser.messages import Request
from vhostbridge.backends.vhostuser.payloads import Config

if TYPE_CHECKING:
    from vhostbridge.backends.dirty_log import DirtyLog
    from vhostbridge.backends.fds import OwnedFd
    from vhostbridge.backends.state import DeviceState
    from vhostbridge.backends.vhostuser.codec import Message

    from .absence import Absence


class StandIn(Device):
    """Nothing of it runs, but to its user it is RUNNING where the lost device was.

    Args:
        lost: the device that went away; what it offers is offered still.
        absence: where it was; kept in step with what becomes of the vrings meanwhile.
        regions: the guest's memory.
        running: whether vrings ran in it.
    """

    def __init__(
        self,
        lost: Device,
        absence: Absence,
        regions: Sequence[MemoryRegion] = (),
        *,
        running: bool = False,
    ) -> None:
        super().__init__()
        self.transport = lost.transport
        self.info, self.capabilities = lost.info, lost.capabilities
        #: Why the device is not there.
        self.because = lost.failure
        self.hangs = lost.hangs
        self.absence = absence
        self._vrings: dict[int, VringSetup] = {}
        self._running: set[int] = set()
        self._regions = regions
        # Where the front-end keeps what is in flight, and whether vrings may stop with it.
        self._inflight: InflightBuffer | None = None
        self._may_leave = False
        # Whose internal state the vrings' positions need beside them.
        self._owner: str | None = None
        # What the driver told the device through a control vring.
        self._control: dict[str, object] | None = None
        if absence.state is not None and absence.state.vrings:
            self.load(absence.state)
            if running:
                self.state = State.RUNNING
                self._running = set(self._vrings)

    def answers(self, message: Message) -> bool:
        """Whether a message can be answered now, and need not wait for a device."""
        if message.request == Request.GET_CONFIG:
            payload = message.payload
            assert isinstance(payload, Config)
            return self.absence.config_at(payload.offset, len(payload.data)) is not None
        if message.request == Request.GET_VRING_BASE:
            return self._settles()
        if message.request == Request.GET_INFLIGHT_FD:
            # A back-end that keeps one makes it itself.
            return self.capabilities.inflight.how is not How.NATIVE
        return message.request != Request.SET_CONFIG

    # Another device, or process, goes on where this one is.
    def _note(self) -> None:
        self.absence.state = replace(self.state_of(b""), internal_owner=self._owner)

    def _gone(self) -> str:
        return f"{self.info.target} is not there at the moment"

    @property
    def vrings(self) -> Mapping[int, VringSetup]:
        return MappingProxyType(self._vrings)

    @property
    def internal_owner(self) -> str | None:
        return self._owner

    def control_state(self) -> dict[str, object] | None:
        return self._control

    def new_driver(self) -> None:
        self._control = None

    async def read_config(self, offset: int, size: int) -> bytes:
        data = self.absence.config_at(offset, size)
        if data is None:
            raise Unsupported(f"{self._gone()}: its configuration was not read before")
        return data

    async def full_config(self) -> bytes:
        """What was read of it, from its beginning on."""
        return self.absence.config

    async def write_config(self, offset: int, data: bytes, flags: int) -> None:
        raise Unsupported(f"{self._gone()}: its configuration can't be written")

    async def set_memory(self, regions: Sequence[MemoryRegion]) -> None:
        if len(regions) > self.info.region_max:
            raise Unsupported(
                f"{self.info.target} takes {self.info.region_max} memory regions, the guest has "
                f"{len(regions)}"
            )
        self._regions = regions

    async def run(self, features: int, vrings: Sequence[VringSetup]) -> None:
        wanted = {vring.index: with_base(vring, self._vrings) for vring in vrings}
        self.features, self._vrings = features, wanted
        self._running = set(wanted)
        self._enter_running()
        self._note()

    async def stop_vring(self, index: int) -> int:
        self._settle(leave=self._may_leave)
        self._running.discard(index)
        if not self._running and self.state is State.RUNNING:
            self._enter(Verb.SUSPEND)
        return base_of(self._vrings, index)

    async def suspend(self) -> None:
        after = step(self.state, Verb.SUSPEND)
        self._settle()
        self._running.clear()
        self.state = after

    # Whether a vring can stop now.
    def _settles(self) -> bool:
        try:
            self._settle(leave=self._may_leave)
        except BridgeError:
            return False
        return True

    # Requests in flight count as not fetched, or stay in the front-end's buffer.
    def _settle(self, *, leave: bool = False) -> None:
        if self._inflight is not None:
            vrings = list(self._vrings.values())
            self.absence.recall(self.features, vrings, self._regions, self._inflight)
        bases = self.absence.settle(leave=leave)
        if bases:
            for index, base in bases.items():
                self._vrings[index] = replace(self._vrings[index], base=base)
            self._note()

    async def reset(self) -> None:
        self._enter(Verb.RESET)
        self._vrings.clear()
        self._running.clear()
        self.features, self._owner, self._control = 0, None, None
        self.absence.give_up_requests()
        self._note()

    def load(self, state: DeviceState) -> None:
        super().load(state)
        self._owner = state.internal_owner
        self._control = None if state.control is None else dict(state.control)
        self.absence.state = state

    def _place(self, features: int, vrings: Sequence[VringSetup]) -> None:
        self.features = features
        self._vrings = {v.index: v for v in vrings}

    async def set_call(self, index: int, fd: OwnedFd | None) -> None:
        """The session knows it, and gives it to the next device."""

    set_kick = set_err = set_call

    async def set_enabled(self, index: int, enabled: bool) -> None:
        if vring := self._vrings.get(index):
            self._vrings[index] = replace(vring, enabled=enabled)

    async def make_inflight(self, queues: int, queue_size: int, features: int) -> InflightBuffer:
        if self.capabilities.inflight.how is not How.EMULATED:
            return await super().make_inflight(queues, queue_size, features)
        return InflightBuffer.make(queues, queue_size, features)

    def use_inflight(self, buffer: InflightBuffer | None, *, leave: bool = False) -> None:
        if not self.capabilities.inflight:
            super().use_inflight(buffer, leave=leave)
        self._inflight, self._may_leave = buffer, leave and buffer is not None

    async def capture(self) -> DeviceState:
        state = await super().capture()
        if self._inflight is not None:
            self._inflight.check_empty(state)
        return state

    async def log_writes(self, log: DirtyLog | None, used: Mapping[int, int]) -> None:
        """Nothing is written."""

    async def send_rarp(self, mac: int) -> None:
        """Nobody is there to announce it."""

    async def aclose(self) -> None:
        self.state = State.CLOSED
