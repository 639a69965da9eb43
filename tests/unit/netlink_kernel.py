"""The vdpa netlink family, byte for byte, and a kernel that is played by a socket pair.

Requests and replies are built with struct from the attribute table of linux/vdpa.h, not with the
code under test.
"""

from __future__ import annotations

import errno
import socket
import struct
from pathlib import Path

from vhostbridge.backends.vdpa.netlink import VdpaNetlink

FAMILY = 0x1C
MULTI = 2
ACK_TLVS = 0x200
CAPPED = 0x100


def attribute(number: int, payload: bytes) -> bytes:
    padding = bytes(-len(payload) % 4)
    return struct.pack("=HH", 4 + len(payload), number) + payload + padding


def text(number: int, value: str) -> bytes:
    return attribute(number, value.encode() + b"\0")


def u8(number: int, value: int) -> bytes:
    return attribute(number, struct.pack("=B", value))


def u16(number: int, value: int) -> bytes:
    return attribute(number, struct.pack("=H", value))


def u32(number: int, value: int) -> bytes:
    return attribute(number, struct.pack("=I", value))


def u64(number: int, value: int) -> bytes:
    return attribute(number, struct.pack("=Q", value))


def netlink(kind: int, flags: int, sequence: int, payload: bytes) -> bytes:
    return struct.pack("=IHHII", 16 + len(payload), kind, flags, sequence, 0) + payload


def message(command: int, *attributes: bytes, sequence: int = 2, flags: int = 0) -> bytes:
    header = struct.pack("=BBH", command, 1, 0)
    return netlink(FAMILY, flags, sequence, header + b"".join(attributes))


def ack(code: int = 0, extack: str = "", sequence: int = 2) -> bytes:
    flags = CAPPED | (ACK_TLVS if extack else 0)
    request = struct.pack("=IHHII", 20, FAMILY, 5, sequence, 0)
    tlvs = text(1, extack) if extack else b""
    return netlink(2, flags, sequence, struct.pack("=i", -code) + request + tlvs)


def done(code: int = 0, sequence: int = 2) -> bytes:
    return netlink(3, MULTI, sequence, struct.pack("=i", -code))


FAMILY_REPLY = netlink(16, 0, 1, struct.pack("=BBH", 1, 2, 0) + text(2, "vdpa") + u16(1, FAMILY))


class Kernel:
    """The far end: answers are queued before the request; what was asked can be read after."""

    def __init__(self, sysfs_root: Path) -> None:
        self.ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sysfs_root = sysfs_root
        self._queue = [FAMILY_REPLY + ack(sequence=1)]

    def answer(self, *datagrams: bytes) -> None:
        self._queue += datagrams

    def without_family(self, code: int = errno.ENOENT) -> None:
        self._queue = [ack(code, sequence=1)]

    def connect(self) -> VdpaNetlink:
        for datagram in self._queue:
            self.theirs.send(datagram)
        return VdpaNetlink(self.ours, sysfs_root=self._sysfs_root)

    def asked(self) -> list[bytes]:
        self.theirs.settimeout(0)
        requests = []
        try:
            while request := self.theirs.recv(65536):
                requests.append(request)
        except BlockingIOError:
            pass
        return requests
