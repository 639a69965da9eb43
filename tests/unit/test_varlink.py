"""The varlink wire: framing with descriptors, and messages."""

from __future__ import annotations

import json
import socket
from contextlib import suppress
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.controlled import some_fds
from vhostbridge.backends.fds import close_all
from vhostbridge.bridge.varlink import (
    ANCILLARY,
    FDS_MAX,
    MESSAGE_MAX,
    Call,
    Frame,
    Framer,
    Reply,
    WireError,
    close_frames,
    decode,
    decode_call,
    decode_reply,
    received_fds,
    sent_fds,
)

# Framing


@given(
    st.lists(st.binary(min_size=1, max_size=40).filter(lambda one: 0 not in one), max_size=6),
    st.lists(st.integers(0, 200), max_size=8),
)
def test_frames_are_the_same_however_the_stream_is_cut(
    messages: list[bytes], cuts: list[int]
) -> None:
    stream = b"".join(message + b"\0" for message in messages)
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    framer = Framer()
    pieces = [stream[a:b] for a, b in pairwise(edges)]
    found = [frame.data for piece in pieces for frame in framer.feed(piece)]
    assert found == messages
    assert framer.at_boundary


def test_message_of_the_limit_is_taken_and_one_byte_more_is_not() -> None:
    framer = Framer()
    (frame,) = framer.feed(b"x" * MESSAGE_MAX + b"\0")
    assert len(frame.data) == MESSAGE_MAX
    assert framer.feed(b"x" * MESSAGE_MAX) == []
    with pytest.raises(WireError, match="more than 1048576 bytes"):
        framer.feed(b"x")


@pytest.mark.parametrize(
    ("before", "data", "owner"),
    [
        (b"", b"a\0", 0),
        (b"", b"a", 0),
        (b"", b"a\0b\0", 1),
        (b"", b"a\0b", 1),
        (b"a", b"a\0b", 1),
        (b"a", b"a", 0),
        (b"a", b"a\0", 0),
    ],
)
def test_descriptors_belong_to_the_last_message_begun_in_their_read(
    before: bytes, data: bytes, owner: int
) -> None:
    framer = Framer()
    fds = some_fds(2)
    frames = [*framer.feed(before), *framer.feed(data, fds), *framer.feed(b"\0")]
    assert [frame.fds for frame in frames][owner] == fds
    assert sum(len(frame.fds) for frame in frames) == 2
    close_frames(frames)


def test_descriptors_follow_their_messages_through_a_socket() -> None:
    ours, theirs = socket.socketpair()
    framer, frames, sent = Framer(), list[Frame](), some_fds(3)
    with ours, theirs:
        for data, fds in ((b"one\0", []), (b"two\0", sent[:1]), (b"three", sent[1:]), (b"!\0", [])):
            theirs.sendmsg([data], sent_fds(fds))
        while len(frames) < 3:
            data, ancillary, flags, _ = ours.recvmsg(65536, ANCILLARY, socket.MSG_CMSG_CLOEXEC)
            frames += framer.feed(data, received_fds(ancillary, flags))
    assert [(frame.data, len(frame.fds)) for frame in frames] == [
        (b"one", 0), (b"two", 1), (b"three!", 2),
    ]  # fmt: skip
    close_frames(frames)
    close_all(sent)


def test_too_many_descriptors_are_all_closed() -> None:
    framer = Framer()
    fds = some_fds(FDS_MAX + 1)
    framer.feed(b"a", fds[:1])
    with pytest.raises(WireError, match="more than 8 descriptors"):
        framer.feed(b"b", fds[1:])
    assert all(fd.closed for fd in fds)


def test_more_descriptors_than_fit_are_all_closed() -> None:
    ours, theirs = socket.socketpair()
    fds = some_fds(3 * FDS_MAX)
    with ours, theirs:
        theirs.sendmsg([b"{}\0"], sent_fds(fds))
        _, ancillary, flags, _ = ours.recvmsg(65536, ANCILLARY, socket.MSG_CMSG_CLOEXEC)
    with pytest.raises(WireError, match="more than 8 descriptors"):
        received_fds(ancillary, flags)
    close_all(fds)


def test_descriptors_of_a_message_that_never_ends_are_closed() -> None:
    framer = Framer()
    fds = some_fds(1)
    framer.feed(b"{", fds)
    framer.close()
    assert fds[0].closed


# Messages


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "no JSON"),
        (b"{", "no JSON"),
        (b"[]", "no object"),
        (b'"x"', "no object"),
        (b"\xff{}", "no JSON"),
        (b'{"a":NaN}', "no JSON"),
        (b'{"a":' + b"9" * 5000 + b"}", "no JSON"),
        (b"[" * 500_000, "nested too deep"),
        (b'{"a":' * 100_000, "nested too deep"),
    ],
)
def test_what_is_no_json_object_is_refused(data: bytes, said: str) -> None:
    with pytest.raises(WireError, match=said):
        decode(data)


@given(st.binary(max_size=60))
def test_garbage_is_refused_or_is_an_object(data: bytes) -> None:
    with suppress(WireError):
        assert isinstance(decode(data), dict)


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({}, "calls no method"),
        ({"method": 3}, "calls no method"),
        ({"method": "a.B", "parameters": []}, "no object"),
        ({"method": "a.B", "more": 1}, "neither true nor false"),
        ({"method": "a.B", "oneway": "yes"}, "neither true nor false"),
        ({"method": "a.B", "upgrade": True}, "another protocol"),
    ],
)
def test_what_is_no_call_is_refused(message: dict[str, Any], said: str) -> None:
    with pytest.raises(WireError, match=said):
        decode_call(Frame(json.dumps(message).encode(), []))


@pytest.mark.parametrize(
    "call", [Call("a.B", {}), Call("a.B", {"x": 1}, more=True), Call("a.B", {}, oneway=True)]
)
def test_calls_survive_the_wire(call: Call) -> None:
    (frame,) = Framer().feed(call.encode())
    found = decode_call(frame)
    assert (found.method, found.parameters) == (call.method, call.parameters)
    assert (found.more, found.oneway) == (call.more, call.oneway)


def test_null_stands_for_what_was_left_out() -> None:
    data = b'{"method":"a.B","parameters":null,"more":null,"oneway":null,"upgrade":null}'
    assert decode_call(Frame(data, [])) == Call("a.B", {}, fds=[])


@pytest.mark.parametrize(
    "reply", [Reply({"x": 1}), Reply({}, "a.Error"), Reply({"x": [None]}, continues=True)]
)
def test_replies_survive_the_wire(reply: Reply) -> None:
    (frame,) = Framer().feed(reply.encode())
    assert decode_reply(frame) == reply
