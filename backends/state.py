"""What a device's state is, and the stream that it is saved as. Sans-IO.

``docs/device-state.md`` describes the format, ``docs/device-state.cddl`` is its schema.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from vhostbridge import __version__

from .errors import StateError
from .state_compatibility import compatibility
from .state_fields import (
    REPEATED,
    SECTIONS,
    check_fields,
    check_section,
    check_state,
    check_version,
)
from .state_items import MAX_CHUNK, NULL, Items, chunk_data, chunk_head, decode, encode, invalid
from .virtio_features import TransportFeature

if TYPE_CHECKING:
    from .guest import VringSetup

__all__ = [
    "FORMAT_VERSION",
    "LABEL",
    "MAX_CHUNK",
    "PRODUCER",
    "Chunk",
    "Decoder",
    "DeviceState",
    "Encoder",
    "End",
    "Event",
    "Head",
    "InflightVring",
    "VringState",
    "compatibility",
]

PRODUCER = f"vhost-bridge {__version__}"
#: Major and minor version of what we write.
FORMAT_VERSION = (1, 0)
#: How every stream begins (RFC 9277, section 2.3): tag 55800, our tag "vbds", "BOR".
LABEL = b"\xd9\xd9\xf8\xdavbds\x43BOR"
#: Bytes of the header and all sections but chunks of internal state.
MAX_HEAD = 4 << 20
_WORD = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class VringState:
    """One vring, stopped. Areas are guest physical; ``base`` is encoded as in ``VringSetup``."""

    index: int
    size: int
    base: int
    enabled: bool
    descriptor_area: int
    driver_area: int
    device_area: int

    def setup(self) -> VringSetup:
        """The vring for a device, without eventfds: those are the front-end's."""
        from .guest import VringSetup

        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return VringSetup(**values, kick=None, call=None, err=None)


@dataclass(frozen=True, slots=True)
class InflightVring:
    """Requests of one vring that the device took and did not complete, in the order taken.

    ``heads`` are descriptor indices in split rings, buffer ids in packed ones.
    """

    index: int
    heads: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class DeviceState:
    """Everything that a suspended device is, but for the bytes of its internal state.

    Attributes:
        transport: where it was saved: ``vdpa`` or ``vhost-user``.
        device_id: virtio device id, ``None`` where the transport doesn't tell.
        features: negotiated virtio features, up to 128 bits.
        queue_num: the answer to GET_QUEUE_NUM: pairs for net, else vrings.
        config: configuration space; empty where there is none to read.
        vrings: those that were set up, by index; split or packed as ``features`` say.
        inflight: vrings with requests in flight, by index.
        control: what a virtio-net device was told through its control vring, see
            ``bridge.control_state``; ``None`` if nothing.
        internal_owner: whose internal state follows; ``None`` if there is none.
        producer: who wrote the stream.
        version: format of the stream it was read from; what is written is ``FORMAT_VERSION``.
        unknown: sections that were not understood and need not be. They are not written again.
    """

    transport: str
    device_id: int | None
    features: int
    queue_num: int
    config: bytes
    vrings: tuple[VringState, ...]
    inflight: tuple[InflightVring, ...] = ()
    control: Mapping[str, object] | None = None
    internal_owner: str | None = None
    producer: str = PRODUCER
    version: tuple[int, int] = FORMAT_VERSION
    unknown: tuple[str, ...] = ()

    @property
    def packed(self) -> bool:
        """Whether the vrings are packed ones."""
        return bool(self.features & TransportFeature.RING_PACKED.mask)


