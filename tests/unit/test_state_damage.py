"""State streams that are wrong: each is refused before anything says that it is whole."""

from __future__ import annotations

import re
import tracemalloc
from collections.abc import Callable
from typing import Any

import cbor2
import pytest

from tests.unit.states import SAMPLES, Raw, changed, items, read, save, section, stream
from vhostbridge.backends.errors import StateError
from vhostbridge.backends.state import LABEL, Decoder, End, Event

Parts = list[Any]
MIB = 1 << 20


def outcome(raw: bytes, piece: int = 1 << 20) -> tuple[list[Event], StateError | None]:
    """What came out of a stream before it was refused, and the refusal."""
    decoder, events = Decoder(), []
    try:
        for at in range(0, len(raw), piece):
            events += decoder.feed(raw[at : at + piece])
        decoder.close()
    except StateError as error:
        return events, error
    return events, None


def assert_refused(raw: bytes, piece: int = 1 << 20) -> StateError:
    events, error = outcome(raw, piece)
    assert not [event for event in events if isinstance(event, End)]
    assert error is not None
    assert "\n" not in str(error) and error.hint
    return error


@pytest.mark.parametrize("bits", [0x01, 0x20, 0x80, 0xFF])
@pytest.mark.parametrize("name", SAMPLES)
def test_any_byte_that_changed_is_found(name: str, bits: int) -> None:
    raw = save(*SAMPLES[name])
    for at in range(len(raw)):
        assert_refused(raw[:at] + bytes([raw[at] ^ bits]) + raw[at + 1 :])


@pytest.mark.parametrize("name", SAMPLES)
def test_a_stream_that_ends_anywhere_before_its_end_is_found(name: str) -> None:
    raw = save(*SAMPLES[name])
    for end in range(len(raw)):
        error = assert_refused(raw[:end], piece=64)
        assert f"cut short after {end} bytes" in error.message


@pytest.mark.parametrize("piece", [1, 1 << 20])
@pytest.mark.parametrize("more", [b"\0", b"\xf6", b"\n", LABEL])
def test_bytes_behind_the_end_are_found(more: bytes, piece: int) -> None:
    events, error = outcome(save(*SAMPLES["files"]) + more, piece)
    assert error is not None and "follows its end" in error.message
    # Byte by byte, the end is there before what is wrong with it can be.
    assert not [event for event in events if isinstance(event, End)] or piece == 1


@pytest.mark.parametrize("raw", [b"x" * 100, b"QEVM\0\0\0\3", b"\x7fELF", LABEL[:-1] + b"x"])
def test_another_kind_of_file_is_called_that(raw: bytes) -> None:
    assert assert_refused(raw).message == "this is no device state"


def set_in(name: str, **fields: object) -> Callable[[Parts], None]:
    """A change of fields of the header or of the first section with a name."""

    def change(parts: Parts) -> None:
        (parts[0] if name == "header" else section(parts, name)).update(fields)

    return change


def drop(name: str, key: str) -> Callable[[Parts], object]:
    return lambda parts: (parts[0] if name == "header" else section(parts, name)).pop(key)


def swap(first: int, second: int) -> Callable[[Parts], None]:
    def change(parts: Parts) -> None:
        parts[first], parts[second] = parts[second], parts[first]

    return change


