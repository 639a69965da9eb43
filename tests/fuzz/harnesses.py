"""What the fuzzers of Python code do with one input; each raises what is a finding.

An input may be refused, with the error that is meant for it, and with every descriptor closed. One
that is taken must be what went in.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import cbor2

from vhostbridge.backends.errors import BridgeError, ConfigError, PeerError, StateError
from vhostbridge.backends.fds import OwnedFd
from vhostbridge.backends.state import LABEL, Chunk, Decoder, Encoder, Head
from vhostbridge.backends.state_items import MAX_CHUNK, Items
from vhostbridge.backends.vdpa.netlink_messages import Reply, decode
from vhostbridge.backends.vdpa.netlink_objects import (
    device_config_from,
    device_info_from,
    mgmt_device_from,
    queue_statistics_from,
)
from vhostbridge.backends.vhostuser.codec import Decoder as Codec
from vhostbridge.backends.vhostuser.messages import MAX_PAYLOAD
from vhostbridge.backends.vhostuser.specs import BACKEND_SPECS, FRONTEND_SPECS
from vhostbridge.bridge.config import load_config
from vhostbridge.bridge.control import Control
from vhostbridge.bridge.varlink import (
    FDS_MAX,
    Call,
    Framer,
    Service,
    VarlinkError,
    WireError,
    close_frames,
    decode_call,
    decode_reply,
)


class Pieces:
    """An input, cut into pieces as its own first bytes say."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def byte(self) -> int:
        piece = self.take(1)
        return piece[0] if piece else 0

    def take(self, size: int) -> bytes:
        piece = self._data[self._at : self._at + size]
        self._at += len(piece)
        return piece

    def rest(self) -> bytes:
        return self.take(len(self._data))

    def __iter__(self) -> Iterator[bytes]:
        """What is left, in pieces of one to 64 bytes."""
        while size := self.byte():
            yield self.take(size % 64 + 1)


def _descriptors(count: int) -> list[OwnedFd]:
    return [OwnedFd(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)) for _ in range(count)]


def codec(data: bytes) -> None:
    """Both roles of vhost-user, in pieces of any size, with descriptors anywhere."""
    pieces = Pieces(data)
    kind = pieces.byte()
    specs = BACKEND_SPECS if kind & 1 else FRONTEND_SPECS
    decoder = Codec(specs, replies=bool(kind & 2), peer="fuzzer")
    brought: list[OwnedFd] = []
    with suppress(PeerError):
        while size := pieces.byte():
            fds = _descriptors(size >> 6 if kind & 4 else 0)
            brought += fds
            # What a socket would give: not more than is wanted.
            piece = pieces.take(min(size % 64 + 1, decoder.bytes_desired()))
            message = decoder.receive(piece, fds)
            if message is not None:
                assert len(message.payload.pack()) <= MAX_PAYLOAD
                assert message.name
                message.close()
    decoder.close()
    assert all(fd.closed for fd in brought)


_SERVICE = Service([Control({}).interface()], {"vendor": "", "product": "", "version": ""})


def varlink(data: bytes) -> None:
    """The control socket's framing, calls and replies."""
    pieces = Pieces(data)
    fds = _descriptors(pieces.byte() % (FDS_MAX + 2))
    brought = list(fds)
    framer = Framer()
    frames = []
    with suppress(WireError):
        for piece in pieces:
            frames += framer.feed(piece, fds)
            fds = []
    for one in fds:
        one.close()
    for frame in frames:
        with suppress(WireError):
            decode_reply(frame)
        with suppress(WireError, VarlinkError):
            call = decode_call(frame)
            assert decode_call(frames[0].__class__(call.encode()[:-1], frame.fds)) == call
            _SERVICE.find(call)
    close_frames(frames)
    framer.close()
    assert all(fd.closed for fd in brought)


def varlink_call(data: bytes) -> None:
    """Calls of methods that are there, with any parameters."""
    pieces = Pieces(data)
    names = ["List", "Status", "Suspend", "Save", "Load", "Switch", "Nothing"]
    method = f"io.vhostbridge.Control.{names[pieces.byte() % len(names)]}"
    with suppress(WireError, VarlinkError):
        frame = Framer().feed(b'{"parameters":' + pieces.rest() + b"}\0")[0]
        parameters = decode_reply(frame).parameters
        _SERVICE.find(Call(method, parameters))


def _rightly_ended(raw: bytes) -> bytes:
    """The stream with the digest that belongs to it, if it has an end."""
    items = Items()
    items.feed(raw[len(LABEL) :])
    at = len(LABEL)
    with suppress(StateError, cbor2.CBORError, ValueError):
        while (item := items.take()) is not None:
            end = cbor2.loads(item) if len(item) < MAX_CHUNK else None
            if isinstance(end, dict) and end.get("name") == "end" and "sha256" in end:
                end["sha256"] = hashlib.sha256(raw[:at]).digest()
                return raw[:at] + cbor2.dumps(end, canonical=True) + raw[at + len(item) :]
            at += len(item)
    return raw


def state(data: bytes) -> None:
    """The state stream: what is taken is written again as the same bytes."""
    pieces = Pieces(data)
    size = pieces.byte() ** 2 + 1
    raw = pieces.rest()
    if size & 1:
        raw = _rightly_ended(raw)
    decoder = Decoder()
    found: Head | None = None
    chunks = []
    try:
        for at in range(0, len(raw), size):
            for event in decoder.feed(raw[at : at + size]):
                if isinstance(event, Head):
                    found = event
                elif isinstance(event, Chunk):
                    chunks.append(event.data)
        decoder.close()
    except StateError:
        return
    assert found is not None
    if found.state.unknown or found.state.version != (1, 0):
        return
    encoder = Encoder()
    again = encoder.begin(found.state) + b"".join(map(encoder.internal, chunks)) + encoder.end()
    assert Decoder().feed(again)


def config(data: bytes) -> None:
    """A daemon's configuration file."""
    with tempfile.NamedTemporaryFile(suffix=".toml") as file:
        file.write(data)
        file.flush()
        with suppress(ConfigError):
            load_config(Path(file.name))


def netlink(data: bytes) -> None:
    """What the kernel answers about vDPA devices. Nobody else can: it must end, no more."""
    pieces = Pieces(data)
    family = 16 if pieces.byte() & 1 else 0x20
    with suppress(BridgeError):
        for answer in decode(pieces.rest(), family, 1):
            if isinstance(answer, Reply):
                for build in (
                    mgmt_device_from,
                    device_info_from,
                    device_config_from,
                    queue_statistics_from,
                ):
                    with suppress(BridgeError):
                        build(answer)


#: Name → what it does with an input, and the longest that is worth trying.
HARNESSES: Mapping[str, tuple[Callable[[bytes], None], int]] = {
    "codec": (codec, 1024),
    "varlink": (varlink, 512),
    "varlink_call": (varlink_call, 256),
    "state": (state, 1024),
    "config": (config, 512),
    "netlink": (netlink, 512),
}
