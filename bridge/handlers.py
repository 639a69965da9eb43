"""What each front-end message does: one small function a message, and the table of them.

A handler returns the payload of a message's own reply, or ``None``; the session acknowledges. It
takes the descriptors it keeps out of the message, and only once nothing can fail any more.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from types import MappingProxyType

import trio

from vhostbridge.backends.dirty_log import DirtyLog
from vhostbridge.backends.errors import BridgeError, PeerError, Unsupported
from vhostbridge.backends.fds import OwnedFd, is_eventfd
from vhostbridge.backends.guest import whole_base
from vhostbridge.backends.lifecycle import State, Status
from vhostbridge.backends.vhostuser.channel import Channel
from vhostbridge.backends.vhostuser.codec import Message
from vhostbridge.backends.vhostuser.messages import ProtocolFeature, Request
from vhostbridge.backends.vhostuser.payloads import (
    U64,
    Config,
    Log,
    MemReg,
    MemTable,
    Payload,
    VringAddr,
    VringFd,
    VringState,
)
from vhostbridge.backends.vhostuser.specs import BACKEND_SPECS
from vhostbridge.backends.virtio import TransportFeature

from .departure import give_up
from .device_state import check_device_state, set_device_state_fd
from .dispatch import Handler
from .incoming import Origin
from .inflight import get_inflight_fd, set_inflight_fd
from .memory import guest_region, table_of
from .offer import check_features, offered_features, offered_protocol, told_queues
from .session import Session
from .vring import FrontendVring

_LOG_ALL = TransportFeature.LOG_ALL.mask


def _u64(message: Message) -> int:
    assert isinstance(message.payload, U64)
    return message.payload.value


def _state(message: Message) -> VringState:
    assert isinstance(message.payload, VringState)
    return message.payload


# Negotiation


async def get_features(session: Session, message: Message) -> Payload:
    return U64(offered_features(session.device))


async def set_features(session: Session, message: Message) -> None:
    features = _u64(message)
    check_features(session.device, features)
    if (features ^ session.features) & ~_LOG_ALL:
        for vring in session.vrings.values():
            await _stopped(session, vring, "features")
    if session.features and (features ^ session.features) & TransportFeature.RING_PACKED.mask:
        for vring in session.vrings.values():
            vring.forget_layout()
    before, session.features = session.features, features
    if (features ^ before) & _LOG_ALL:
        try:
            await session.update_log(session.log_to)
        except BridgeError:
            session.features = before
            raise
    if not features & TransportFeature.PROTOCOL_FEATURES.mask:
        for vring in session.vrings.values():
            vring.enabled = True


async def get_protocol_features(session: Session, message: Message) -> Payload:
    return U64(int(offered_protocol(session.device)))


async def set_protocol_features(session: Session, message: Message) -> None:
    acked = _u64(message)
    # As numbers: the complement of flags leaves out the bits that have no name.
    extra = acked & ~int(offered_protocol(session.device))
    if extra:
        raise PeerError(
            "the front-end acks protocol features that were not offered: "
            f"{ProtocolFeature(extra)!r}"
        )
    session.protocol = ProtocolFeature(acked)


async def get_queue_num(session: Session, message: Message) -> Payload:
    return U64(told_queues(session.device, session.protocol))


async def get_max_mem_slots(session: Session, message: Message) -> Payload:
    return U64(session.device.info.region_max)


async def nothing(session: Session, message: Message) -> None:
    """SET_OWNER, and RESET_OWNER which is deprecated and best ignored."""


async def set_backend_req_fd(session: Session, message: Message) -> None:
    fd = message.fds[0]
    try:
        sock = socket.socket(fileno=fd.fileno())
    except OSError:
        raise PeerError("the descriptor of SET_BACKEND_REQ_FD is not a socket") from None
    if (sock.family, sock.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
        sock.detach()
        raise PeerError("the descriptor of SET_BACKEND_REQ_FD is not a UNIX stream socket")
    message.fds.pop().detach()
    if session.reverse is not None:
        session.reverse.close()
    session.reverse = Channel(
        trio.socket.from_stdlib_socket(sock),
        BACKEND_SPECS,
        replies=True,
        peer="front-end",
        trace=session.trace,
    )


# Memory


async def set_mem_table(session: Session, message: Message) -> None:
    assert isinstance(message.payload, MemTable)
    await session.set_memory(table_of(message.payload.regions, message.fds))
    message.fds.clear()


async def add_mem_reg(session: Session, message: Message) -> None:
    assert isinstance(message.payload, MemReg)
    if len(session.memory) >= session.device.info.region_max:
        raise Unsupported(f"all {session.device.info.region_max} memory slots are in use")
    region = guest_region(message.payload.region, message.fds[0] if message.fds else None)
    await session.set_memory(session.memory.with_region(region))
    message.fds.clear()


async def set_log_base(session: Session, message: Message) -> Payload:
    place = message.payload
    assert isinstance(place, Log)
    if not message.fds:
        raise PeerError("SET_LOG_BASE came without a file descriptor")
    # A copy: the message is done again if the device goes away over it.
    fd = message.fds[0].dup()
    try:
        log = DirtyLog(fd, place.offset, place.size)
    except BaseException:
        fd.close()
        raise
    try:
        await session.update_log(log)
    except BaseException:
        log.close()
        raise
    # What rust-vmm's library waits for, all of it. QEMU takes whatever comes.
    return place


async def rem_mem_reg(session: Session, message: Message) -> None:
    assert isinstance(message.payload, MemReg)
    await session.set_memory(session.memory.without(message.payload.region))


# Vrings


# libkrun disables the vrings when its guest resets the device, and does not stop them before it
# sets them up for the next driver.
async def _stopped(session: Session, vring: FrontendVring, what: str) -> FrontendVring:
    if vring.running and session.paused:
        vring.stop(await session.device.stop_vring(vring.index), keep_call=True)
    if vring.running:
        raise PeerError(
            f"the front-end changes the {what} of vring {vring.index} while it runs",
            "GET_VRING_BASE stops it first",
        )
    return vring


async def set_vring_num(session: Session, message: Message) -> None:
    state = _state(message)
    vring = session.vring(state.index)
    vring.check_size(state.num, session.device.info, session.packed)
    if state.num != vring.size:
        (await _stopped(session, vring, "size")).size = state.num


async def set_vring_base(session: Session, message: Message) -> None:
    state = _state(message)
    vring = await _stopped(session, session.vring(state.index), "base")
    if state.num > 0xFFFF and not session.packed:
        raise PeerError(f"base {state.num:#x} of split vring {state.index} has more than 16 bits")
    vring.base = whole_base(state.num, packed=session.packed)


async def set_vring_addr(session: Session, message: Message) -> None:
    address = message.payload
    assert isinstance(address, VringAddr)
    vring = session.vring(address.index)
    if vring.size == 0:
        raise PeerError(f"SET_VRING_ADDR of vring {vring.index} came before SET_VRING_NUM")
    before, vring.address = vring.address, address
    try:
        if len(session.memory):
            vring.setup(session.memory, session.packed)
        # The same addresses come again when logging is switched; other ones need a pause.
        if (None if before is None else before.log_place) != address.log_place:
            await session.update_log(session.log_to)
        if vring.running and before is not None and before.areas != address.areas:
            await session.device.suspend()
    except BridgeError:
        vring.address = before
        raise


async def get_vring_base(session: Session, message: Message) -> Payload:
    vring = session.vring(_state(message).index)
    if vring.running:
        vring.stop(await session.device.stop_vring(vring.index))
    else:
        vring.stop(vring.base)
    return VringState(vring.index, vring.start_base(session.packed))


def _take_eventfd(message: Message) -> tuple[int, OwnedFd | None]:
    payload = message.payload
    assert isinstance(payload, VringFd)
    if payload.has_fd != bool(message.fds):
        raise PeerError(
            f"{message.name} of vring {payload.index} announces "
            + ("a descriptor that is missing" if payload.has_fd else "none and brings one")
        )
    if message.fds and not is_eventfd(message.fds[0]):
        raise PeerError(f"the descriptor of {message.name}, vring {payload.index}, is no eventfd")
    return payload.index, message.fds[0] if message.fds else None


async def set_vring_kick(session: Session, message: Message) -> None:
    index, fd = _take_eventfd(message)
    vring = session.vring(index)
    if vring.running:
        await session.device.set_kick(index, fd)
    old, vring.kick = vring.kick, message.take_fd()
    vring.set_up = True
    if old is not None:
        old.close()


async def set_vring_call(session: Session, message: Message) -> None:
    index, fd = _take_eventfd(message)
    vring = session.vring(index)
    if vring.running:
        await session.device.set_call(index, fd)
    old, vring.call = vring.call, message.take_fd()
    if old is not None:
        old.close()


async def set_vring_err(session: Session, message: Message) -> None:
    index, fd = _take_eventfd(message)
    vring = session.vring(index)
    if vring.running:
        await session.device.set_err(index, fd)
    old, vring.err = vring.err, message.take_fd()
    if old is not None:
        old.close()


async def set_vring_enable(session: Session, message: Message) -> None:
    state = _state(message)
    if state.num > 1:
        raise PeerError(f"SET_VRING_ENABLE of vring {state.index} with {state.num}, not 0 or 1")
    await session.enable(session.vring(state.index), bool(state.num))


# Device


async def get_config(session: Session, message: Message) -> Payload:
    config = message.payload
    assert isinstance(config, Config)
    data = await session.device.read_config(config.offset, len(config.data))
    session.absence.remember(config.offset, data)
    return Config(config.offset, config.flags, data)


async def set_config(session: Session, message: Message) -> None:
    config = message.payload
    assert isinstance(config, Config)
    await session.device.write_config(config.offset, config.data, config.flags)


async def get_status(session: Session, message: Message) -> Payload:
    return U64(session.status)


async def set_status(session: Session, message: Message) -> None:
    """0 stops every vring and keeps the device's state: QEMU asks for it after this."""
    status = _u64(message)
    if status > 0xFF:
        raise PeerError(f"status {status:#x} has more than 8 bits")
    before, session.status = session.status, status
    if status == 0:
        await session.stop_all()
        await _begin_anew(session, "the front-end resets the device (status 0)")
    elif status & ~before & Status.DRIVER_OK:
        try:
            await session.apply()
        except BridgeError:
            session.status = before
            raise


