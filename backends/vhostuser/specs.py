"""What each message looks like and what it needs: one row a message, no exceptions in code.

``reply`` is the payload of a message that is always answered; ``None`` means that it is answered
(with a ``U64``, 0 for success) only when NEED_REPLY asks for it. ``fds`` and ``reply_fds`` are the
allowed numbers of descriptors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from . import payloads as p
from .messages import BackendRequest, ProtocolFeature, Request
from .payloads import Payload


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
    Request.GET_FEATURES: Spec(p.Empty, reply=p.U64),
    Request.SET_FEATURES: Spec(p.U64),
    Request.SET_OWNER: Spec(p.Empty),
    Request.RESET_OWNER: Spec(p.Empty),
    Request.SET_MEM_TABLE: Spec(p.MemTable, fds=(0, p.MAX_REGIONS)),
    Request.SET_LOG_BASE: Spec(p.Log, fds=(0, 1), reply=p.Raw, needs=_PF.LOG_SHMFD),
    Request.SET_LOG_FD: Spec(p.Empty, fds=(1, 1)),
    Request.SET_VRING_NUM: Spec(p.VringState),
    Request.SET_VRING_ADDR: Spec(p.VringAddr),
    Request.SET_VRING_BASE: Spec(p.VringState),
    Request.GET_VRING_BASE: Spec(p.VringState, reply=p.VringState),
    Request.SET_VRING_KICK: Spec(p.VringFd, fds=(0, 1)),
    Request.SET_VRING_CALL: Spec(p.VringFd, fds=(0, 1)),
    Request.SET_VRING_ERR: Spec(p.VringFd, fds=(0, 1)),
    Request.GET_PROTOCOL_FEATURES: Spec(p.Empty, reply=p.U64),
    Request.SET_PROTOCOL_FEATURES: Spec(p.U64),
    Request.GET_QUEUE_NUM: Spec(p.Empty, reply=p.U64, needs=_PF.MQ),
    Request.SET_VRING_ENABLE: Spec(p.VringState),
    Request.SEND_RARP: Spec(p.U64, needs=_PF.RARP),
    Request.NET_SET_MTU: Spec(p.U64, needs=_PF.NET_MTU),
    Request.SET_BACKEND_REQ_FD: Spec(p.Empty, fds=(1, 1), needs=_PF.BACKEND_REQ),
    Request.IOTLB_MSG: Spec(p.Iotlb, reply=p.U64),
    Request.SET_VRING_ENDIAN: Spec(p.VringState, needs=_PF.CROSS_ENDIAN),
    Request.GET_CONFIG: Spec(p.Config, reply=p.Config, needs=_PF.CONFIG),
    Request.SET_CONFIG: Spec(p.Config, needs=_PF.CONFIG),
    Request.CREATE_CRYPTO_SESSION: Spec(p.Raw, reply=p.Raw, needs=_PF.CRYPTO_SESSION),
    Request.CLOSE_CRYPTO_SESSION: Spec(p.U64, needs=_PF.CRYPTO_SESSION),
    Request.POSTCOPY_ADVISE: Spec(p.Empty, reply=p.Raw, reply_fds=(0, 1), needs=_PF.PAGEFAULT),
    Request.POSTCOPY_LISTEN: Spec(p.Empty, needs=_PF.PAGEFAULT),
    Request.POSTCOPY_END: Spec(p.Empty, reply=p.U64, needs=_PF.PAGEFAULT),
    Request.GET_INFLIGHT_FD:
        Spec(p.Inflight, reply=p.Inflight, reply_fds=(0, 1), needs=_PF.INFLIGHT_SHMFD),
    Request.SET_INFLIGHT_FD: Spec(p.Inflight, fds=(1, 1), needs=_PF.INFLIGHT_SHMFD),
    Request.GPU_SET_SOCKET: Spec(p.Empty, fds=(1, 1)),
    Request.RESET_DEVICE: Spec(p.Empty, needs=_PF.RESET_DEVICE),
    Request.VRING_KICK: Spec(p.VringState, needs=_PF.INBAND_NOTIFICATIONS),
    Request.GET_MAX_MEM_SLOTS: Spec(p.Empty, reply=p.U64, needs=_PF.CONFIGURE_MEM_SLOTS),
    Request.ADD_MEM_REG: Spec(p.MemReg, fds=(0, 1), needs=_PF.CONFIGURE_MEM_SLOTS),
    Request.REM_MEM_REG: Spec(p.MemReg, fds=(0, 1), needs=_PF.CONFIGURE_MEM_SLOTS),
    Request.SET_STATUS: Spec(p.U64, needs=_PF.STATUS),
    Request.GET_STATUS: Spec(p.Empty, reply=p.U64, needs=_PF.STATUS),
    Request.GET_SHARED_OBJECT:
        Spec(p.Uuid, reply=p.Raw, reply_fds=(0, 1), needs=_PF.SHARED_OBJECT),
    Request.SET_DEVICE_STATE_FD: Spec(
        p.StateTransfer, fds=(1, 1), reply=p.U64, reply_fds=(0, 1), needs=_PF.DEVICE_STATE),
    Request.CHECK_DEVICE_STATE: Spec(p.Empty, reply=p.U64, needs=_PF.DEVICE_STATE),
    Request.GET_SHMEM_CONFIG: Spec(p.Empty, reply=p.ShmemConfig, needs=_PF.SHMEM),
})

BACKEND_SPECS: Mapping[int, Spec] = MappingProxyType({
    BackendRequest.IOTLB_MSG: Spec(p.Iotlb),
    BackendRequest.CONFIG_CHANGE_MSG: Spec(p.Empty, needs=_PF.CONFIG),
    BackendRequest.VRING_HOST_NOTIFIER_MSG:
        Spec(p.VringArea, fds=(0, 1), needs=_PF.HOST_NOTIFIER),
    BackendRequest.VRING_CALL: Spec(p.VringState, needs=_PF.INBAND_NOTIFICATIONS),
    BackendRequest.VRING_ERR: Spec(p.VringState, needs=_PF.INBAND_NOTIFICATIONS),
    BackendRequest.SHARED_OBJECT_ADD: Spec(p.Uuid, needs=_PF.SHARED_OBJECT),
    BackendRequest.SHARED_OBJECT_REMOVE: Spec(p.Uuid, needs=_PF.SHARED_OBJECT),
    BackendRequest.SHARED_OBJECT_LOOKUP:
        Spec(p.Uuid, reply=p.U64, reply_fds=(0, 1), needs=_PF.SHARED_OBJECT),
    BackendRequest.SHMEM_MAP: Spec(p.Mmap, fds=(1, 1), needs=_PF.SHMEM),
    BackendRequest.SHMEM_UNMAP: Spec(p.Mmap, needs=_PF.SHMEM),
})
# fmt: on
