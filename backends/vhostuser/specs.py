"""What each message looks like and what it needs: one row a message, no exceptions in code.

``reply`` is the payload of a message that is always answered; ``None`` means that it is answered
(with a ``U64``, 0 for success) only when NEED_REPLY asks for it. ``fds`` and ``reply_fds`` are the
allowed numbers of descriptors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from . import messages as m
from .messages import BackendRequest, Payload, ProtocolFeature, Request


@dataclass(frozen=True, slots=True)
class Spec:
    """One message: payloads, descriptor counts, and the protocol feature that unlocks it."""

    payload: type[Payload]
    fds: tuple[int, int] = (0, 0)
    reply: type[Payload] | None = None
    reply_fds: tuple[int, int] = (0, 0)
    needs: ProtocolFeature | None = None


_PF = ProtocolFeature

# fmt: off
FRONTEND_SPECS: Mapping[int, Spec] = MappingProxyType({
    Request.GET_FEATURES: Spec(m.Empty, reply=m.U64),
    Request.SET_FEATURES: Spec(m.U64),
    Request.SET_OWNER: Spec(m.Empty),
    Request.RESET_OWNER: Spec(m.Empty),
    Request.SET_MEM_TABLE: Spec(m.MemTable, fds=(0, m.MAX_REGIONS)),
    Request.SET_LOG_BASE: Spec(m.Log, fds=(0, 1), reply=m.Raw, needs=_PF.LOG_SHMFD),
    Request.SET_LOG_FD: Spec(m.Empty, fds=(1, 1)),
    Request.SET_VRING_NUM: Spec(m.VringState),
    Request.SET_VRING_ADDR: Spec(m.VringAddr),
    Request.SET_VRING_BASE: Spec(m.VringState),
    Request.GET_VRING_BASE: Spec(m.VringState, reply=m.VringState),
    Request.SET_VRING_KICK: Spec(m.VringFd, fds=(0, 1)),
    Request.SET_VRING_CALL: Spec(m.VringFd, fds=(0, 1)),
    Request.SET_VRING_ERR: Spec(m.VringFd, fds=(0, 1)),
    Request.GET_PROTOCOL_FEATURES: Spec(m.Empty, reply=m.U64),
    Request.SET_PROTOCOL_FEATURES: Spec(m.U64),
    Request.GET_QUEUE_NUM: Spec(m.Empty, reply=m.U64, needs=_PF.MQ),
    Request.SET_VRING_ENABLE: Spec(m.VringState),
    Request.SEND_RARP: Spec(m.U64, needs=_PF.RARP),
    Request.NET_SET_MTU: Spec(m.U64, needs=_PF.NET_MTU),
    Request.SET_BACKEND_REQ_FD: Spec(m.Empty, fds=(1, 1), needs=_PF.BACKEND_REQ),
    Request.IOTLB_MSG: Spec(m.Iotlb, reply=m.U64),
    Request.SET_VRING_ENDIAN: Spec(m.VringState, needs=_PF.CROSS_ENDIAN),
    Request.GET_CONFIG: Spec(m.Config, reply=m.Config, needs=_PF.CONFIG),
    Request.SET_CONFIG: Spec(m.Config, needs=_PF.CONFIG),
    Request.CREATE_CRYPTO_SESSION: Spec(m.Raw, reply=m.Raw, needs=_PF.CRYPTO_SESSION),
    Request.CLOSE_CRYPTO_SESSION: Spec(m.U64, needs=_PF.CRYPTO_SESSION),
    Request.POSTCOPY_ADVISE: Spec(m.Empty, reply=m.Raw, reply_fds=(0, 1), needs=_PF.PAGEFAULT),
    Request.POSTCOPY_LISTEN: Spec(m.Empty, needs=_PF.PAGEFAULT),
    Request.POSTCOPY_END: Spec(m.Empty, reply=m.U64, needs=_PF.PAGEFAULT),
    Request.GET_INFLIGHT_FD:
        Spec(m.Inflight, reply=m.Inflight, reply_fds=(0, 1), needs=_PF.INFLIGHT_SHMFD),
    Request.SET_INFLIGHT_FD: Spec(m.Inflight, fds=(1, 1), needs=_PF.INFLIGHT_SHMFD),
    Request.GPU_SET_SOCKET: Spec(m.Empty, fds=(1, 1)),
    Request.RESET_DEVICE: Spec(m.Empty, needs=_PF.RESET_DEVICE),
    Request.VRING_KICK: Spec(m.VringState, needs=_PF.INBAND_NOTIFICATIONS),
    Request.GET_MAX_MEM_SLOTS: Spec(m.Empty, reply=m.U64, needs=_PF.CONFIGURE_MEM_SLOTS),
    Request.ADD_MEM_REG: Spec(m.MemReg, fds=(0, 1), needs=_PF.CONFIGURE_MEM_SLOTS),
    Request.REM_MEM_REG: Spec(m.MemReg, fds=(0, 1), needs=_PF.CONFIGURE_MEM_SLOTS),
    Request.SET_STATUS: Spec(m.U64, needs=_PF.STATUS),
    Request.GET_STATUS: Spec(m.Empty, reply=m.U64, needs=_PF.STATUS),
    Request.GET_SHARED_OBJECT:
        Spec(m.Uuid, reply=m.Raw, reply_fds=(0, 1), needs=_PF.SHARED_OBJECT),
    Request.SET_DEVICE_STATE_FD: Spec(
        m.StateTransfer, fds=(1, 1), reply=m.U64, reply_fds=(0, 1), needs=_PF.DEVICE_STATE),
    Request.CHECK_DEVICE_STATE: Spec(m.Empty, reply=m.U64, needs=_PF.DEVICE_STATE),
    Request.GET_SHMEM_CONFIG: Spec(m.Empty, reply=m.ShmemConfig, needs=_PF.SHMEM),
})

BACKEND_SPECS: Mapping[int, Spec] = MappingProxyType({
    BackendRequest.IOTLB_MSG: Spec(m.Iotlb),
    BackendRequest.CONFIG_CHANGE_MSG: Spec(m.Empty, needs=_PF.CONFIG),
    BackendRequest.VRING_HOST_NOTIFIER_MSG:
        Spec(m.VringArea, fds=(0, 1), needs=_PF.HOST_NOTIFIER),
    BackendRequest.VRING_CALL: Spec(m.VringState, needs=_PF.INBAND_NOTIFICATIONS),
    BackendRequest.VRING_ERR: Spec(m.VringState, needs=_PF.INBAND_NOTIFICATIONS),
    BackendRequest.SHARED_OBJECT_ADD: Spec(m.Uuid, needs=_PF.SHARED_OBJECT),
    BackendRequest.SHARED_OBJECT_REMOVE: Spec(m.Uuid, needs=_PF.SHARED_OBJECT),
    BackendRequest.SHARED_OBJECT_LOOKUP:
        Spec(m.Uuid, reply=m.U64, reply_fds=(0, 1), needs=_PF.SHARED_OBJECT),
    BackendRequest.SHMEM_MAP: Spec(m.Mmap, fds=(1, 1), needs=_PF.SHMEM),
    BackendRequest.SHMEM_UNMAP: Spec(m.Mmap, needs=_PF.SHMEM),
})
# fmt: on
