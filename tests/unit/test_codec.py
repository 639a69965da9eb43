"""The vhost-user codec: every message, both roles, however the bytes arrive."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from enum import IntEnum

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.fakes import eventfd, frame, u64
from tests.unit.wire import EXAMPLES, PAYLOADS, ROWS, Row, ids
from vhostbridge.backends.errors import PeerError
from vhostbridge.backends.fds import OwnedFd, close_all
from vhostbridge.backends.vhostuser import payloads as p
from vhostbridge.backends.vhostuser.codec import Decoder, Message, encode_reply, encode_request
from vhostbridge.backends.vhostuser.messages import BackendRequest, Request
from vhostbridge.backends.vhostuser.payloads import Payload
from vhostbridge.backends.vhostuser.specs import BACKEND_SPECS, FRONTEND_SPECS


def feed(decoder: Decoder, data: bytes, fds: Sequence[OwnedFd], cuts: list[int]) -> Message:
    """Give it all of ``data`` in pieces of at most ``cuts`` (cycled) and at most as desired."""
    at = 0
    message = None
    while at < len(data):
        assert message is None, "a message came before its last byte"
        size = min(cuts[0], decoder.bytes_desired(), len(data) - at)
        cuts = cuts[1:] + cuts[:1]
        message = decoder.receive(data[at : at + size], fds)
        at, fds = at + size, ()
    assert message is not None
    return message


@pytest.mark.parametrize("specs", [(Request, FRONTEND_SPECS), (BackendRequest, BACKEND_SPECS)])
def test_every_request_has_a_row(specs: tuple[type[IntEnum], dict[int, object]]) -> None:
    names, table = specs
    assert set(names) == set(table)
    assert [int(n) for n in names] == list(range(1, len(names) + 1))


@pytest.mark.parametrize("row", ROWS, ids=ids)
@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_message_survives_the_wire_in_any_pieces(row: Row, data: st.DataObject) -> None:
    payload = data.draw(PAYLOADS[row.payload])
    need_reply = not row.reply and data.draw(st.booleans())
    cuts = data.draw(st.lists(st.integers(1, 300), min_size=1, max_size=5))
    fds = [eventfd() for _ in range(data.draw(st.integers(*row.fds)))]
    numbers = [fd.fileno() for fd in fds]
    decoder = row.decoder()
    message = feed(decoder, row.encode(payload, need_reply=need_reply), fds, cuts)
    assert message.request is row.request
    assert message.payload == payload
    assert message.need_reply == need_reply
    assert [fd.fileno() for fd in message.fds] == numbers
    assert decoder.at_boundary and decoder.bytes_desired() == 12
    message.close()


def test_messages_follow_each_other_a_byte_at_a_time() -> None:
    decoder = Decoder(FRONTEND_SPECS, replies=False, peer="peer")
    stream = [
        encode_request(Request.SET_VRING_NUM, p.VringState(1, 256)),
        encode_request(Request.GET_FEATURES, p.Empty()),
        encode_request(Request.SET_STATUS, p.U64(15), need_reply=True),
    ]
    got = [feed(decoder, data, (), [1]) for data in stream]
    assert [x.request for x in got] == [
        Request.SET_VRING_NUM,
        Request.GET_FEATURES,
        Request.SET_STATUS,
    ]
    assert [x.payload for x in got] == [p.VringState(1, 256), p.Empty(), p.U64(15)]


@pytest.mark.parametrize("row", ROWS, ids=ids)
@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_descriptors_in_a_wrong_number_are_refused(row: Row, data: st.DataObject) -> None:
    low, high = row.fds
    wrong = data.draw(st.sampled_from([n for n in range(13) if not low <= n <= high]))
    payload = data.draw(PAYLOADS[row.payload])
    fds = [eventfd() for _ in range(wrong)]
    with pytest.raises(PeerError, match=f"{row.request.name} with {wrong} file descriptors"):
        feed(row.decoder(), row.encode(payload), fds, [4096])
    assert all(fd.closed for fd in fds)


@given(
    data=st.binary(max_size=80),
    replies=st.booleans(),
    backend=st.booleans(),
    count=st.integers(0, 3),
    cuts=st.lists(st.integers(1, 20), min_size=1, max_size=4),
)
def test_arbitrary_bytes_are_a_message_or_a_peer_error(
    data: bytes, replies: bool, backend: bool, count: int, cuts: list[int]
) -> None:
    decoder = Decoder(
        BACKEND_SPECS if backend else FRONTEND_SPECS, replies=replies, peer="the other"
    )
    fds = [eventfd() for _ in range(count)]
    pending: Sequence[OwnedFd] = fds
    at = 0
    try:
        while at < len(data):
            size = min(cuts[0], decoder.bytes_desired(), len(data) - at)
            cuts = cuts[1:] + cuts[:1]
            message = decoder.receive(data[at : at + size], pending)
            at, pending = at + size, ()
            if message is not None:
                message.close()
    except PeerError:
        assert all(fd.closed for fd in fds)
    decoder.close()
    close_all(pending)


@given(
    row=st.sampled_from(ROWS),
    body=st.binary(max_size=300),
    flags=st.sampled_from([1, 5, 9, 13]),
)
def test_wellframed_garbage_is_a_message_or_a_peer_error(row: Row, body: bytes, flags: int) -> None:
    data = struct.pack("=III", row.request, flags, len(body)) + body
    fd = eventfd()
    said = ""
    try:
        feed(row.decoder(), data, [fd], [4096]).close()
    except PeerError as error:
        said = str(error)
    assert fd.closed
    assert "\n" not in said and said[:9] in ("", "the peer ")


FIXED = [row for row in ROWS if row.payload not in (p.Raw, p.Uuid)]


@pytest.mark.parametrize("row", FIXED, ids=ids)
@pytest.mark.parametrize("delta", [-1, 1])
@settings(max_examples=2)
@given(data=st.data())
def test_payload_of_a_wrong_size_is_refused(row: Row, delta: int, data: st.DataObject) -> None:
    body = data.draw(PAYLOADS[row.payload]).pack()
    if not body and delta < 0:
        return
    body = body[:delta] if delta < 0 else body + b"\0"
    fds = [eventfd() for _ in range(row.fds[0])]
    flags = 0x5 if row.reply else 0x1
    with pytest.raises(PeerError, match=f"malformed {row.request.name}"):
        feed(row.decoder(), frame(row.request, body, flags), fds, [4096])
    assert all(fd.closed for fd in fds)


@pytest.mark.parametrize("version", [0, 2, 3])
def test_other_protocol_versions_are_refused(version: int) -> None:
    decoder = Decoder(FRONTEND_SPECS, replies=False, peer="peer")
    with pytest.raises(PeerError, match=f"version {version}, not 1"):
        decoder.receive(struct.pack("=III", 1, version, 0))


@pytest.mark.parametrize(("replies", "flags"), [(False, 0x5), (True, 0x1), (True, 0x9)])
def test_replies_and_requests_are_not_mixed_up(replies: bool, flags: int) -> None:
    decoder = Decoder(FRONTEND_SPECS, replies=replies, peer="peer")
    with pytest.raises(PeerError, match="where the other was due"):
        decoder.receive(struct.pack("=III", 1, flags, 0))


def test_a_huge_payload_is_refused_at_its_header() -> None:
    decoder = Decoder(FRONTEND_SPECS, replies=False, peer="peer")
    with pytest.raises(PeerError, match="announced 4294967295 bytes for SET_FEATURES"):
        decoder.receive(struct.pack("=III", 2, 1, 0xFFFFFFFF))


def test_the_largest_payload_is_taken() -> None:
    decoder = Decoder(FRONTEND_SPECS, replies=False, peer="peer")
    message = feed(decoder, frame(999, bytes(4096)), (), [5000])
    assert message.payload == p.Raw(bytes(4096))


def test_descriptors_in_the_middle_of_a_message_are_refused() -> None:
    decoder = Decoder(FRONTEND_SPECS, replies=False, peer="peer")
    first, late = eventfd(), eventfd()
    data = encode_request(Request.SET_VRING_KICK, p.VringFd(0, True))
    assert decoder.receive(data[:12], [first]) is None
    with pytest.raises(PeerError, match="in the middle of a message"):
        decoder.receive(data[12:], [late])
    assert first.closed and late.closed


def test_descriptors_with_the_first_byte_alone_belong_to_the_message() -> None:
    decoder = Decoder(FRONTEND_SPECS, replies=False, peer="peer")
    fd = eventfd()
    message = feed(
        decoder, encode_request(Request.SET_VRING_KICK, p.VringFd(0, True)), [fd], [1, 11, 8]
    )
    assert message.fds == [fd]
    message.close()


def test_closing_a_decoder_closes_what_an_unfinished_message_brought() -> None:
    decoder = Decoder(FRONTEND_SPECS, replies=False, peer="peer")
    fd = eventfd()
    assert decoder.receive(frame(12, u64(0))[:5], [fd]) is None
    assert not decoder.at_boundary
    decoder.close()
    assert fd.closed


def test_an_unknown_request_keeps_its_number_and_bytes() -> None:
    decoder = Decoder(FRONTEND_SPECS, replies=False, peer="peer")
    fd = eventfd()
    message = feed(decoder, frame(200, b"abc", 0x9), [fd], [4096])
    assert (message.request, message.name, message.payload) == (
        200,
        "request 200",
        p.Raw(b"abc"),
    )
    assert message.need_reply
    message.close()
    assert fd.closed


def test_taking_a_descriptor_leaves_it_open() -> None:
    left, right = os.pipe()
    message = Message(Request.SET_LOG_FD, p.Empty(), [OwnedFd(left), OwnedFd(right)])
    taken = message.take_fd()
    message.close()
    assert taken is not None and not taken.closed and message.fds == []
    taken.close()
    assert message.take_fd() is None


def test_an_empty_get_config_reply_is_a_refusal() -> None:
    """libvhost-user says no with a header alone."""
    decoder = Decoder(FRONTEND_SPECS, replies=True, peer="peer")
    message = decoder.receive(frame(24, b"", 0x5))
    assert message is not None and message.payload == p.Config(0, 0, b"")


def test_config_beyond_its_256_bytes_is_refused() -> None:
    decoder = Decoder(FRONTEND_SPECS, replies=False, peer="peer")
    with pytest.raises(PeerError, match="lie beyond 256"):
        feed(decoder, frame(24, struct.pack("=III", 200, 57, 0) + bytes(57)), (), [4096])


def test_a_memory_table_of_nine_regions_is_refused() -> None:
    decoder = Decoder(FRONTEND_SPECS, replies=False, peer="peer")
    body = struct.pack("=II", 9, 0) + bytes(9 * 32)
    with pytest.raises(PeerError, match="9 memory regions"):
        feed(decoder, frame(5, body), (), [4096])


# What real peers sent: bytes as QEMU, libblkio, DPDK and virtiofsd put them on the wire.
VECTORS = [
    ("0200000001000000080000004600004001000000", Request.SET_FEATURES, p.U64(0x140000046)),
    ("08000000010000000800000000000000" + "80000000", Request.SET_VRING_NUM, p.VringState(0, 128)),
    (
        "090000000100000028000000"
        "0000000000000000"
        "00c0fd6b317f0000"
        "00d0fd6b317f0000"
        "00c8fd6b317f0000"
        "00e0fd0f00000000",
        Request.SET_VRING_ADDR,
        p.VringAddr(0, 0, 0x7F316BFDC000, 0x7F316BFDD000, 0x7F316BFDC800, 0xFFDE000),
    ),
    (
        "250000000900000028000000"
        "0000000000000000"
        "0000000000000000"
        "0000001000000000"
        "00f0bf5b317f0000"
        "0000000000000000",
        Request.ADD_MEM_REG,
        p.MemReg(p.Region(0, 0x10000000, 0x7F315BBFF000, 0)),
    ),
    (
        "050000000900000028000000"
        "0100000000000000"
        "0080330001000000"
        "0000001000000000"
        "0080330001000000"
        "0000000000000000",
        Request.SET_MEM_TABLE,
        p.MemTable((p.Region(0x100338000, 0x10000000, 0x100338000, 0),)),
    ),
    ("270000000900000008000000" + "0b00000000000000", Request.SET_STATUS, p.U64(0xB)),
    (
        "060000000100000010000000" + "0020000000000000" + "0000000000000000",
        Request.SET_LOG_BASE,
        p.Log(0x2000, 0),
    ),
    (
        "2a0000000100000008000000" + "0000000000000000",
        Request.SET_DEVICE_STATE_FD,
        p.StateTransfer(0, 0),
    ),
    (
        "180000000900000048000000" + "000000003c00000000000000" + "00" * 60,
        Request.GET_CONFIG,
        p.Config(0, 0, bytes(60)),
    ),
]


@pytest.mark.parametrize(("wire", "request_", "payload"), VECTORS, ids=lambda x: str(x)[:24])
def test_bytes_of_real_peers(wire: str, request_: Request, payload: Payload) -> None:
    data = bytes.fromhex(wire)
    low, _ = FRONTEND_SPECS[request_].fds
    fds = [eventfd() for _ in range(low)]
    message = feed(Decoder(FRONTEND_SPECS, replies=False, peer="peer"), data, fds, [7])
    assert (message.request, message.payload) == (request_, payload)
    assert encode_request(request_, payload, need_reply=message.need_reply) == data
    message.close()


def test_a_reply_carries_exactly_version_and_reply() -> None:
    assert encode_reply(Request.GET_STATUS, p.U64(0xF)).hex() == (
        "280000000500000008000000" + "0f00000000000000"
    )


def test_a_reply_that_still_says_need_reply_is_taken() -> None:
    """qemu-storage-daemon answers libblkio's GET_CONFIG with flags 0xd."""
    decoder = Decoder(FRONTEND_SPECS, replies=True, peer="peer")
    message = feed(decoder, frame(24, struct.pack("=III", 0, 2, 0) + b"ab", 0xD), (), [4096])
    assert message.payload == p.Config(0, 0, b"ab")
