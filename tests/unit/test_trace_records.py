"""What a trace says of each message and call: nothing is left out, and nothing secret is in it."""

from __future__ import annotations

import json
import socket

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.fakes import eventfd, frame, state, u64
from tests.unit.wire import EXAMPLES, PAYLOADS, ROWS, Row, ids
from vhostbridge.backends.errors import PeerError
from vhostbridge.backends.trace import Item, Tracer
from vhostbridge.backends.vdpa import tracing as vdpa
from vhostbridge.backends.vhostuser import payloads as p
from vhostbridge.backends.vhostuser import tracing as user
from vhostbridge.backends.vhostuser.channel import Channel
from vhostbridge.backends.vhostuser.messages import Request
from vhostbridge.backends.vhostuser.specs import BACKEND_SPECS, FRONTEND_SPECS
from vhostbridge.bridge.trace import format as trace_format
from vhostbridge.bridge.trace.entry import Entry, parse
from vhostbridge.bridge.trace.words import details, summary, title
from vhostbridge.native import ffi, lib

FRONT_END = user.Lane("front-end", FRONTEND_SPECS, replies=False)


class Recorder:
    """Takes what tracers tell, and makes of it what a file would have."""

    def __init__(self, *tracers: Tracer) -> None:
        self.items: list[Item] = []
        for tracer in tracers:
            tracer.attach(self.items.append)

    @property
    def entries(self) -> list[Entry]:
        return [parse(line) for item in self.items for line in trace_format.lines(item)]


def recorded(describe: object, *arguments: object) -> list[Entry]:
    tracer = Tracer("b")
    tracer.device_id = 2
    recorder = Recorder(tracer)
    tracer.record(describe, *arguments)  # type: ignore[arg-type]
    return recorder.entries


@pytest.mark.parametrize("row", ROWS, ids=ids)
@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_every_message_is_told_the_same_whether_it_comes_or_goes(
    row: Row, data: st.DataObject
) -> None:
    payload = data.draw(PAYLOADS[row.payload])
    need_reply = not row.reply and data.draw(st.booleans())
    fds = data.draw(st.integers(*row.fds))
    wire = row.encode(payload, need_reply=need_reply)
    (out,) = recorded(user.sent, user.Lane("peer", row.specs, not row.reply), wire, fds)
    lane = user.Lane("peer", row.specs, row.reply)
    (into,) = recorded(user.received, lane, row.request, payload, fds, need_reply)
    assert (out.sender, out.receiver, into.sender, into.receiver) == ("bridge", "peer") * 2 or (
        (out.sender, out.receiver) == (into.receiver, into.sender) == ("bridge", "peer")
    )
    for entry in (out, into):
        assert (entry.kind, entry.name) == ("message", row.request.name)
        assert (entry.reply, entry.need_reply, entry.fds) == (row.reply, need_reply, fds)
        assert entry.reverse == (row.specs is BACKEND_SPECS)
        assert title(entry).startswith(row.request.name)
        assert isinstance(summary(entry), str) and dict(details(entry))["from"] == entry.sender
    assert out.fields == into.fields


@given(st.binary(min_size=16, max_size=300))
def test_bytes_that_nobody_looks_into_are_only_counted(secret: bytes) -> None:
    for request in (Request.CREATE_CRYPTO_SESSION, 99):
        (entry,) = recorded(user.received, FRONT_END, request, p.Raw(secret), 0, False)
        assert entry.fields == {"bytes": len(secret)}


def test_fields_have_the_meaning_of_their_message() -> None:
    def fields(request: Request, payload: p.Payload, *, reply: bool = False) -> object:
        lane = user.Lane("front-end", FRONTEND_SPECS, reply)
        (entry,) = recorded(user.received, lane, request, payload, 0, False)
        return entry.fields

    assert fields(Request.SET_FEATURES, p.U64(1 << 32 | 1 << 9 | 1 << 60)) == {
        "features": "0x1000000100000200",
        "names": ["FLUSH", "VERSION_1", "bit_60"],
    }
    assert fields(Request.SET_PROTOCOL_FEATURES, p.U64(9 | 1 << 40)) == {
        "features": "0x10000000009",
        "names": ["MQ", "REPLY_ACK", "bit_40"],
    }
    assert fields(Request.SET_STATUS, p.U64(15)) == {
        "status": "0xf",
        "names": ["ACKNOWLEDGE", "DRIVER", "DRIVER_OK", "FEATURES_OK"],
    }
    assert fields(Request.SET_VRING_NUM, p.VringState(1, 256)) == {"index": 1, "size": 256}
    assert fields(Request.SET_VRING_BASE, p.VringState(1, 16)) == {"index": 1, "base": "0x10"}
    assert fields(Request.GET_VRING_BASE, p.VringState(1, 0)) == {"index": 1}
    assert fields(Request.GET_VRING_BASE, p.VringState(1, 7), reply=True) == {
        "index": 1,
        "base": "0x7",
    }
    assert fields(Request.SET_VRING_KICK, p.VringFd(3, False)) == {"index": 3, "fd": False}
    assert fields(Request.GET_CONFIG, p.Config(4, 0, bytes(2))) == {
        "offset": 4,
        "size": 2,
        "flags": 0,
    }
    assert fields(Request.SET_MEM_TABLE, p.MemTable((p.Region(1, 2, 3, 4),))) == {
        "regions": [
            {
                "guest_address": "0x1",
                "size": "0x2",
                "user_address": "0x3",
                "mmap_offset": "0x4",
            }
        ]
    }
    assert fields(Request.SET_OWNER, p.U64(0), reply=True) == {"ack": "ok"}
    assert fields(Request.SET_OWNER, p.U64(3), reply=True) == {"ack": "refused (3)"}


