"""One message of a front-end: whether it may be sent, who handles it, how it is answered."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING

from vhostbridge.backends.errors import BridgeError, PeerError
from vhostbridge.backends.fds import close_all
from vhostbridge.backends.vhostuser.messages import ProtocolFeature, Request
from vhostbridge.backends.vhostuser.payloads import U64, Config, Payload
from vhostbridge.backends.vhostuser.specs import FRONTEND_SPECS

if TYPE_CHECKING:
    from vhostbridge.backends.vhostuser.channel import Channel
    from vhostbridge.backends.vhostuser.codec import Message

    from .session import Session

Handler = Callable[["Session", "Message"], Awaitable[Payload | None]]


async def dispatch(
    session: Session, channel: Channel, handlers: Mapping[int, Handler], message: Message
) -> None:
    """Do what a message says, and answer it where it is to be answered.

    Raises:
        BridgeError: it can't be done, and the protocol has no way to say so; or the device failed.
    """
    try:
        handler = handlers.get(message.request)
        _check_negotiated(session.protocol, message)
        if handler is None:
            raise PeerError(f"the front-end sent {message.name}, which the bridge does not know")
        reply = await handler(session, message)
    except BridgeError as error:
        refusal = _refusal(session.protocol, message)
        if refusal is None or session.device.failed.is_set():
            raise
        if session.telling.spare():
            session.log.warning("%s: refused %s: %s", session.name, message.name, error)
        reply = refusal
    if reply is None and _wants_ack(session.protocol, message):
        reply = U64(0)
    if reply is not None:
        fds, session.reply_fds = session.reply_fds, []
        try:
            await channel.send_reply(message.request, reply, fds)
        finally:
            close_all(fds)


def _check_negotiated(protocol: ProtocolFeature, message: Message) -> None:
    spec = FRONTEND_SPECS.get(message.request)
    if spec is not None and spec.needs is not None and spec.needs not in protocol:
        raise PeerError(
            f"the front-end sent {message.name} without having negotiated {spec.needs.name}"
        )


def _wants_ack(protocol: ProtocolFeature, message: Message) -> bool:
    spec = FRONTEND_SPECS.get(message.request)
    native = spec is not None and spec.reply is not None
    return message.need_reply and not native and ProtocolFeature.REPLY_ACK in protocol


# How to say no; None where the protocol has no way to, and only hanging up is left.
def _refusal(protocol: ProtocolFeature, message: Message) -> Payload | None:
    if message.request == Request.GET_CONFIG:
        return Config(0, 0, b"")
    return U64(1) if _wants_ack(protocol, message) else None
