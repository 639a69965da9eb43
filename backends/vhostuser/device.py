"""A virtio device behind a vhost-user socket: we are the front-end of somebody's back-end.

User addresses are ours to choose: we use guest addresses, so ring addresses need no translation.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import trio

from vhostbridge.backends.device import (
    Ability,
    Capabilities,
    Device,
    DeviceInfo,
    How,
    MemoryRegion,
    State,
    Status,
    Verb,
    VringSetup,
    step,
)
from vhostbridge.backends.errors import BridgeError, PeerError, TransportLost, Unsupported
from vhostbridge.backends.fds import OwnedFd, signal_eventfds
from vhostbridge.backends.virtio import VHOST_ONLY_FEATURES, TransportFeature

from .client import Client
from .messages import (
    MAX_CONFIG,
    MAX_REGIONS,
    U64,
    Config,
    MemReg,
    MemTable,
    ProtocolFeature,
    Region,
    Request,
    VringAddr,
    VringFd,
    VringState,
)
from .sockets import adopt, connect, listen, unlisten

# What we know how to live with. Back-ends offer more; nothing of it helps a bridge.
_WANTED = (
    ProtocolFeature.MQ
    | ProtocolFeature.RARP
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.NET_MTU
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.STATUS
)
_PF_BIT = TransportFeature.PROTOCOL_FEATURES.mask

# The protocol counts a ring index in 8 bits.
VRING_LIMIT = 256


class VhostUserDevice(Device):
    """A vhost-user back-end. Made by ``open_vhost_user``."""

    def __init__(
        self, client: Client, info: DeviceInfo, raw: int, offered: ProtocolFeature
    ) -> None:
        super().__init__()
        self._client = client
        self.info = info
        #: All protocol features that the back-end offers, wanted or not.
        self.protocol_offered = offered
        self._has_protocol = bool(raw & _PF_BIT)
        self._regions: dict[tuple[int, int, int, int, int], MemoryRegion] = {}
        self._rings: dict[int, VringSetup] = {}
        self._bases: dict[int, int] = {}
        self._config_changed = False
        self.capabilities = _capabilities(offered)
        client.on_config_change = self._config_change

    def _has(self, feature: ProtocolFeature) -> bool:
        return feature in self._client.protocol

    # The back-end may not notify while suspended, but one that does anyway is held back.
    def _config_change(self) -> None:
        if self.state is State.RUNNING:
            self.on_config_change()
        else:
            self._config_changed = True

    # Configuration

    async def read_config(self, offset: int, size: int) -> bytes:
        if not self._has(ProtocolFeature.CONFIG):
            raise Unsupported(f"back-end {self.info.target} has no configuration space to read")
        reply = await self._client.request(Request.GET_CONFIG, Config(offset, 0, bytes(size)))
        assert isinstance(reply, Config)
        if len(reply.data) != size:
            raise PeerError(
                f"back-end {self.info.target} answered {len(reply.data)} configuration bytes, "
                f"{size} were asked"
            )
        return reply.data

    async def write_config(self, offset: int, data: bytes, flags: int) -> None:
        if not self._has(ProtocolFeature.CONFIG):
            raise Unsupported(f"back-end {self.info.target} has no configuration space to write")
        await self._client.request(Request.SET_CONFIG, Config(offset, flags, data))

    async def send_rarp(self, mac: int) -> None:
        await self._client.request(Request.SEND_RARP, U64(mac))

    async def set_mtu(self, mtu: int) -> None:
        await self._client.request(Request.NET_SET_MTU, U64(mtu))

    # Memory

    async def set_memory(self, regions: Sequence[MemoryRegion]) -> None:
        wanted = {region.key: region for region in regions}
        if len(wanted) > self.info.region_max:
            raise Unsupported(
                f"back-end {self.info.target} takes {self.info.region_max} memory regions, "
                f"the guest has {len(wanted)}"
            )
        if wanted.keys() == self._regions.keys():
            pass
        elif self._has(ProtocolFeature.CONFIGURE_MEM_SLOTS):
            await self._change_slots(wanted)
            await self._barrier()
        elif wanted:
            await self._client.request(
                Request.SET_MEM_TABLE,
                MemTable(tuple(_wire_region(r) for r in regions)),
                [r.fd for r in regions],
            )
            await self._barrier()
        # Descriptors may be new ones for the same memory: the caller keeps only those alive.
        self._regions = wanted

    # Without acknowledgements a back-end may still be at the memory that we told it to drop; the
    # answer to any question comes after that.
    async def _barrier(self) -> None:
        if not self._has(ProtocolFeature.REPLY_ACK):
            await self._client.request(Request.GET_FEATURES)

    # What was there before is put back when the back-end refuses a step.
    async def _change_slots(
        self, wanted: dict[tuple[int, int, int, int, int], MemoryRegion]
    ) -> None:
        before = dict(self._regions)
        try:
            await self._go_to_slots(wanted)
        except PeerError as refusal:
            try:
                await self._go_to_slots(before)
            except BridgeError:
                self.fail(f"guest memory is neither the old nor the new one: {refusal}")
            raise

    async def _go_to_slots(
        self, wanted: dict[tuple[int, int, int, int, int], MemoryRegion]
    ) -> None:
        request = self._client.request
        for key in [key for key in self._regions if key not in wanted]:
            await request(Request.REM_MEM_REG, MemReg(_wire_region(self._regions[key])))
            del self._regions[key]
        for key, region in wanted.items():
            if key not in self._regions:
                await request(Request.ADD_MEM_REG, MemReg(_wire_region(region)), [region.fd])
                self._regions[key] = region

    # Life

    async def run(self, features: int, vrings: Sequence[VringSetup]) -> None:
        wanted = [self._with_base(v) for v in vrings]
        new = [v for v in wanted if not self._goes_on(v)]
        keep = {v.index for v in wanted} - {v.index for v in new}
        for index in [index for index in self._rings if index not in keep]:
            await self._stop(index)
        try:
            await self._start(features, new)
        except TransportLost as error:
            self.fail(str(error))
            raise
        except BridgeError:
            for vring in new:
                await self._stop(vring.index)
            raise
        self._enter_running()
        await signal_eventfds(*(fd for v in new for fd in (v.kick, v.call)))
        if self._config_changed:
            self._config_changed = False
            self.on_config_change()

    # QEMU's order: features, rings, enable, status.
    async def _start(self, features: int, vrings: Sequence[VringSetup]) -> None:
        if not self._rings:
            word = features | (_PF_BIT if self._has_protocol else 0)
            await self._client.request(Request.SET_FEATURES, U64(word))
            await self._add_status(Status.FEATURES_OK)
        for vring in vrings:
            await self._program(vring)
        for vring in vrings if self._has_protocol else ():
            enable = VringState(vring.index, int(vring.enabled))
            await self._client.request(Request.SET_VRING_ENABLE, enable)
        await self._add_status(
            Status.ACKNOWLEDGE | Status.DRIVER | Status.DRIVER_OK | Status.FEATURES_OK
        )

    def _goes_on(self, vring: VringSetup) -> bool:
        running = self._rings.get(vring.index)
        return running is not None and running.layout == vring.layout and vring.base == running.base

    def _with_base(self, vring: VringSetup) -> VringSetup:
        if vring.base is not None:
            return vring
        if vring.index in self._rings:
            return replace(vring, base=self._rings[vring.index].base)
        if vring.index in self._bases:
            return replace(vring, base=self._bases[vring.index])
        raise BridgeError(f"vring {vring.index} has no base to go on from")

    async def _add_status(self, bits: Status) -> None:
        if self._has(ProtocolFeature.STATUS):
            status = await self._client.request(Request.GET_STATUS)
            assert isinstance(status, U64)
            await self._client.request(Request.SET_STATUS, U64(status.value | bits))

    # In QEMU's order; back-ends start a ring when its kick arrives.
    async def _program(self, vring: VringSetup) -> None:
        request = self._client.request
        index = vring.index
        areas = (vring.descriptor_area, vring.device_area, vring.driver_area)
        await request(Request.SET_VRING_NUM, VringState(index, vring.size))
        await request(Request.SET_VRING_BASE, VringState(index, vring.base or 0))
        await request(Request.SET_VRING_ADDR, VringAddr(index, 0, *areas, 0))
        if vring.err is not None:
            await self._send_fd(Request.SET_VRING_ERR, index, vring.err)
        await self._send_fd(Request.SET_VRING_CALL, index, vring.call)
        # From the kick on it runs, whether or not we get to see the answer.
        self._rings[index] = vring
        await self._send_fd(Request.SET_VRING_KICK, index, vring.kick)

    async def _send_fd(self, request: Request, index: int, fd: OwnedFd | None) -> None:
        fds = [] if fd is None else [fd]
        await self._client.request(request, VringFd(index, fd is not None), fds)

    async def stop_vring(self, index: int) -> int:
        await self._stop(index)
        if not self._rings and self.state is State.RUNNING:
            self._enter(Verb.SUSPEND)
        if index not in self._bases:
            raise BridgeError(f"vring {index} was never started")
        return self._bases[index]

    # The back-end answers once all requests of the ring are complete.
    async def _stop(self, index: int) -> None:
        if index not in self._rings:
            return
        reply = await self._client.request(Request.GET_VRING_BASE, VringState(index, 0))
        assert isinstance(reply, VringState)
        if reply.index != index:
            self.fail(f"the back-end answered for vring {reply.index}, {index} was asked")
            raise PeerError(f"back-end {self.info.target}: {self.failure}")
        self._bases[index] = reply.num
        del self._rings[index]

    async def suspend(self) -> None:
        step(self.state, Verb.SUSPEND)
        for index in list(self._rings):
            await self._stop(index)
        self._enter(Verb.SUSPEND)

    async def reset(self) -> None:
        step(self.state, Verb.RESET)
        for index in list(self._rings):
            await self._stop(index)
        if self._bases:
            if self._has(ProtocolFeature.STATUS):
                await self._client.request(Request.SET_STATUS, U64(0))
            if self._has(ProtocolFeature.RESET_DEVICE):
                await self._client.request(Request.RESET_DEVICE)
        self._bases.clear()
        self._enter(Verb.RESET)

    # Changes while running

    async def set_call(self, index: int, fd: OwnedFd | None) -> None:
        if vring := self._rings.get(index):
            await self._send_fd(Request.SET_VRING_CALL, index, fd)
            self._rings[index] = replace(vring, call=fd)
            await signal_eventfds(fd)

    async def set_kick(self, index: int, fd: OwnedFd | None) -> None:
        if vring := self._rings.get(index):
            await self._send_fd(Request.SET_VRING_KICK, index, fd)
            self._rings[index] = replace(vring, kick=fd)
            await signal_eventfds(fd)

    async def set_err(self, index: int, fd: OwnedFd | None) -> None:
        if (vring := self._rings.get(index)) and fd is not None:
            await self._send_fd(Request.SET_VRING_ERR, index, fd)
            self._rings[index] = replace(vring, err=fd)

    async def set_enabled(self, index: int, enabled: bool) -> None:
        vring = self._rings.get(index)
        if vring is None or vring.enabled == enabled or not self._has_protocol:
            return
        await self._client.request(Request.SET_VRING_ENABLE, VringState(index, int(enabled)))
        self._rings[index] = replace(vring, enabled=enabled)
        if enabled:
            await signal_eventfds(vring.kick)

    async def aclose(self) -> None:
        self.state = State.CLOSED
        self._client.close()


def _wire_region(region: MemoryRegion) -> Region:
    return Region(region.guest_address, region.size, region.guest_address, region.offset)


def _capabilities(offered: ProtocolFeature) -> Capabilities:
    native = How.NATIVE
    no = Ability(How.NO, "not implemented yet")
    return Capabilities(
        suspend=Ability(native, "GET_VRING_BASE on every vring"),
        resume=Ability(native, "vrings set up and kicked again"),
        save=no,
        load=no,
        inflight=Ability(native, "INFLIGHT_SHMFD")
        if ProtocolFeature.INFLIGHT_SHMFD in offered
        else Ability(How.NO, "the back-end does not offer INFLIGHT_SHMFD"),
        dirty_log=Ability(native, "LOG_SHMFD")
        if ProtocolFeature.LOG_SHMFD in offered
        else Ability(How.NO, "the back-end does not offer LOG_SHMFD"),
        memory_hotplug=Ability(native, "CONFIGURE_MEM_SLOTS")
        if ProtocolFeature.CONFIGURE_MEM_SLOTS in offered
        else Ability(How.EMULATED, f"the whole table is sent again, {MAX_REGIONS} regions at most"),
        vring_stop=Ability(native, "GET_VRING_BASE"),
    )


@asynccontextmanager
async def open_vhost_user(target: str, path: str) -> AsyncIterator[VhostUserDevice]:
    """Connect to the back-end that listens on ``path`` for the block's length.

    Raises:
        TargetError: nobody listens there.
        PeerError: what listens there does not speak vhost-user as a back-end.
    """
    async with _client(await connect(path), target) as device:
        yield device


@asynccontextmanager
async def await_vhost_user(target: str, path: str) -> AsyncIterator[VhostUserDevice]:
    """Listen on ``path`` and wait for a back-end that connects (OVS and DPDK in client mode).

    Raises:
        TargetError: ``path`` can't be bound.
    """
    listener = listen(path)
    try:
        sock, _ = await listener.accept()
    finally:
        unlisten(listener, path)
    async with _client(sock, target) as device:
        yield device


@asynccontextmanager
async def adopt_vhost_user(target: str, fd: int) -> AsyncIterator[VhostUserDevice]:
    """Like ``open_vhost_user``, on a connected socket that this process inherited.

    Raises:
        TargetError: ``fd`` is no connected UNIX stream socket.
    """
    async with _client(adopt(fd), target) as device:
        yield device


@asynccontextmanager
async def _client(sock: trio.socket.SocketType, target: str) -> AsyncIterator[VhostUserDevice]:
    client = Client(sock, target)
    device: VhostUserDevice | None = None
    lost: BridgeError | None = None
    # Who is cancelled still has to stop the device, and needs the answers for that.
    reading = trio.CancelScope(shield=True)

    async def serve() -> None:
        nonlocal lost
        with reading:
            lost = await client.serve()
            if device is not None and device.state is not State.CLOSED:
                device.fail(str(lost))
                device.on_failure(device.failure)

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            try:
                device = await _handshake(client, target)
                if lost is not None:
                    raise lost
                nursery.start_soon(client.serve_reverse)
                yield device
            finally:
                reading.cancel()
            nursery.cancel_scope.cancel()
    finally:
        client.close()
        if device is not None:
            device.state = State.CLOSED


# QEMU's order of a connection.
async def _handshake(client: Client, target: str) -> VhostUserDevice:
    features = await _u64(client, Request.GET_FEATURES)
    offered = ProtocolFeature(0)
    if features & _PF_BIT:
        offered = ProtocolFeature(await _u64(client, Request.GET_PROTOCOL_FEATURES))
        wanted = offered & _WANTED
        await client.request(Request.SET_PROTOCOL_FEATURES, U64(int(wanted)))
        client.protocol = wanted
    has = client.protocol.__contains__
    queues = await _u64(client, Request.GET_QUEUE_NUM) if has(ProtocolFeature.MQ) else 1
    slots = MAX_REGIONS
    if has(ProtocolFeature.CONFIGURE_MEM_SLOTS):
        slots = await _u64(client, Request.GET_MAX_MEM_SLOTS)
    if has(ProtocolFeature.BACKEND_REQ):
        await client.open_reverse()
    await client.request(Request.SET_OWNER)
    info = DeviceInfo(
        target=target,
        device_id=None,
        features=features & ~VHOST_ONLY_FEATURES,
        vring_limit=VRING_LIMIT,
        queue_num=queues,
        vring_size_max=32768,
        config_size=MAX_CONFIG if has(ProtocolFeature.CONFIG) else 0,
        iova_first=0,
        iova_last=2**64 - 1,
        region_max=slots,
        forwards_mtu=has(ProtocolFeature.NET_MTU),
        forwards_rarp=has(ProtocolFeature.RARP),
    )
    return VhostUserDevice(client, info, features, offered)


async def _u64(client: Client, request: Request) -> int:
    reply = await client.request(request)
    assert isinstance(reply, U64)
    return reply.value
