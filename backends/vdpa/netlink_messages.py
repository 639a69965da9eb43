"""The wire of the ``vdpa`` generic netlink family: bytes in, bytes out, no socket.

Attribute numbers and types: ``linux/vdpa.h`` of Linux 6.12, unchanged in 7.3.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

from vhostbridge.backends.errors import BridgeError

FAMILY_NAME = "vdpa"
GENL_ID_CTRL = 16  # where families are looked up, in linux/genetlink.h
_CTRL_CMD_GETFAMILY = 3
_VERSION = 1

_NLMSG_ERROR = 2
_NLMSG_DONE = 3
_NLM_F_REQUEST = 0x1
_NLM_F_ACK = 0x4
_NLM_F_DUMP = 0x300
_NLM_F_CAPPED = 0x100
_NLM_F_ACK_TLVS = 0x200
_NLMSGERR_ATTR_MSG = 1

_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_GENERIC = struct.Struct("=BBH")  # command, version
_ATTRIBUTE = struct.Struct("=HH")  # length, type
_TYPE_MASK = 0x3FFF  # without the bits for nested and for network byte order

Attributes = Sequence[tuple[str, int | str]]
Table = Sequence[tuple[str, str]]


class Command(IntEnum):
    """``enum vdpa_command``."""

    MGMTDEV_GET = 2
    DEV_NEW = 3
    DEV_DEL = 4
    DEV_GET = 5
    DEV_CONFIG_GET = 6
    DEV_VSTATS_GET = 7
    DEV_ATTR_SET = 8


#: Name and type of each attribute, without the prefix ``VDPA_ATTR_``; the position is its number.
ATTRIBUTES = (
    ("UNSPEC", "none"),
    ("MGMTDEV_BUS_NAME", "asciiz"),
    ("MGMTDEV_DEV_NAME", "asciiz"),
    ("MGMTDEV_SUPPORTED_CLASSES", "uint64"),
    ("DEV_NAME", "asciiz"),
    ("DEV_ID", "uint32"),
    ("DEV_VENDOR_ID", "uint32"),
    ("DEV_MAX_VQS", "uint32"),
    ("DEV_MAX_VQ_SIZE", "uint16"),
    ("DEV_MIN_VQ_SIZE", "uint16"),
    ("DEV_NET_CFG_MACADDR", "l2addr"),
    # The header's comment says u8; the kernel has always sent u16.
    ("DEV_NET_STATUS", "uint16"),
    ("DEV_NET_CFG_MAX_VQP", "uint16"),
    ("DEV_NET_CFG_MTU", "uint16"),
    ("DEV_NEGOTIATED_FEATURES", "uint64"),
    ("DEV_MGMTDEV_MAX_VQS", "uint32"),
    ("DEV_SUPPORTED_FEATURES", "uint64"),
    ("DEV_QUEUE_INDEX", "uint32"),
    ("DEV_VENDOR_ATTR_NAME", "asciiz"),
    ("DEV_VENDOR_ATTR_VALUE", "uint64"),
    ("DEV_FEATURES", "uint64"),
    ("DEV_BLK_CFG_CAPACITY", "uint64"),
    ("DEV_BLK_CFG_SIZE_MAX", "uint32"),
    ("DEV_BLK_CFG_BLK_SIZE", "uint32"),
    ("DEV_BLK_CFG_SEG_MAX", "uint32"),
    ("DEV_BLK_CFG_NUM_QUEUES", "uint16"),
    ("DEV_BLK_CFG_PHY_BLK_EXP", "uint8"),
    ("DEV_BLK_CFG_ALIGN_OFFSET", "uint8"),
    ("DEV_BLK_CFG_MIN_IO_SIZE", "uint16"),
    ("DEV_BLK_CFG_OPT_IO_SIZE", "uint32"),
    ("DEV_BLK_CFG_MAX_DISCARD_SEC", "uint32"),
    ("DEV_BLK_CFG_MAX_DISCARD_SEG", "uint32"),
    ("DEV_BLK_CFG_DISCARD_SEC_ALIGN", "uint32"),
    ("DEV_BLK_CFG_MAX_WRITE_ZEROES_SEC", "uint32"),
    ("DEV_BLK_CFG_MAX_WRITE_ZEROES_SEG", "uint32"),
    ("DEV_BLK_READ_ONLY", "uint8"),
    ("DEV_BLK_FLUSH", "uint8"),
)
# Of a family's description: what was asked with, and what is wanted.
_FAMILY_ATTRIBUTES = (("UNSPEC", "none"), ("FAMILY_ID", "uint16"), ("FAMILY_NAME", "asciiz"))

_NUMBERS = {"uint8": "=B", "uint16": "=H", "uint32": "=I", "uint64": "=Q"}


@dataclass(frozen=True, slots=True)
class Reply:
    """One object's attributes, in the order sent and with repetitions; names without prefix."""

    command: int
    attributes: tuple[tuple[str, int | str], ...]

    def get(self, name: str) -> int | str | None:
        """Return the first attribute of that name, or None."""
        return next((value for key, value in self.attributes if key == name), None)

    def number(self, name: str) -> int | None:
        """Return a numeric attribute, or None when it is absent."""
        value = self.get(name)
        return value if isinstance(value, int) else None

    def text(self, name: str) -> str | None:
        """Return a text attribute, or None when it is absent."""
        value = self.get(name)
        return value if isinstance(value, str) else None