async def _begin_anew(session: Session, why: str) -> None:
    if session.incoming is not None and session.incoming.origin is Origin.KEPT:
        await give_up(session, why)


async def reset_device(session: Session, message: Message) -> None:
    """Everything is lost, but a state that was loaded and has not started: it is not the guest's.

    QEMU resets its devices before it starts a guest that it restores.
    """
    await _begin_anew(session, "the front-end resets the device")
    if session.incoming is None:
        if session.device.state is State.RUNNING:
            await session.device.suspend()
        await session.device.reset()
    session.forget_vrings()


async def send_rarp(session: Session, message: Message) -> None:
    await session.device.send_rarp(_u64(message))


async def net_set_mtu(session: Session, message: Message) -> None:
    await session.device.set_mtu(_u64(message))


HANDLERS: Mapping[int, Handler] = MappingProxyType(
    {
        Request.GET_FEATURES: get_features,
        Request.SET_FEATURES: set_features,
        Request.SET_OWNER: nothing,
        Request.RESET_OWNER: nothing,
        Request.SET_MEM_TABLE: set_mem_table,
        Request.SET_LOG_BASE: set_log_base,
        Request.SET_VRING_NUM: set_vring_num,
        Request.SET_VRING_ADDR: set_vring_addr,
        Request.SET_VRING_BASE: set_vring_base,
        Request.GET_VRING_BASE: get_vring_base,
        Request.SET_VRING_KICK: set_vring_kick,
        Request.SET_VRING_CALL: set_vring_call,
        Request.SET_VRING_ERR: set_vring_err,
        Request.GET_PROTOCOL_FEATURES: get_protocol_features,
        Request.SET_PROTOCOL_FEATURES: set_protocol_features,
        Request.GET_QUEUE_NUM: get_queue_num,
        Request.SET_VRING_ENABLE: set_vring_enable,
        Request.SEND_RARP: send_rarp,
        Request.NET_SET_MTU: net_set_mtu,
        Request.SET_BACKEND_REQ_FD: set_backend_req_fd,
        Request.GET_CONFIG: get_config,
        Request.SET_CONFIG: set_config,
        Request.GET_INFLIGHT_FD: get_inflight_fd,
        Request.SET_INFLIGHT_FD: set_inflight_fd,
        Request.RESET_DEVICE: reset_device,
        Request.GET_MAX_MEM_SLOTS: get_max_mem_slots,
        Request.ADD_MEM_REG: add_mem_reg,
        Request.REM_MEM_REG: rem_mem_reg,
        Request.SET_STATUS: set_status,
        Request.GET_STATUS: get_status,
        Request.SET_DEVICE_STATE_FD: set_device_state_fd,
        Request.CHECK_DEVICE_STATE: check_device_state,
    }
)