@dataclass(frozen=True, slots=True)
class Head:
    """All but internal state. Provisional: only ``End`` says that it is what was saved."""

    state: DeviceState


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some bytes of internal state, provisional too."""

    data: bytes


@dataclass(frozen=True, slots=True)
class End:
    """The stream is whole; ``size`` are all its bytes, ``digest`` is SHA-256 of all before."""

    size: int
    digest: bytes


Event = Head | Chunk | End


def _layout(state: DeviceState) -> str:
    return "packed" if state.packed else "split"


def _section(name: str, fields: Mapping[str, object]) -> dict[str, object]:
    return {"name": name, "critical": True, **fields}


def _sections(state: DeviceState) -> list[dict[str, object]]:
    layout = _layout(state)
    found = [_section("config", {"data": state.config})] if state.config else []
    found += [_section("vring", {"layout": layout, **asdict(vring)}) for vring in state.vrings]
    found += [
        _section("inflight", {"index": vring.index, "heads": list(vring.heads)})
        for vring in state.inflight
    ]
    if state.control is not None:
        found.append(_section("control", {"state": dict(state.control)}))
    if state.internal_owner is not None:
        found.append(_section("internal", {"owner": state.internal_owner}))
    return found


class Encoder:
    """Makes the stream: ``begin``, then ``internal`` for each chunk, then ``end``.

    The same state and chunks give the same bytes.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._sections = 0
        self._internal = 0
        self._owner: str | None = None

    def begin(self, state: DeviceState) -> bytes:
        """Label, header and all sections.

        Raises:
            StateError: the state can't be, or exceeds the limits of the format.
        """
        sections = _sections(state)
        words = [state.features & _WORD, state.features >> 64]
        header = {
            "version": list(FORMAT_VERSION),
            "producer": state.producer,
            "transport": state.transport,
            "features": words if words[1] else words[:1],
            "queue_num": state.queue_num,
            "vrings": len(state.vrings),
            "sections": list(dict.fromkeys(section["name"] for section in sections)),
        }
        if state.device_id is not None:
            header["device_id"] = state.device_id
        check_fields("header", header)
        for section in sections:
            check_fields(str(section["name"]), section)
        check_state(state)
        head = b"".join((LABEL, encode(header), *map(encode, sections)))
        if len(head) > MAX_HEAD:
            raise invalid(f"it is larger than {MAX_HEAD} bytes without internal state")
        self._sections = len(sections)
        self._owner = state.internal_owner
        self._digest.update(head)
        return head

    def internal(self, data: bytes) -> bytes:
        """A chunk of internal state, 1 to ``MAX_CHUNK`` bytes.

        Raises:
            ValueError: another size, or the state has no ``internal_owner``.
        """
        if self._owner is None or not 0 < len(data) <= MAX_CHUNK:
            raise ValueError(f"a chunk has 1 to {MAX_CHUNK} bytes and an owner")
        chunk = chunk_head(len(data)) + data
        self._digest.update(chunk)
        self._internal += len(data)
        return chunk

    def end(self) -> bytes:
        """What follows the last chunk."""
        last = b"" if self._owner is None else NULL
        self._digest.update(last)
        counts = {"sections": self._sections, "internal": self._internal}
        return last + encode(_section("end", {**counts, "sha256": self._digest.digest()}))