@dataclass(frozen=True, slots=True)
class End:
    """The kernel's last word on a request: an errno, 0 for success, and its extack text."""

    errno: int
    text: str = ""


def encode_request(
    family: int, command: Command, attributes: Attributes, *, sequence: int, dump: bool = False
) -> bytes:
    """Return the bytes of a request; attribute names go without their ``VDPA_ATTR_`` prefix."""
    return _encode(ATTRIBUTES, family, command, attributes, sequence, dump)


def encode_family_lookup(sequence: int) -> bytes:
    """Return the bytes that ask generic netlink for the family's number."""
    pairs: Attributes = [("FAMILY_NAME", FAMILY_NAME)]
    return _encode(_FAMILY_ATTRIBUTES, GENL_ID_CTRL, _CTRL_CMD_GETFAMILY, pairs, sequence, False)


def _encode(
    table: Table, family: int, command: int, attributes: Attributes, sequence: int, dump: bool
) -> bytes:
    numbers = {name: number for number, (name, _) in enumerate(table)}
    body = _GENERIC.pack(command, _VERSION, 0)
    for name, value in attributes:
        number = numbers[name]
        payload = _encode_value(table[number][1], value)
        body += _ATTRIBUTE.pack(_ATTRIBUTE.size + len(payload), number) + payload
        body += bytes(-len(body) % 4)
    flags = _NLM_F_REQUEST | (_NLM_F_DUMP if dump else _NLM_F_ACK)
    return _HEADER.pack(_HEADER.size + len(body), family, flags, sequence, 0) + body


def _encode_value(form: str, value: int | str) -> bytes:
    if isinstance(value, int):
        return struct.pack(_NUMBERS[form], value)
    return bytes.fromhex(value.replace(":", "")) if form == "l2addr" else value.encode() + b"\0"


def decode(data: bytes, family: int, sequence: int) -> Iterator[Reply | End]:
    """Yield what one datagram answers to request ``sequence``; anything else in it is skipped.

    ``family`` may be GENL_ID_CTRL for the reply to a family lookup.

    Raises:
        BridgeError: it is no answer.
    """
    offset = 0
    while offset + _HEADER.size <= len(data):
        length, kind, flags, answered, _ = _HEADER.unpack_from(data, offset)
        if not _HEADER.size <= length <= len(data) - offset:
            return
        message = data[offset : offset + length]
        offset += (length + 3) & ~3
        if answered != sequence:
            continue
        if kind in (_NLMSG_ERROR, _NLMSG_DONE):
            yield _decode_end(message, kind, flags)
        elif kind == family:
            yield _decode_reply(
                message, _FAMILY_ATTRIBUTES if family == GENL_ID_CTRL else ATTRIBUTES
            )


def _decode_reply(message: bytes, table: Table) -> Reply:
    try:
        command, _, _ = _GENERIC.unpack_from(message, _HEADER.size)
        pairs = tuple(_decode_attributes(message[_HEADER.size + _GENERIC.size :], table))
    except (struct.error, UnicodeDecodeError) as error:
        raise BridgeError(f"the kernel's netlink answer can't be read: {error}") from error
    return Reply(command, pairs)


def _decode_attributes(data: bytes, table: Table) -> Iterator[tuple[str, int | str]]:
    while data:
        length, kind = _ATTRIBUTE.unpack_from(data)
        if not _ATTRIBUTE.size <= length <= len(data):
            raise struct.error(f"an attribute of {length} bytes where {len(data)} are left")
        number = kind & _TYPE_MASK
        # A kernel newer than our table sends attributes that are not in it.
        if number < len(table):
            name, form = table[number]
            value = _decode_value(form, data[_ATTRIBUTE.size : length])
            if value is not None:
                yield name, value
        data = data[(length + 3) & ~3 :]


def _decode_value(form: str, payload: bytes) -> int | str | None:
    if form in _NUMBERS:
        (number,) = struct.unpack(_NUMBERS[form], payload)
        return int(number)
    if form == "asciiz":
        return payload.rstrip(b"\0").decode()
    return payload.hex(":") if form == "l2addr" else None


def _decode_end(message: bytes, kind: int, flags: int) -> End:
    if len(message) < _HEADER.size + 4:
        return End(0)
    (error,) = struct.unpack_from("=i", message, _HEADER.size)
    attributes = _HEADER.size + 4
    if kind == _NLMSG_ERROR and len(message) >= attributes + 4:
        # The request is echoed behind the code, or only its header where that was asked for.
        (echoed,) = struct.unpack_from("=I", message, attributes)
        attributes += _HEADER.size if flags & _NLM_F_CAPPED else (echoed + 3) & ~3
    return End(-error, _extack_text(message[attributes:]) if flags & _NLM_F_ACK_TLVS else "")


def _extack_text(attributes: bytes) -> str:
    while len(attributes) >= 4:
        length, kind = struct.unpack_from("=HH", attributes)
        if length < 4:
            return ""
        if kind & 0x3FFF == _NLMSGERR_ATTR_MSG:
            return attributes[4:length].rstrip(b"\0").decode("utf-8", "replace")
        attributes = attributes[(length + 3) & ~3 :]
    return ""
