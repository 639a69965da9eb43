"""What a trace says of vhost-user messages: fields by their meaning, never a payload's bytes.

Configuration space is the exception: it is the device's description of itself.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import groupby

from vhostbridge.backends.lifecycle import Status
from vhostbridge.backends.trace import Record, bit_names
from vhostbridge.backends.virtio import feature_names

from .messages import HEADER, BackendRequest, Flags, ProtocolFeature, Request
from .payloads import (
    U64,
    Config,
    Empty,
    Iotlb,
    MemReg,
    MemTable,
    Payload,
    Raw,
    Region,
    ShmemConfig,
    StateTransfer,
    Uuid,
    VringAddr,
    VringFd,
    VringState,
)
from .specs import BACKEND_SPECS, Spec

Fields = dict[str, object]
# Numbers: flags are slow to combine.
_REPLY, _NEED_REPLY = int(Flags.REPLY), int(Flags.NEED_REPLY)
_FRONTEND_NAMES = {int(request): request.name for request in Request}
_BACKEND_NAMES = {int(request): request.name for request in BackendRequest}


@dataclass(frozen=True, slots=True)
class Lane:
    """One connection: who is at its other end, and whose requests travel there.

    ``replies`` is whether this end sends the requests.
    """

    peer: str
    specs: Mapping[int, Spec]
    replies: bool

    def name(self, request: int) -> str:
        names = _BACKEND_NAMES if self.specs is BACKEND_SPECS else _FRONTEND_NAMES
        return names.get(request) or f"request {request}"


def received(
    device_id: int | None, lane: Lane, request: int, payload: Payload, fds: int, need_reply: bool
) -> Iterable[Record]:
    """The record of a message that came."""
    ends = (lane.peer, "bridge")
    yield _message(device_id, lane, ends, request, payload, fds, lane.replies, need_reply)


def sent(device_id: int | None, lane: Lane, data: bytes, fds: int) -> Iterator[Record]:
    """The records of whole encoded messages that go out; ``fds`` go with the first of them.

    Equal ones behind each other are one record with a count.
    """
    for wire, same in groupby(_split(data)):
        request, flags, _ = HEADER.unpack_from(wire)
        reply, need_reply = bool(flags & _REPLY), bool(flags & _NEED_REPLY)
        body = wire[HEADER.size :]
        spec = lane.specs.get(request)
        kind = Raw if spec is None else (spec.reply or U64) if reply else spec.payload
        ends = ("bridge", lane.peer)
        record = _message(device_id, lane, ends, request, kind.unpack(body), fds, reply, need_reply)
        count = sum(1 for _ in same)
        yield record if count == 1 else {**record, "repeat": count}
        fds = 0


def _split(data: bytes) -> Iterator[bytes]:
    size = HEADER.size + HEADER.unpack_from(data)[2]
    while size < len(data):
        yield data[:size]
        data = data[size:]
        size = HEADER.size + HEADER.unpack_from(data)[2]
    yield data


def _message(
    device_id: int | None,
    lane: Lane,
    ends: tuple[str, str],
    request: int,
    payload: Payload,
    fds: int,
    reply: bool,
    need_reply: bool,
) -> Record:
    record: dict[str, object] = {
        "kind": "message",
        "from": ends[0],
        "to": ends[1],
        "name": lane.name(request),
    }
    if reply:
        record["reply"] = True
    if need_reply:
        record["need_reply"] = True
    if lane.specs is BACKEND_SPECS:
        record["reverse"] = True
    if fds:
        record["fds"] = fds
    spec = lane.specs.get(request)
    if reply and spec is not None and spec.reply is None:
        record["fields"] = _acknowledgement(payload)
    elif meaning := describe(device_id, lane, request, payload):
        # What a question leaves open.
        unanswered = () if reply else _ANSWERS.get(record["name"], ())
        record["fields"] = {k: v for k, v in meaning.items() if k not in unanswered}
    return record


_ANSWERS: Mapping[object, tuple[str, ...]] = {"GET_CONFIG": ("data",), "GET_VRING_BASE": ("base",)}


def _acknowledgement(payload: Payload) -> Fields:
    value = payload.value if isinstance(payload, U64) else 1
    return {"ack": "ok" if value == 0 else f"refused ({value})"}


def describe(device_id: int | None, lane: Lane, request: int, payload: Payload) -> Fields:
    """A payload's fields; addresses and bit words are hexadecimal text, bits have their names."""
    match payload:
        case Empty():
            return {}
        case U64():
            return _number(device_id, lane, request, payload.value)
        case VringState():
            return _vring_state(lane, request, payload)
        case VringAddr():
            return _addresses(payload)
        case VringFd():
            return {"index": payload.index, "fd": payload.has_fd}
        case MemTable():
            return {"regions": [_region(r) for r in payload.regions]}
        case MemReg():
            return _region(payload.region)
        case Config():
            size, data = len(payload.data), payload.data.hex()
            return {"offset": payload.offset, "size": size, "flags": payload.flags, "data": data}
        case StateTransfer():
            direction = {0: "save", 1: "load"}.get(payload.direction, str(payload.direction))
            return {"direction": direction, "phase": payload.phase}
        case ShmemConfig():
            sizes = {str(n): hex(size) for n, size in enumerate(payload.sizes) if size}
            return {"count": payload.count, **sizes}
        case Uuid():
            return {"uuid": payload.value.hex()}
        case Raw():
            # What it is nobody looked at: it may be a key, or the guest's.
            return {"bytes": len(payload.data)} if payload.data else {}
        case _:
            return _plain(payload)


_HEX = ("address", "iova", "offset", "size", "length")


def _plain(payload: Payload) -> Fields:
    named: Fields = {}
    for one in fields(payload):
        value = getattr(payload, one.name)
        big = isinstance(payload, Iotlb) or one.name.endswith(_HEX)
        named[one.name] = hex(value) if big else value
    return named


def _region(region: Region) -> Fields:
    return {one.name: hex(getattr(region, one.name)) for one in fields(region)}


def _addresses(address: VringAddr) -> Fields:
    named: Fields = {
        "index": address.index,
        "descriptor": hex(address.descriptor),
        "avail": hex(address.avail),
        "used": hex(address.used),
    }
    if address.flags:
        named |= {"flags": hex(address.flags), "log": hex(address.log)}
    return named


def _vring_state(lane: Lane, request: int, payload: VringState) -> Fields:
    meaning = {"SET_VRING_NUM": "size", "SET_VRING_ENABLE": "enabled"}
    name = lane.name(request)
    if name.endswith("_BASE"):
        return {"index": payload.index, "base": hex(payload.num)}
    return {"index": payload.index, meaning.get(name, "num"): payload.num}


def _number(device_id: int | None, lane: Lane, request: int, value: int) -> Fields:
    name = lane.name(request)
    if name.endswith("_PROTOCOL_FEATURES"):
        return {"features": hex(value), "names": bit_names(ProtocolFeature, value)}
    if name.endswith("_FEATURES"):
        return {"features": hex(value), "names": list(_feature_names(value, device_id))}
    if name.endswith("_STATUS"):
        return {"status": hex(value), "names": bit_names(Status, value)}
    if name in ("SEND_RARP", "SET_DEVICE_STATE_FD", "CLOSE_CRYPTO_SESSION"):
        return {"value": hex(value)}
    return {"value": value}


# Few words come often.
@functools.lru_cache(64)
def _feature_names(value: int, device_id: int | None) -> tuple[str, ...]:
    return tuple(feature_names(value, device_id))