# Sample "block" is: header, config, vring 0, vring 1, inflight of vring 1, end.
BLOCK_FAULTS: dict[str, tuple[Callable[[Parts], object], str]] = {
    "no version": (drop("header", "version"), "version is missing"),
    "version of text": (set_in("header", version=["1", "0"]), "version is missing"),
    "version of bools": (set_in("header", version=[True, False]), "version is missing"),
    "no producer": (drop("header", "producer"), "header has no producer"),
    "producer with an escape": (set_in("header", producer="\x1b[2J"), "producer of header"),
    "producer too long": (set_in("header", producer="x" * 256), "producer of header"),
    "unknown transport": (set_in("header", transport="pci"), "transport of header"),
    "device id of 33 bits": (set_in("header", device_id=1 << 32), "device_id of header"),
    "device id null": (set_in("header", device_id=None), "device_id of header"),
    "no features": (set_in("header", features=[]), "features of header"),
    "three words of features": (set_in("header", features=[1, 2, 3]), "features of header"),
    "empty second word": (set_in("header", features=[1, 0]), "features of header"),
    "features a number": (set_in("header", features=1), "features of header"),
    "queues negative": (set_in("header", queue_num=-1), "queue_num of header"),
    "too few vrings": (set_in("header", vrings=3), "has 2 vrings, and 3 were saved"),
    "vring count too large": (set_in("header", vrings=1025), "vrings of header"),
    "wrong section list": (set_in("header", sections=["vring"]), "not those that its header"),
    "unknown field of the header": (set_in("header", more=1), "unknown field 'more'"),
    "header not a map": (lambda p: p.__setitem__(0, [1]), "not the map"),
    "header missing": (lambda p: p.pop(0), "version is missing"),
    "header twice": (lambda p: p.insert(1, p[0]), "has no name"),
    "section without a name": (drop("config", "name"), "has no name"),
    "section without critical": (drop("config", "critical"), "has no name"),
    "critical a number": (set_in("config", critical=1), "has no name"),
    "known section not critical": (set_in("config", critical=False), "critical of config"),
    "unknown field of a section": (set_in("vring", more=1), "unknown field 'more'"),
    "config of text": (set_in("config", data="x"), "data of config"),
    "config empty": (set_in("config", data=b""), "data of config"),
    "config twice": (lambda p: p.insert(1, p[1]), "'config' is not in its place"),
    "config late": (swap(1, 2), "'config' is not in its place"),
    "inflight early": (swap(3, 4), "'vring' is not in its place"),
    "vring missing": (lambda p: p.pop(2), "has 1 vrings, and 2 were saved"),
    "vring twice": (set_in("vring", index=1), "order of their indices"),
    "vrings in another order": (swap(2, 3), "order of their indices"),
    "vring index too large": (set_in("vring", index=1024), "index of vring"),
    "vring index a bool": (set_in("vring", index=False), "index of vring"),
    "size 0": (set_in("vring", size=0), "size of vring"),
    "size above 32768": (set_in("vring", size=65536), "size of vring"),
    "size no power of two": (set_in("vring", size=100), "no power of two"),
    "layout not negotiated": (set_in("vring", layout="packed"), "layout is not split"),
    "layout unknown": (set_in("vring", layout="ring"), "layout of vring"),
    "base of 17 bits": (set_in("vring", base=1 << 16), "more than 16 bits"),
    "base of 33 bits": (set_in("vring", base=1 << 32), "base of vring"),
    "enabled a number": (set_in("vring", enabled=1), "enabled of vring"),
    "address negative": (set_in("vring", driver_area=-1), "driver_area of vring"),
    "address missing": (drop("vring", "device_area"), "vring has no device_area"),
    "no heads": (set_in("inflight", heads=[]), "heads of inflight"),
    "head of text": (set_in("inflight", heads=["1"]), "heads of inflight"),
    "head of 17 bits": (set_in("inflight", heads=[1 << 16]), "heads of inflight"),
    "head beyond the ring": (set_in("inflight", heads=[256]), "head above 255"),
    "head twice": (set_in("inflight", heads=[1, 2, 1]), "in flight twice"),
    "inflight of no vring": (set_in("inflight", index=2), "vring 2, which is not there"),
    "too many sections": (set_in("end", sections=5), "has 4 sections, and 5 were saved"),
    "bytes of internal state": (set_in("end", internal=1), "0 bytes of internal state, and 1"),
    "end missing": (lambda p: p.pop(), "cut short"),
    "end not critical": (set_in("end", critical=False), "critical of end"),
    "unknown field of the end": (set_in("end", more=1), "unknown field 'more'"),
    "chunk without owner": (lambda p: p.insert(4, b"x"), "not the map"),
    "null without owner": (lambda p: p.insert(4, None), "not the map"),
    "a number": (lambda p: p.insert(4, 1), "not the map"),
}


@pytest.mark.parametrize(("change", "told"), BLOCK_FAULTS.values(), ids=BLOCK_FAULTS)
def test_field_that_can_not_be_is_named(change: Callable[[Parts], object], told: str) -> None:
    assert told in assert_refused(changed("block", change)).message


# Sample "files" is: header, config, vring 0, vring 1, internal, three chunks, null, end.
INTERNAL_FAULTS: dict[str, tuple[Callable[[Parts], object], str]] = {
    "no owner": (drop("internal", "owner"), "internal has no owner"),
    "owner empty": (set_in("internal", owner=""), "owner of internal"),
    "chunk empty": (lambda p: p.insert(5, b""), "where internal state belongs"),
    "chunk of text": (lambda p: p.insert(5, "x"), "where internal state belongs"),
    "section among chunks": (lambda p: p.insert(5, p[2]), "where internal state belongs"),
    "true among chunks": (lambda p: p.insert(5, True), "where internal state belongs"),
    "null missing": (lambda p: p.pop(-2), "where internal state belongs"),
    "null twice": (lambda p: p.insert(-1, None), "not the map"),
    "chunk missing": (lambda p: p.pop(5), "of internal state, and"),
    "section after internal state": (
        lambda p: p.insert(-1, {"name": "x", "critical": False}),
        "follows the internal state",
    ),
    "internal state twice": (
        lambda p: p.__setitem__(slice(-1, -1), [p[4], None]),
        "follows the internal state",
    ),
}


@pytest.mark.parametrize(("change", "told"), INTERNAL_FAULTS.values(), ids=INTERNAL_FAULTS)
def test_internal_state_that_can_not_be_is_refused(
    change: Callable[[Parts], object], told: str
) -> None:
    assert told in assert_refused(changed("files", change)).message


