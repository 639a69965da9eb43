"""A hostile front-end: ``python -m benchmarks.attacker KIND SOCKET`` until it is killed.

Each kind does one thing as fast as it can, and comes again when it is cut off.
"""

from __future__ import annotations

import array
import mmap
import os
import random
import socket
import struct
import sys
import time
from collections.abc import Callable
from contextlib import suppress

MEMORY = 1 << 20
USER = 0x7F00_0000_0000
#: VERSION_1 and protocol features.
FEATURES = 1 << 32 | 1 << 30
REPLY_ACK = 1 << 3


def frame(request: int, payload: bytes = b"", flags: int = 1) -> bytes:
    """One message."""
    return struct.pack("=III", request, flags, len(payload)) + payload


def u64(value: int) -> bytes:
    return struct.pack("=Q", value)


GET_FEATURES = frame(1)
SET_OWNER = frame(3)
SET_NUM = frame(8, struct.pack("=II", 0, 256))
GET_CONFIG = frame(24, struct.pack("=III", 0, 256, 0) + bytes(256))
PROTOCOL = frame(16, u64(REPLY_ACK | 1 << 9))


def questions(sock: socket.socket) -> None:
    """Asks, and reads no answer."""
    while True:
        sock.sendall(GET_FEATURES * 100)


def talk(sock: socket.socket) -> None:
    """Asks and reads, always with many questions under way."""
    sock.setblocking(False)
    while True:
        with suppress(BlockingIOError):
            sock.send(GET_FEATURES * 100)
        with suppress(BlockingIOError):
            if not sock.recv(65536):
                return


def orders(sock: socket.socket) -> None:
    """Says things that have no answer."""
    while True:
        sock.sendall((SET_OWNER + SET_NUM) * 100)


def large(sock: socket.socket) -> None:
    """The longest messages that there are, and longer answers than questions."""
    sock.sendall(PROTOCOL)
    sock.setblocking(False)
    while True:
        with suppress(BlockingIOError):
            sock.send(GET_CONFIG * 10)
        with suppress(BlockingIOError):
            if not sock.recv(65536):
                return


def half(sock: socket.socket) -> None:
    """Half a header, and then nothing."""
    sock.sendall(GET_FEATURES[:6])
    time.sleep(1000)


def knock(sock: socket.socket) -> None:
    """Comes and goes."""


def wrong(sock: socket.socket) -> None:
    """A message that nobody knows: it is cut off, and comes again."""
    sock.sendall(frame(99, bytes(4096)))
    sock.recv(1)


def send_with(sock: socket.socket, data: bytes, fd: int) -> None:
    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])


def rings(sock: socket.socket) -> None:
    """Starts a vring, writes into it at random, kicks, and starts it again when it broke."""
    fd, kick, call = os.memfd_create("guest"), os.eventfd(0), os.eventfd(0)
    try:
        os.ftruncate(fd, MEMORY)
        memory = mmap.mmap(fd, MEMORY)
        table = struct.pack("=II4Q", 1, 0, 0, MEMORY, USER, 0)
        sock.sendall(frame(16, u64(REPLY_ACK)) + frame(2, u64(FEATURES)))
        send_with(sock, frame(5, table), fd)
        while True:
            sock.sendall(SET_NUM + frame(10, struct.pack("=II", 0, 0)))
            address = struct.pack("=II4Q", 0, 0, USER, USER + 0x3000, USER + 0x2000, 0)
            sock.sendall(frame(9, address))
            send_with(sock, frame(13, u64(0)), call)
            send_with(sock, frame(12, u64(0)), kick)
            sock.sendall(frame(18, struct.pack("=II", 0, 1)))
            for _ in range(2000):
                at = random.randrange(0x3000)
                memory[at : at + 8] = random.randbytes(8)
                os.eventfd_write(kick, 1)
            memory[:0x4000] = bytes(0x4000)
            sock.sendall(frame(11, struct.pack("=II", 0, 0)))
            if not sock.recv(20):
                return
    finally:
        for number in (fd, kick, call):
            os.close(number)


KINDS: dict[str, Callable[[socket.socket], None]] = {
    one.__name__: one for one in (questions, talk, orders, large, half, knock, wrong, rings)
}


def attack(kind: str, path: str) -> None:
    """Go on for ever."""
    while True:
        with socket.socket(socket.AF_UNIX) as sock, suppress(OSError):
            sock.connect(path)
            KINDS[kind](sock)


if __name__ == "__main__":
    attack(sys.argv[1], sys.argv[2])
