"""GET_INFLIGHT_FD and SET_INFLIGHT_FD: the front-end keeps a buffer that says what is in flight."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vhostbridge.backends.errors import PeerError, Unsupported
from vhostbridge.backends.inflight import InflightBuffer
from vhostbridge.backends.vhostuser.payloads import Inflight, Payload
from vhostbridge.backends.virtio import VHOST_ONLY_FEATURES

if TYPE_CHECKING:
    from vhostbridge.backends.vhostuser.codec import Message

    from .session import Session


def _wanted(session: Session, message: Message) -> Inflight:
    wanted = message.payload
    assert isinstance(wanted, Inflight)
    info = session.device.info
    if not 0 < wanted.queues <= info.vring_limit:
        raise PeerError(
            f"{message.name} is for {wanted.queues} vrings, {info.target} has {info.vring_limit}"
        )
    if not 0 < wanted.queue_size <= info.vring_size_max:
        raise Unsupported(
            f"{message.name} is for vrings of {wanted.queue_size} entries, {info.target} has "
            f"{info.vring_size_max} at most",
            "lower the queue size of the front-end (queue-size=)",
        )
    return wanted


async def get_inflight_fd(session: Session, message: Message) -> Payload:
    wanted = _wanted(session, message)
    features = session.features & ~VHOST_ONLY_FEATURES
    buffer = await session.device.make_inflight(wanted.queues, wanted.queue_size, features)
    session.reply_fds.append(buffer.fd)
    return Inflight(buffer.size, buffer.offset, wanted.queues, wanted.queue_size)


async def set_inflight_fd(session: Session, message: Message) -> None:
    """It comes before every start, with what the front-end kept over ours or another's end."""
    wanted = _wanted(session, message)
    if any(vring.running for vring in session.vrings.values()):
        raise PeerError(
            "the front-end changes the in-flight buffer while vrings run",
            "GET_VRING_BASE stops them first",
        )
    buffer = InflightBuffer(
        message.fds[0], wanted.mmap_offset, wanted.mmap_size, wanted.queues, wanted.queue_size
    )
    session.use_inflight(buffer)
    message.fds.clear()