def test_equal_messages_in_a_row_are_counted() -> None:
    run = frame(18, state(0, 1)) * 64 + frame(11, state(0, 0))
    entries = recorded(user.sent, user.Lane("back-end x", FRONTEND_SPECS, True), run, 0)
    assert [(e.name, e.repeat) for e in entries] == [
        ("SET_VRING_ENABLE", 64),
        ("GET_VRING_BASE", 1),
    ]


def test_mistake_of_ours_is_a_record() -> None:
    (entry,) = recorded(lambda device_id: 1 // 0)
    assert (entry.kind, entry.name) == ("event", "not traced")
    assert entry.fields == {"reason": "ZeroDivisionError: integer division or modulo by zero"}


# vhost-vdpa


def test_every_ioctl_that_we_use_has_its_name_and_fields() -> None:
    numbers = {name: getattr(lib, name) for name in dir(lib) if name.startswith("VHOST_")}
    assert vdpa.names()[lib.VHOST_SET_OWNER] == "VHOST_SET_OWNER"
    assert vdpa.names()[lib.VHOST_VDPA_SUSPEND] == "VHOST_VDPA_SUSPEND"
    assert set(vdpa._FIELDS) <= set(vdpa.names().values()) <= set(numbers)
    answers = {"VHOST_SET_OWNER", "VHOST_VDPA_SUSPEND", "VHOST_VDPA_RESUME"}
    used = (pytest.importorskip("vhostbridge.backends.vdpa.chardev").__file__ or "",)
    with open(used[0], encoding="utf-8") as source:
        text = source.read()
    mentioned = {name for name in vdpa.names().values() if f"lib.{name}" in text}
    assert mentioned - answers == set(vdpa._FIELDS)


def test_calls_have_arguments_results_and_durations() -> None:
    def call(number: object, argument: object, result: int = 0) -> Entry:
        (entry,) = recorded(vdpa.described, "/dev/vhost-vdpa-0", number, argument, result, 1500)
        assert (entry.kind, entry.receiver, entry.duration) == ("ioctl", "/dev/vhost-vdpa-0", 1500)
        return entry

    features = call(lib.VHOST_SET_FEATURES, ffi.new("uint64_t *", 1 << 33))
    assert features.fields == {"features": "0x200000000", "names": ["ACCESS_PLATFORM"]}
    base = call(lib.VHOST_GET_VRING_BASE, ffi.new("struct vhost_vring_state *", (1, 9)))
    assert base.fields == {"index": 1, "base": "0x9"}
    kick = call(lib.VHOST_SET_VRING_KICK, ffi.new("struct vhost_vring_file *", (1, -1)))
    assert kick.fields == {"index": 1, "fd": -1}
    buffer = bytearray(b"\4\0\0\0\2\0\0\0ab")
    config = call(lib.VHOST_VDPA_GET_CONFIG, ffi.from_buffer(buffer))
    assert config.fields == {"offset": 4, "size": 2, "data": "6162"}
    suspend = call(lib.VHOST_VDPA_SUSPEND, ffi.new("uint32_t *"), -95)
    assert (suspend.name, suspend.result, suspend.errno) == ("VHOST_VDPA_SUSPEND", -1, "EOPNOTSUPP")
    assert suspend.failed and not kick.failed
    update = call("VHOST_IOTLB_UPDATE", (0, 3, 0x1000, 0x2000, 0x7F00))
    assert update.fields == {
        "asid": 0,
        "iova": "0x1000",
        "size": "0x2000",
        "uaddr": "0x7f00",
        "perm": "RW",
    }
    assert call("open", None).fields == {}
    assert call(0xAF99, None).name == "ioctl 0xaf99"


# Channels


async def test_channel_tells_what_it_sends_and_receives_once_it_is_traced() -> None:
    trace = Tracer("b")
    ours, theirs = socket.socketpair()
    channel = Channel(
        trio.socket.from_stdlib_socket(ours),
        FRONTEND_SPECS,
        replies=False,
        peer="front-end",
        trace=trace,
    )
    with theirs:
        theirs.sendall(frame(3))
        await channel.receive()
        recorder = Recorder(trace)
        with eventfd() as fd:
            socket.send_fds(theirs, [frame(12, u64(1), 9)], [fd.fileno()])
        message = await channel.receive()
        assert message is not None
        message.close()
        await channel.send_reply(12, p.U64(0))
        trace.detach()
        await channel.send_reply(12, p.U64(1))
        theirs.sendall(frame(8, b"short"))
        with pytest.raises(PeerError):
            await channel.receive()
        channel.close()
    kick, ack = recorder.entries
    assert (kick.name, kick.sender, kick.fds, kick.need_reply) == (
        "SET_VRING_KICK",
        "front-end",
        1,
        True,
    )
    assert (ack.name, ack.receiver, ack.reply, ack.fields) == (
        "SET_VRING_KICK",
        "front-end",
        True,
        {"ack": "ok"},
    )
    assert 0 < kick.mono <= ack.mono and kick.wall <= ack.wall


def test_records_are_plain_json_lines() -> None:
    trace = Tracer("vm\N{SNOWMAN}1")
    recorder = Recorder(trace)
    trace.event("error", text="line\nbreak \N{SNOWMAN} \ud800")
    (line,) = [line for item in recorder.items for line in trace_format.lines(item)]
    assert line.count(b"\n") == 1 and line.isascii()
    assert json.loads(line)["fields"]["text"] == "line\nbreak \N{SNOWMAN} \ud800"
    assert parse(line).bridge == "vm\N{SNOWMAN}1"