class Decoder:
    """Reads the stream strictly, in any pieces, in bounded memory.

    ``feed`` gives ``Head``, then every ``Chunk``, then ``End``; call ``close`` at the stream's
    end. What came before ``End`` and ``close`` may be damaged: act on none of it.
    """

    def __init__(self) -> None:
        self._items = Items()
        self._size = 0
        self._label = LABEL  # what of it is to come
        self._head_size = len(LABEL)
        self._digest = hashlib.sha256(LABEL)
        self._header: dict[str, Any] | None = None
        self._newer = False
        self._found: dict[str, list[dict[str, Any]]] = {name: [] for name in SECTIONS}
        self._names: list[str] = []
        self._internal = 0
        self._in_chunks = False
        self._done = False

    def feed(self, data: bytes) -> list[Event]:
        """Take the stream's next bytes; give what is complete with them.

        Raises:
            StateError: the stream is damaged, or needs a newer version. Feed it no more.
        """
        self._size += len(data)
        label, self._label = self._label[: len(data)], self._label[len(data) :]
        if not data.startswith(label):
            raise StateError("this is no device state", "is it a file that `save` wrote?")
        self._items.feed(data[len(label) :] if label else data)
        events: list[Event] = []
        while not self._done and (raw := self._items.take()) is not None:
            events += self._chunk(raw) if self._in_chunks else self._item(raw)
        if self._done and self._items.waiting:
            raise invalid("something follows its end")
        return events

    def close(self) -> None:
        """Say that there is no more.

        Raises:
            StateError: the stream is cut short.
        """
        if not self._done:
            raise StateError(
                f"the device state is cut short after {self._size} bytes",
                "take a whole copy, or save the device again",
            )

    def _chunk(self, raw: bytes) -> list[Event]:
        self._digest.update(raw)
        if raw == NULL:
            self._in_chunks = False
            return []
        data = chunk_data(raw)
        self._internal += len(data)
        return [Chunk(data)]

    def _item(self, raw: bytes) -> list[Event]:
        item = decode(raw)
        if not isinstance(item, dict):
            raise invalid("an item is not the map that belongs there")
        if self._header is not None and item.get("name") == "end":
            return self._end(self._header, item)
        self._digest.update(raw)
        self._head_size += len(raw)
        if self._head_size > MAX_HEAD:
            raise invalid(f"it is larger than {MAX_HEAD} bytes without internal state")
        if self._header is not None:
            return self._section(self._header, item)
        self._newer = check_version(item, FORMAT_VERSION)
        check_fields("header", item, self._newer)
        self._header = item
        return []

    def _section(self, header: dict[str, Any], section: dict[str, Any]) -> list[Event]:
        name = check_section(section)
        if self._found["internal"]:
            raise invalid(f"section {name!r} follows the internal state")
        self._names.append(name)
        if name not in SECTIONS:
            if section["critical"]:
                raise StateError(
                    f"the device state has a section {name!r} that this version does not know "
                    "and may not leave out",
                    f"load it with a newer version; {header['producer']} wrote it",
                )
            return []
        check_fields(name, section, self._newer)
        late = SECTIONS[SECTIONS.index(name) + (name in REPEATED) :]
        if any(self._found[other] for other in late):
            raise invalid(f"section {name!r} is not in its place")
        self._found[name].append(section)
        if name != "internal":
            return []
        self._in_chunks = True
        return [Head(self._state(header))]

    def _end(self, header: dict[str, Any], end: dict[str, Any]) -> list[Event]:
        check_fields("end", end, self._newer)
        events: list[Event] = [] if self._found["internal"] else [Head(self._state(header))]
        if end["sections"] != len(self._names):
            raise invalid(f"it has {len(self._names)} sections, and {end['sections']} were saved")
        if end["internal"] != self._internal:
            raise invalid(
                f"it has {self._internal} bytes of internal state, and {end['internal']} were saved"
            )
        digest = self._digest.digest()
        if end["sha256"] != digest:
            raise invalid("it was changed after it was saved (SHA-256 differs)")
        self._done = True
        return [*events, End(self._size - self._items.waiting, digest)]

    def _state(self, header: dict[str, Any]) -> DeviceState:
        names = list(dict.fromkeys(self._names))
        if header["sections"] != names:
            raise invalid("its sections are not those that its header tells")
        found = self._found
        if header["vrings"] != len(found["vring"]):
            raise invalid(f"it has {len(found['vring'])} vrings, and {header['vrings']} were saved")
        low, *high = header["features"]
        state = DeviceState(
            transport=header["transport"],
            device_id=header.get("device_id"),
            features=low | (high[0] << 64 if high else 0),
            queue_num=header["queue_num"],
            config=b"".join(section["data"] for section in found["config"]),
            vrings=tuple(_vring(section) for section in found["vring"]),
            inflight=tuple(InflightVring(s["index"], tuple(s["heads"])) for s in found["inflight"]),
            control=next((section["state"] for section in found["control"]), None),
            internal_owner=next((section["owner"] for section in found["internal"]), None),
            producer=header["producer"],
            version=(header["version"][0], header["version"][1]),
            unknown=tuple(name for name in names if name not in SECTIONS),
        )
        layout = _layout(state)
        if any(section["layout"] != layout for section in found["vring"]):
            raise invalid(f"a vring's layout is not {layout}, which was negotiated")
        check_state(state)
        return state


def _vring(section: dict[str, Any]) -> VringState:
    return VringState(**{field.name: section[field.name] for field in fields(VringState)})
