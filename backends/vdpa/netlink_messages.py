"""The wire of the ``vdpa`` generic netlink family: bytes in, bytes out, no socket.

Attribute numbers and types: ``linux/vdpa.h`` of Linux 6.12, unchanged in 7.3.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

from pyroute2.netlink import ctrlmsg, genlmsg

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

Attributes = Sequence[tuple[str, int | str]]


class Command(IntEnum):
    """``enum vdpa_command``."""

    MGMTDEV_GET = 2
    DEV_NEW = 3
    DEV_DEL = 4
    DEV_GET = 5
    DEV_CONFIG_GET = 6
    DEV_VSTATS_GET = 7
    DEV_ATTR_SET = 8


class VdpaMessage(genlmsg):  # type: ignore[misc]  # pyroute2 has no types
    """A message of the family; the position in ``nla_map`` is the attribute's number."""

    prefix = "VDPA_ATTR_"
    nla_map = (
        ("VDPA_ATTR_UNSPEC", "none"),
        ("VDPA_ATTR_MGMTDEV_BUS_NAME", "asciiz"),
        ("VDPA_ATTR_MGMTDEV_DEV_NAME", "asciiz"),
        ("VDPA_ATTR_MGMTDEV_SUPPORTED_CLASSES", "uint64"),
        ("VDPA_ATTR_DEV_NAME", "asciiz"),
        ("VDPA_ATTR_DEV_ID", "uint32"),
        ("VDPA_ATTR_DEV_VENDOR_ID", "uint32"),
        ("VDPA_ATTR_DEV_MAX_VQS", "uint32"),
        ("VDPA_ATTR_DEV_MAX_VQ_SIZE", "uint16"),
        ("VDPA_ATTR_DEV_MIN_VQ_SIZE", "uint16"),
        ("VDPA_ATTR_DEV_NET_CFG_MACADDR", "l2addr"),
        # The header's comment says u8; the kernel has always sent u16.
        ("VDPA_ATTR_DEV_NET_STATUS", "uint16"),
        ("VDPA_ATTR_DEV_NET_CFG_MAX_VQP", "uint16"),
        ("VDPA_ATTR_DEV_NET_CFG_MTU", "uint16"),
        ("VDPA_ATTR_DEV_NEGOTIATED_FEATURES", "uint64"),
        ("VDPA_ATTR_DEV_MGMTDEV_MAX_VQS", "uint32"),
        ("VDPA_ATTR_DEV_SUPPORTED_FEATURES", "uint64"),
        ("VDPA_ATTR_DEV_QUEUE_INDEX", "uint32"),
        ("VDPA_ATTR_DEV_VENDOR_ATTR_NAME", "asciiz"),
        ("VDPA_ATTR_DEV_VENDOR_ATTR_VALUE", "uint64"),
        ("VDPA_ATTR_DEV_FEATURES", "uint64"),
        ("VDPA_ATTR_DEV_BLK_CFG_CAPACITY", "uint64"),
        ("VDPA_ATTR_DEV_BLK_CFG_SIZE_MAX", "uint32"),
        ("VDPA_ATTR_DEV_BLK_CFG_BLK_SIZE", "uint32"),
        ("VDPA_ATTR_DEV_BLK_CFG_SEG_MAX", "uint32"),
        ("VDPA_ATTR_DEV_BLK_CFG_NUM_QUEUES", "uint16"),
        ("VDPA_ATTR_DEV_BLK_CFG_PHY_BLK_EXP", "uint8"),
        ("VDPA_ATTR_DEV_BLK_CFG_ALIGN_OFFSET", "uint8"),
        ("VDPA_ATTR_DEV_BLK_CFG_MIN_IO_SIZE", "uint16"),
        ("VDPA_ATTR_DEV_BLK_CFG_OPT_IO_SIZE", "uint32"),
        ("VDPA_ATTR_DEV_BLK_CFG_MAX_DISCARD_SEC", "uint32"),
        ("VDPA_ATTR_DEV_BLK_CFG_MAX_DISCARD_SEG", "uint32"),
        ("VDPA_ATTR_DEV_BLK_CFG_DISCARD_SEC_ALIGN", "uint32"),
        ("VDPA_ATTR_DEV_BLK_CFG_MAX_WRITE_ZEROES_SEC", "uint32"),
        ("VDPA_ATTR_DEV_BLK_CFG_MAX_WRITE_ZEROES_SEG", "uint32"),
        ("VDPA_ATTR_DEV_BLK_READ_ONLY", "uint8"),
        ("VDPA_ATTR_DEV_BLK_FLUSH", "uint8"),
    )


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
    pairs = [(f"VDPA_ATTR_{name}", value) for name, value in attributes]
    return _encode(VdpaMessage(), family, command, pairs, sequence, dump)


def encode_family_lookup(sequence: int) -> bytes:
    """Return the bytes that ask generic netlink for the family's number."""
    pairs: Attributes = [("CTRL_ATTR_FAMILY_NAME", FAMILY_NAME)]
    return _encode(ctrlmsg(), GENL_ID_CTRL, _CTRL_CMD_GETFAMILY, pairs, sequence, False)


def _encode(
    message: genlmsg, family: int, command: int, pairs: Attributes, sequence: int, dump: bool
) -> bytes:
    message["cmd"] = int(command)
    message["version"] = _VERSION
    message["attrs"] = list(pairs)
    message["header"]["type"] = family
    message["header"]["flags"] = _NLM_F_REQUEST | (_NLM_F_DUMP if dump else _NLM_F_ACK)
    message["header"]["sequence_number"] = sequence
    message.encode()
    return bytes(message.data)


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
            yield _decode_reply(message, ctrlmsg if family == GENL_ID_CTRL else VdpaMessage)


def _decode_reply(data: bytes, message_class: type[genlmsg]) -> Reply:
    message = message_class(data)
    try:
        message.decode()
    except Exception as error:  # pyroute2 and struct have many
        raise BridgeError(f"the kernel's netlink answer can't be read: {error}") from error
    prefix = "CTRL_ATTR_" if message_class is ctrlmsg else VdpaMessage.prefix
    # A kernel newer than our table sends attributes that pyroute2 calls UNKNOWN.
    pairs = [
        (name.removeprefix(prefix), value)
        for name, value in message["attrs"]
        if name.startswith(prefix) and isinstance(value, int | str)
    ]
    return Reply(message["cmd"], tuple(pairs))


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
