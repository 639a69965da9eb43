"""Coming to a connection with a back-end, and asking it what it is."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from vhostbridge.backends.device import DeviceInfo
from vhostbridge.backends.errors import BridgeError
from vhostbridge.backends.lifecycle import Ability, Capabilities, How, State
from vhostbridge.backends.trace import OFF, Tracer
from vhostbridge.backends.virtio import VHOST_ONLY_FEATURES, TransportFeature

from .client import Client
from .device import VhostUserDevice
from .messages import ProtocolFeature, Request
from .payloads import MAX_CONFIG, MAX_REGIONS, U64
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
    | ProtocolFeature.DEVICE_STATE
    | ProtocolFeature.LOG_SHMFD
    | ProtocolFeature.INFLIGHT_SHMFD
)

# The protocol counts a ring index in 8 bits.
VRING_LIMIT = 256


@asynccontextmanager
async def open_vhost_user(
    target: str, path: str, device_id: int | None = None, trace: Tracer = OFF
) -> AsyncIterator[VhostUserDevice]:
    """Connect to the back-end that listens on ``path`` for the block's length.

    Raises:
        TargetError: nobody listens there.
        PeerError: what listens there does not speak vhost-user as a back-end.
    """
    async with _client(await connect(path), target, device_id, trace) as device:
        yield device


@asynccontextmanager
async def await_vhost_user(
    target: str, path: str, device_id: int | None = None, trace: Tracer = OFF
) -> AsyncIterator[VhostUserDevice]:
    """Listen on ``path`` and wait for a back-end that connects (OVS and DPDK in client mode).

    Raises:
        TargetError: ``path`` can't be bound.
    """
    listener = listen(path)
    try:
        sock, _ = await listener.accept()
    finally:
        unlisten(listener, path)
    async with _client(sock, target, device_id, trace) as device:
        yield device


@asynccontextmanager
async def adopt_vhost_user(
    target: str, fd: int, device_id: int | None = None, trace: Tracer = OFF
) -> AsyncIterator[VhostUserDevice]:
    """Like ``open_vhost_user``, on a connected socket that this process inherited.

    Raises:
        TargetError: ``fd`` is no connected UNIX stream socket.
    """
    async with _client(adopt(fd), target, device_id, trace) as device:
        yield device


@asynccontextmanager
async def _client(
    sock: trio.socket.SocketType, target: str, device_id: int | None, trace: Tracer
) -> AsyncIterator[VhostUserDevice]:
    client = Client(sock, target, trace)
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

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            try:
                device = await _handshake(client, target, device_id)
                device.trace = trace
                device.process = client.peer_pid
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
            device.close()


# QEMU's order of a connection.
async def _handshake(client: Client, target: str, device_id: int | None) -> VhostUserDevice:
    features = await _u64(client, Request.GET_FEATURES)
    offered = ProtocolFeature(0)
    if features & TransportFeature.PROTOCOL_FEATURES.mask:
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
        device_id=device_id,
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
    return VhostUserDevice(client, info, _capabilities(features, offered), features, offered)


async def _u64(client: Client, request: Request) -> int:
    reply = await client.request(request)
    assert isinstance(reply, U64)
    return reply.value


def _capabilities(features: int, offered: ProtocolFeature) -> Capabilities:
    native = How.NATIVE
    logs = ProtocolFeature.LOG_SHMFD in offered and features & TransportFeature.LOG_ALL.mask
    how = (
        "vring positions and the back-end's own state (DEVICE_STATE)"
        if ProtocolFeature.DEVICE_STATE in offered
        else "vring positions; the back-end has no state of its own to give (no DEVICE_STATE)"
    )
    return Capabilities(
        suspend=Ability(native, "GET_VRING_BASE on every vring"),
        resume=Ability(native, "vrings set up and kicked again"),
        save=Ability(native, how),
        load=Ability(native, how),
        inflight=Ability(native, "INFLIGHT_SHMFD")
        if ProtocolFeature.INFLIGHT_SHMFD in offered
        else Ability(How.NO, "the back-end does not offer INFLIGHT_SHMFD"),
        dirty_log=Ability(native, "LOG_SHMFD")
        if logs
        else Ability(How.EMULATED, "shadow vrings: the back-end does not log (LOG_SHMFD, LOG_ALL)"),
        memory_hotplug=Ability(native, "CONFIGURE_MEM_SLOTS")
        if ProtocolFeature.CONFIGURE_MEM_SLOTS in offered
        else Ability(How.EMULATED, f"the whole table is sent again, {MAX_REGIONS} regions at most"),
        vring_stop=Ability(native, "GET_VRING_BASE"),
    )
