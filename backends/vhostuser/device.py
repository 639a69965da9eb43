"""A virtio device behind a vhost-user socket: we are the front-end of somebody's back-end."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from types import MappingProxyType

from vhostbridge.backends.device import Device, DeviceInfo, whole
from vhostbridge.backends.dirty_log import DirtyLog
from vhostbridge.backends.errors import BridgeError, PeerError, TransportLost, Unsupported
from vhostbridge.backends.fds import OwnedFd, new_eventfd, signal_eventfds
from vhostbridge.backends.guest import (
    MemoryRegion,
    VringSetup,
    base_of,
    kick_and_call,
    whole_base,
    with_base,
)
from vhostbridge.backends.inflight import InflightBuffer
from vhostbridge.backends.lifecycle import Capabilities, State, Status, Verb, step
from vhostbridge.backends.virtio import TransportFeature

from .client import Client
from .config import BackendConfig
from .draining import drained
from .inflight import BackendInflight
from .memory import BackendMemory
from .messages import ProtocolFeature, Request
from .payloads import U64, Log
from .transfer import LOAD, SAVE, transfer
from .vrings import VringMessages

_PF_BIT = TransportFeature.PROTOCOL_FEATURES.mask
_LOG_BIT = TransportFeature.LOG_ALL.mask

#: Whose internal state it is where the kernel doesn't tell which program a back-end is.
UNKNOWN_OWNER = "an unknown back-end"


class VhostUserDevice(Device):
    """A vhost-user back-end. Made by ``open_vhost_user``."""

    transport = "vhost-user"

    def __init__(
        self,
        client: Client,
        info: DeviceInfo,
        capabilities: Capabilities,
        raw: int,
        offered: ProtocolFeature,
    ) -> None:
        super().__init__()
        self._client = client
        self.info = info
        #: All protocol features that the back-end offers, wanted or not.
        self.protocol_offered = offered
        self._has_protocol = bool(raw & _PF_BIT)
        self._owner = client.peer_program() or UNKNOWN_OWNER
        self._memory = BackendMemory(client, info.target, info.region_max, self.fail)
        self._messages = VringMessages(client, self._memory, enables=self._has_protocol)
        self._rings: dict[int, VringSetup] = {}
        # Where vrings stopped; each with its base.
        self._stopped: dict[int, VringSetup] = {}
        self._config_changed = False
        # Borrowed, like the vrings' eventfds.
        self._log: DirtyLog | None = None
        self._inflight = BackendInflight(client, info.target, info.queue_num)
        # The call eventfd of vrings that are stopping: nobody listens.
        self._deaf = new_eventfd()
        self._config = BackendConfig(client, info.target)
        self.capabilities = capabilities
        client.on_config_change = self._config_change
        client.on_hang = self.fail

    @property
    def hangs(self) -> bool:
        return self._client.hangs

    @hangs.setter
    def hangs(self, value: bool) -> None:
        """The connection's to know."""

    def _has(self, feature: ProtocolFeature) -> bool:
        return feature in self._client.protocol

    # The back-end may not notify while suspended, but one that does anyway is held back.
    def _config_change(self) -> None:
        if self.state is State.RUNNING:
            self.on_config_change()
        else:
            self._config_changed = True

    def _tell_config_change(self) -> None:
        if self._config_changed:
            self._config_changed = False
            self.on_config_change()

    # Configuration

    async def read_config(self, offset: int, size: int) -> bytes:
        return await self._config.read(offset, size)

    async def full_config(self) -> bytes:
        return await self._config.known()

    async def write_config(self, offset: int, data: bytes, flags: int) -> None:
        await self._config.write(offset, data, flags)

    async def send_rarp(self, mac: int) -> None:
        await self._client.request(Request.SEND_RARP, U64(mac))

    async def set_mtu(self, mtu: int) -> None:
        await self._client.request(Request.NET_SET_MTU, U64(mtu))

    # Memory

    @whole
    async def set_memory(self, regions: Sequence[MemoryRegion]) -> None:
        before = {region.key for region in self._memory.regions}
        await self._memory.change(regions)
        log = self._log
        new = any(region.key not in before for region in regions)
        if log is None or not new or not log.covers(regions):
            return
        try:
            # rust-vmm's library logs in memory that was there at this message only.
            await self._say_log(log)
        except BridgeError as error:
            self.fail(f"what it writes to new memory would not be logged: {error}")
            raise

    # Life

    @property
    def vrings(self) -> Mapping[int, VringSetup]:
        return MappingProxyType({**self._stopped, **self._rings})

    @whole
    async def run(self, features: int, vrings: Sequence[VringSetup]) -> None:
        wanted = [with_base(v, self.vrings) for v in vrings]
        new = [v for v in wanted if not self._goes_on(v)]
        keep = {v.index for v in wanted} - {v.index for v in new}
        before = dict(self._rings)
        try:
            for index in [index for index in self._rings if index not in keep]:
                await self._stop(index)
            await self._start(features, new)
        except BridgeError as error:
            await self._go_back(before, error)
            raise
        # Others stopped for good: their driver or shadow vrings may be gone, and it may even be the
        # wrong kind of rings by now.
        self._stopped.clear()
        self._enter_running()
        await kick_and_call(new)
        self._tell_config_change()

    # As it was before an operation that failed: these vrings run, from where they are.
    async def _go_back(self, before: Mapping[int, VringSetup], error: BridgeError) -> None:
        if isinstance(error, TransportLost):
            self.fail(str(error))
            return
        try:
            for index in [i for i, v in self._rings.items() if before.get(i) is not v]:
                await self._stop(index)
            again = [
                replace(v, base=self._stopped[i].base)
                for i, v in before.items()
                if i not in self._rings
            ]
            if again:
                await self._start(self.features, again)
                await kick_and_call(again)
        except BridgeError as second:
            self.fail(f"{error}; going back failed too: {second}")

    # QEMU's order: features, rings, status.
    async def _start(self, features: int, vrings: Sequence[VringSetup]) -> None:
        if not self._rings:
            await self._set_features(features)
            await self._inflight.give(vrings, self._deaf)
            await self._add_status(Status.FEATURES_OK)
        for vring in vrings:
            await self._program(vring)
        await self._add_status(
            Status.ACKNOWLEDGE | Status.DRIVER | Status.DRIVER_OK | Status.FEATURES_OK
        )

    async def _set_features(self, features: int) -> None:
        await self._say_features(features)
        self.features = features

    async def _say_features(self, features: int) -> None:
        word = features | (_PF_BIT if self._has_protocol else 0)
        word |= _LOG_BIT if self._log is not None else 0
        await self._client.request(Request.SET_FEATURES, U64(word))

    @property
    def _packed(self) -> bool:
        return bool(self.features & TransportFeature.RING_PACKED.mask)

    def _goes_on(self, vring: VringSetup) -> bool:
        running = self._rings.get(vring.index)
        return running is not None and running.layout == vring.layout and vring.base == running.base

    async def _add_status(self, bits: Status) -> None:
        if self._has(ProtocolFeature.STATUS):
            status = await self._client.request(Request.GET_STATUS)
            assert isinstance(status, U64)
            await self._client.request(Request.SET_STATUS, U64(status.value | bits))

    async def _program(self, vring: VringSetup) -> None:
        await self._messages.set_up(vring, packed=self._packed)
        # From the kick on it runs, whether or not we get to see the answer.
        self._rings[vring.index] = vring
        self._stopped.pop(vring.index, None)
        await self._messages.kick(vring.index, vring.kick)

    @whole
    async def stop_vring(self, index: int) -> int:
        before = dict(self._rings)
        try:
            await self._stop(index)
        except BridgeError as error:
            await self._go_back(before, error)
            raise
        if not self._rings and self.state is State.RUNNING:
            self._enter(Verb.SUSPEND)
        return base_of(self._stopped, index)

    async def _stop(self, index: int) -> None:
        vring = self._rings.get(index)
        if vring is None:
            return
        try:
            # What tells libvhost-user from others: it has no STATUS, but protocol features.
            if self._has(ProtocolFeature.STATUS) or not self._has_protocol:
                stopped = await self._client.stop_vring(index)
            else:
                stopped = await self._client.stop_busy_vring(index, vring.enabled, self._deaf)
        except PeerError as error:
            self.fail(str(error))
            raise
        del self._rings[index]
        base = whole_base(stopped.num, packed=self._packed)
        self._stopped[index] = replace(vring, base=base)
        if not self._packed:
            await drained(self._client, self.info.target, self._memory.regions, vring, stopped.num)

    @whole
    async def suspend(self) -> None:
        after = step(self.state, Verb.SUSPEND)
        before = dict(self._rings)
        try:
            for index in before:
                await self._stop(index)
        except BridgeError as error:
            await self._go_back(before, error)
            raise
        self.state = after

    @whole
    async def reset(self) -> None:
        step(self.state, Verb.RESET)
        for index in list(self._rings):
            await self._stop(index)
        if self._stopped:
            if self._has(ProtocolFeature.STATUS):
                await self._client.request(Request.SET_STATUS, U64(0))
            if self._has(ProtocolFeature.RESET_DEVICE):
                await self._client.request(Request.RESET_DEVICE)
        self._stopped.clear()
        self.features = 0
        self._enter(Verb.RESET)

    # In QEMU's order. What was logged last is the front-end's to keep.
    @whole
    async def log_writes(self, log: DirtyLog | None, used: Mapping[int, int]) -> None:
        if log is None and self._log is None:
            return
        if not self._has(ProtocolFeature.LOG_SHMFD):
            raise Unsupported(f"back-end {self.info.target} does not offer LOG_SHMFD")
        if log is not None:
            await self._say_log(log)
        before, self._log = self._log, log
        old = self._messages.used_logs
        self._messages.used_logs = dict(used) if log is not None else {}
        try:
            if self._rings and (before is None) != (log is None):
                await self._set_features(self.features)
            for vring in self._rings.values():
                if old.get(vring.index) != self._messages.used_logs.get(vring.index):
                    await self._messages.addresses(vring)
        except BridgeError:
            # What is asked for again is said again.
            self._log, self._messages.used_logs = before, old
            raise
        await self._memory.barrier()

    async def _say_log(self, log: DirtyLog) -> None:
        await self._client.request(Request.SET_LOG_BASE, Log(log.size, log.offset), [log.fd])

    # Requests in flight

    async def make_inflight(self, queues: int, queue_size: int, features: int) -> InflightBuffer:
        if not self._inflight.offered:
            return await super().make_inflight(queues, queue_size, features)
        # How large it is depends on the kind of rings.
        if not self._rings:
            await self._say_features(features)
        return await self._inflight.make(queues, queue_size)

    def use_inflight(self, buffer: InflightBuffer | None, *, leave: bool = False) -> None:
        if not self._inflight.offered:
            super().use_inflight(buffer)
        self._inflight.given = buffer

    # State

    def _place(self, features: int, vrings: Sequence[VringSetup]) -> None:
        self.features = features
        self._stopped = {v.index: v for v in vrings}

    @property
    def internal_owner(self) -> str | None:
        return self._owner if self._has(ProtocolFeature.DEVICE_STATE) else None

    def _need_device_state(self) -> None:
        if not self._has(ProtocolFeature.DEVICE_STATE):
            raise Unsupported(f"back-end {self.info.target} does not offer DEVICE_STATE")

    @asynccontextmanager
    async def internal_source(self) -> AsyncIterator[OwnedFd]:
        if self.state is not State.RESET:
            step(self.state, Verb.SAVE)
        self._need_device_state()
        async with transfer(self._client, SAVE) as pipe:
            yield pipe

    @asynccontextmanager
    async def internal_sink(self) -> AsyncIterator[OwnedFd]:
        step(self.state, Verb.LOAD)
        self._need_device_state()
        try:
            # One whose driver never came has none, which passt would take for a legacy driver's.
            if self.features:
                await self._set_features(self.features)
            async with transfer(self._client, LOAD) as pipe:
                yield pipe
        except BaseException as error:
            self.fail(f"its internal state was not loaded whole: {error}")
            raise

    # Changes while running

    async def set_call(self, index: int, fd: OwnedFd | None) -> None:
        if vring := self._rings.get(index):
            await self._messages.call(index, fd)
            self._rings[index] = replace(vring, call=fd)
            await signal_eventfds(fd)

    async def set_kick(self, index: int, fd: OwnedFd | None) -> None:
        if vring := self._rings.get(index):
            await self._messages.kick(index, fd)
            self._rings[index] = replace(vring, kick=fd)
            await signal_eventfds(fd)

    async def set_err(self, index: int, fd: OwnedFd | None) -> None:
        if (vring := self._rings.get(index)) and fd is not None:
            await self._messages.err(index, fd)
            self._rings[index] = replace(vring, err=fd)

    async def set_enabled(self, index: int, enabled: bool) -> None:
        vring = self._rings.get(index)
        if vring is None or vring.enabled == enabled or not self._has_protocol:
            return
        await self._messages.enable(index, enabled)
        self._rings[index] = replace(vring, enabled=enabled)
        if enabled:
            await signal_eventfds(vring.kick)

    async def aclose(self) -> None:
        self.close()

    def close(self) -> None:
        """Release everything at once; nothing is asked of the back-end."""
        self.state = State.CLOSED
        self._client.close()
        self._deaf.close()
        self._inflight.close()
