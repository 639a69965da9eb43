"""Messages of the vdpa netlink family, one by one."""

from __future__ import annotations

import errno
import struct

from tests.unit.netlink_kernel import (
    ACK_TLVS,
    FAMILY,
    attribute,
    message,
    netlink,
    text,
    u8,
    u16,
    u32,
    u64,
)
from vhostbridge.backends.vdpa.netlink_messages import (
    Command,
    End,
    Reply,
    VdpaMessage,
    decode,
    encode_request,
)


def test_a_request_has_the_bytes_of_the_attribute_table() -> None:
    request = encode_request(FAMILY, Command.DEV_GET, [("DEV_NAME", "blk0")], sequence=7)
    body = struct.pack("=BBH", 5, 1, 0) + text(4, "blk0")
    assert request == struct.pack("=IHHII", 16 + len(body), FAMILY, 0x5, 7, 0) + body


def test_a_dump_request_asks_for_all() -> None:
    request = encode_request(FAMILY, Command.MGMTDEV_GET, [], sequence=1, dump=True)
    assert request == struct.pack("=IHHIIBBH", 20, FAMILY, 0x301, 1, 0, 2, 1, 0)


def test_the_message_table_encodes_each_attribute_as_the_header_numbers_it() -> None:
    values: dict[int, tuple[bytes, int | str]] = {}
    for number, (_, kind) in enumerate(VdpaMessage.nla_map):
        match kind:
            case "asciiz":
                values[number] = text(number, "x"), "x"
            case "uint8":
                values[number] = u8(number, 200), 200
            case "uint16":
                values[number] = u16(number, 60000), 60000
            case "uint32":
                values[number] = u32(number, 2**31 + 1), 2**31 + 1
            case "uint64":
                values[number] = u64(number, 2**63 + 1), 2**63 + 1
            case "l2addr":
                values[number] = (
                    attribute(number, bytes.fromhex("52540011aaff")),
                    "52:54:00:11:aa:ff",
                )
    assert len(values) == 36
    names = [name.removeprefix("VDPA_ATTR_") for name, _ in VdpaMessage.nla_map]
    pairs = [(names[number], value) for number, (_, value) in values.items()]
    body = struct.pack("=BBH", 3, 1, 0) + b"".join(raw for raw, _ in values.values())
    assert encode_request(FAMILY, Command.DEV_NEW, pairs, sequence=1)[16:] == body
    assert list(decode(netlink(FAMILY, 0, 1, body), FAMILY, 1)) == [Reply(3, tuple(pairs))]


def test_answers_to_another_request_are_skipped() -> None:
    data = message(3, text(4, "old"), sequence=1) + message(3, text(4, "new"), sequence=2)
    assert list(decode(data, FAMILY, 2)) == [Reply(3, (("DEV_NAME", "new"),))]


def test_an_attribute_from_a_newer_kernel_is_left_out() -> None:
    data = message(3, text(4, "blk0"), u32(60, 5), u32(5, 2))
    (reply,) = decode(data, FAMILY, 2)
    assert reply == Reply(3, (("DEV_NAME", "blk0"), ("DEV_ID", 2)))


def test_a_truncated_datagram_ends_the_decoding() -> None:
    assert list(decode(message(3, text(4, "blk0"))[:-2], FAMILY, 2)) == []


def test_extack_text_is_found_behind_a_whole_echoed_request() -> None:
    request = encode_request(FAMILY, Command.DEV_GET, [("DEV_NAME", "a")], sequence=2)
    tlvs = u32(2, 4) + text(1, "device not found")
    data = netlink(2, ACK_TLVS, 2, struct.pack("=i", -19) + request + tlvs)
    assert list(decode(data, FAMILY, 2)) == [End(errno.ENODEV, "device not found")]