def test_chunks_that_changed_places_are_found_by_the_digest() -> None:
    parts = items(save(*SAMPLES["files"]))
    digest = parts[-1]["sha256"]
    swap(5, 6)(parts)
    assert "SHA-256 differs" in assert_refused(stream(parts, digest)).message


@pytest.mark.parametrize("digest", [b"short", bytes(33), "x" * 32, None, bytes(32)])
def test_digest_that_is_wrong_in_any_way_is_found(digest: object) -> None:
    *parts, end = items(save(*SAMPLES["block"]))
    raw = stream([*parts, Raw(cbor2.dumps(end | {"sha256": digest}, canonical=True))])
    assert re.search("sha256 of end|SHA-256 differs", assert_refused(raw).message)


HEADER = items(save(*SAMPLES["empty"]))[0]
ENCODINGS = {
    "tag": (b"\xc0\x60", "tags"),
    "big number": (b"\xc2\x49" + bytes([1] * 9), "tags"),
    "floating point": (b"\xf9\x3c\x00", "floating point"),
    "undefined": (b"\xf7", "undefined"),
    "other simple value": (b"\xf8\xff", "undefined"),
    "stop code": (b"\xff", "undefined"),
    "indefinite array": (b"\x9f\xff", "indefinite"),
    "indefinite map": (b"\xbf\xff", "indefinite"),
    "indefinite bytes": (b"\x5f\x41x\xff", "indefinite"),
    "reserved length": (b"\x1c", "indefinite"),
    "number in a long form": (b"\x18\x05", "shortest form"),
    "length in a long form": (b"\x58\x01x", "shortest form"),
    "number as a key": (b"\xa1\x01\x02", "key is no text"),
    "map as a key": (b"\xa1\xa0\x02", "key is no text"),
    "key twice": (b"\xa2\x61a\x01\x61a\x02", "repeat or are out of order"),
    "keys in another order": (b"\xa2\x61b\x01\x61a\x02", "repeat or are out of order"),
    "text that is no UTF-8": (b"\x61\xff", "can't be decoded"),
    "deep arrays": (b"\x81" * 17 + b"\x00", "inside each other"),
    "deep arrays without end": (b"\x81" * 500_000, "inside each other"),
    "deep maps": (b"\xa1\x61a" * 17 + b"\x00", "inside each other"),
    "many values": (b"\x9a\x00\x01\x86\xa1" + b"\x00" * 100_001, "larger than"),
    "long bytes": (b"\x5a\x00\x10\x00\x01" + bytes((1 << 20) + 1), "larger than"),
    "bytes of an exabyte": (b"\x5b" + b"\x0f" * 8, "larger than"),
    "text of an exabyte": (b"\x7b" + b"\x0f" * 8, "larger than"),
    "array of an exabyte": (b"\x9b" + b"\x0f" * 8, "larger than"),
    "map of an exabyte": (b"\xbb" + b"\x0f" * 8, "larger than"),
}


@pytest.mark.parametrize(("value", "told"), ENCODINGS.values(), ids=ENCODINGS)
def test_value_that_no_state_has_is_refused_in_little_memory(value: bytes, told: str) -> None:
    section = Raw(b"\xa3\x61x" + value + cbor2.dumps("name") + b"\x61y\x68critical\xf4")
    raw = LABEL + cbor2.dumps(HEADER, canonical=True) + section
    tracemalloc.start()
    try:
        assert told in assert_refused(raw, 4096).message
        assert tracemalloc.get_traced_memory()[1] < 8 * MIB
    finally:
        tracemalloc.stop()


def test_chunk_above_1_mib_is_refused_before_it_is_there() -> None:
    head, _, _ = save(*SAMPLES["files-without-internal-bytes"]).rpartition(b"\xf6\xa5")
    decoder = Decoder()
    decoder.feed(head)
    with pytest.raises(StateError, match="larger than"):
        decoder.feed(b"\x5a\x00\x10\x00\x01")


def test_sections_without_end_are_refused_after_4_mib() -> None:
    decoder = Decoder()
    decoder.feed(LABEL + cbor2.dumps(HEADER, canonical=True))
    section = cbor2.dumps({"name": "x", "critical": False, "data": bytes(100_000)}, canonical=True)
    for _ in range(41):
        assert decoder.feed(section) == []
    with pytest.raises(StateError, match="larger than 4194304 bytes"):
        decoder.feed(section)


def test_a_long_stream_of_chunks_is_read_in_flat_memory() -> None:
    head, _, _ = save(*SAMPLES["files-without-internal-bytes"]).rpartition(b"\xf6\xa5")
    chunk = cbor2.dumps(bytes(MIB))
    decoder = Decoder()
    decoder.feed(head)
    tracemalloc.start()
    try:
        for _ in range(64):
            assert len(decoder.feed(chunk)) == 1
        assert tracemalloc.get_traced_memory()[1] < 6 * MIB
    finally:
        tracemalloc.stop()


def test_reading_goes_on_from_a_state_that_is_right() -> None:
    """So that the refusals above are not for what all these streams share."""
    assert isinstance(read(changed("block", lambda parts: None))[-1], End)
