"""Sans-IO codec of vhost-user: bytes and descriptors in, messages out, for both roles.

A reader that takes bytes as they come hands one message's descriptors to another. So the decoder
says how many bytes it wants next (``bytes_desired``), first a header, then exactly its payload:
one ``recvmsg`` never crosses into the next message.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from vhostbridge.backends.errors import PeerError
from vhostbridge.backends.fds import OwnedFd, close_all

from .messages import HEADER, MAX_PAYLOAD, BackendRequest, Flags, Request
from .payloads import U64, Payload, Raw
from .specs import FRONTEND_SPECS, Spec


@dataclass(slots=True)
class Message:
    """One decoded message. Its receiver owns ``fds`` and closes what it does not take.

    ``request`` is a plain number when the table does not know it; ``payload`` is ``Raw`` then.
    """

    request: int
    payload: Payload
    fds: list[OwnedFd] = field(default_factory=list)
    need_reply: bool = False

    @property
    def name(self) -> str:
        return self.request.name if isinstance(self.request, IntEnum) else f"request {self.request}"

    def take_fd(self) -> OwnedFd | None:
        """The first descriptor, now the caller's, or ``None``."""
        return self.fds.pop(0) if self.fds else None

    def close(self) -> None:
        """Close the descriptors that nobody took."""
        close_all(self.fds)
        self.fds.clear()


class Decoder:
    """Turns one direction of one channel into messages.

    Args:
        specs: ``FRONTEND_SPECS`` or ``BACKEND_SPECS``: whose requests this channel carries.
        replies: whether this end receives the replies (it sends the requests) or the requests.
        peer: what errors call the other side.

    Any error is final: the stream has lost its framing or its peer's trust.
    """

    def __init__(self, specs: Mapping[int, Spec], *, replies: bool, peer: str) -> None:
        self._specs = specs
        self._names: type[IntEnum] = Request if specs is FRONTEND_SPECS else BackendRequest
        self._replies = replies
        self._peer = peer
        self._buffer = bytearray()
        self._fds: list[OwnedFd] = []
        self._wanted = HEADER.size

    def bytes_desired(self) -> int:
        """How many bytes may be read next without touching the following message."""
        return self._wanted - len(self._buffer)

    @property
    def at_boundary(self) -> bool:
        """Whether the stream may end here without cutting a message."""
        return not self._buffer

    def close(self) -> None:
        """Close descriptors of a message that never became whole."""
        close_all(self._fds)
        self._fds.clear()

    def receive(self, data: bytes, fds: Sequence[OwnedFd] = ()) -> Message | None:
        """Take what one ``recvmsg`` gave; the message, once it is whole.

        Owns ``fds`` from here on, also when it raises.

        Raises:
            PeerError: the bytes or descriptors break the protocol.
        """
        late = bool(self._buffer) and bool(fds)
        self._fds.extend(fds)
        try:
            if late:
                raise self._error("sent file descriptors in the middle of a message")
            if len(data) > self.bytes_desired():
                raise ValueError("more bytes than desired")
            self._buffer += data
            if len(self._buffer) == HEADER.size == self._wanted:
                self._wanted += self._payload_size()
            if len(self._buffer) < self._wanted:
                return None
            return self._message()
        except BaseException:
            self.close()
            raise

    def _error(self, what: str) -> PeerError:
        return PeerError(f"the {self._peer} {what}", "this is a bug or an attack of the peer")

    # What the header announces, before anything of that size is allocated.
    def _payload_size(self) -> int:
        request, flags, size = HEADER.unpack_from(self._buffer)
        if flags & Flags.VERSION_MASK != Flags.VERSION:
            raise self._error(f"speaks protocol version {flags & Flags.VERSION_MASK}, not 1")
        if bool(flags & Flags.REPLY) != self._replies:
            kind = "a request" if self._replies else "a reply"
            raise self._error(f"sent {kind} ({self._name(request)}) where the other was due")
        if size > MAX_PAYLOAD:
            raise self._error(
                f"announced {size} bytes for {self._name(request)}, at most {MAX_PAYLOAD} are taken"
            )
        return int(size)

    def _name(self, request: int) -> str:
        return self._names(request).name if request in self._specs else f"request {request}"

    def _message(self) -> Message:
        request, flags, _ = HEADER.unpack_from(self._buffer)
        body = bytes(self._buffer[HEADER.size :])
        self._buffer.clear()
        self._wanted = HEADER.size
        fds, self._fds = self._fds, []
        message = Message(request, Raw(body), fds, bool(flags & Flags.NEED_REPLY))
        try:
            spec = self._specs.get(request)
            if spec is not None:
                message.request = self._names(request)
                self._check_fds(message, spec)
                message.payload = self._payload_type(spec).unpack(body)
        except ValueError as error:
            message.close()
            raise self._error(f"sent a malformed {message.name}: {error}") from None
        except PeerError:
            message.close()
            raise
        return message

    def _payload_type(self, spec: Spec) -> type[Payload]:
        return (spec.reply or U64) if self._replies else spec.payload

    def _check_fds(self, message: Message, spec: Spec) -> None:
        low, high = spec.reply_fds if self._replies else spec.fds
        if not low <= len(message.fds) <= high:
            raise self._error(
                f"sent {message.name} with {len(message.fds)} file descriptors, "
                + (f"{low} belong to it" if low == high else f"{low} to {high} belong to it")
            )


def encode_request(request: IntEnum, payload: Payload, *, need_reply: bool = False) -> bytes:
    """A request's bytes; its descriptors go with the first of them."""
    flags = Flags.VERSION | (Flags.NEED_REPLY if need_reply else Flags(0))
    return _encode(request, flags, payload)


def encode_reply(request: int, payload: Payload) -> bytes:
    """A reply's bytes. The flags are exactly VERSION | REPLY: peers compare for equality."""
    return _encode(request, Flags.VERSION | Flags.REPLY, payload)


def _encode(request: int, flags: int, payload: Payload) -> bytes:
    body = payload.pack()
    return HEADER.pack(request, flags, len(body)) + body
