"""A vhost-user back-end that is nothing but its internal state: so many bytes of known content.

Run as a program: `stateful.py SOCKET BYTES [slow]`. It says "ready", then one line for each state
that it gave ("saved") or took ("loading", then "loaded BYTES" or "bad BYTES").
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
import sys
import threading
import time

PIECE = 1 << 20
FEATURES = 1 << 32 | 1 << 30
PROTOCOL = 1 << 0 | 1 << 3 | 1 << 9 | 1 << 19  # MQ, REPLY_ACK, CONFIG, DEVICE_STATE
GET_CONFIG, SET_DEVICE_STATE_FD, CHECK_DEVICE_STATE, GET_VRING_BASE = 24, 42, 43, 11
NUMBERS = {1: FEATURES, 15: PROTOCOL, 17: 1}
BLOCK = bytes(i * 7 & 0xFF for i in range(251)) * (PIECE // 251 + 1)


def piece(number: int, size: int) -> bytes:
    """What the internal state has at a MiB."""
    return struct.pack("<Q", number)[:size] + BLOCK[8:size]


class Backend:
    """Serves one connection after the other."""

    def __init__(self, size: int, *, slow: bool = False) -> None:
        self.size = size
        self.slow = slow
        self.answer = 0
        self.transfer: threading.Thread | None = None

    def serve(self, connection: socket.socket) -> None:
        """Answer until the front-end leaves."""
        while True:
            header, fds = receive(connection, 12)
            if len(header) < 12:
                return
            request, flags, size = struct.unpack("=III", header)
            payload, more = receive(connection, size)
            fds += more
            reply = self.reply(request, flags, payload, fds)
            for fd in fds:
                os.close(fd)
            if reply is not None:
                connection.sendall(struct.pack("=III", request, 5, len(reply)) + reply)

    def reply(self, request: int, flags: int, payload: bytes, fds: list[int]) -> bytes | None:
        if request in NUMBERS:
            return struct.pack("=Q", NUMBERS[request])
        if request == GET_VRING_BASE:
            return payload
        if request == GET_CONFIG:
            return payload[:12] + bytes(len(payload) - 12)
        if request == SET_DEVICE_STATE_FD:
            (direction, _) = struct.unpack("=II", payload)
            work = (self.save, self.load)[direction]
            self.transfer = threading.Thread(target=work, args=[fds.pop()])
            self.transfer.start()
            return struct.pack("=Q", 0x100)
        if request == CHECK_DEVICE_STATE:
            assert self.transfer is not None
            self.transfer.join()
            return struct.pack("=Q", self.answer)
        return struct.pack("=Q", 0) if flags & 8 else None

    def save(self, fd: int) -> None:
        self.answer = 1
        with contextlib.suppress(BrokenPipeError), os.fdopen(fd, "wb", buffering=0) as pipe:
            for number in range(-(-self.size // PIECE)):
                if self.slow:
                    time.sleep(0.05)
                data = memoryview(piece(number, min(PIECE, self.size - number * PIECE)))
                while data:
                    data = data[pipe.write(data) :]
            self.answer = 0
            print("saved", flush=True)

    def load(self, fd: int) -> None:
        count, right = 0, True
        print("loading", flush=True)
        with os.fdopen(fd, "rb") as pipe:
            while data := pipe.read(PIECE):
                right = right and data == piece(count // PIECE, len(data))
                count += len(data)
                if self.slow:
                    time.sleep(0.05)
        self.answer = 0 if right and count == self.size else 1
        print("bad" if self.answer else "loaded", count, flush=True)


def receive(connection: socket.socket, size: int) -> tuple[bytes, list[int]]:
    data, fds = b"", array.array("i")
    while len(data) < size:
        more, ancillary, _, _ = connection.recvmsg(size - len(data), 256)
        for _level, _kind, numbers in ancillary:
            fds.frombytes(numbers)
        if not more:
            break
        data += more
    return data, list(fds)


def main() -> None:
    path, size, *words = sys.argv[1:]
    backend = Backend(int(size), slow="slow" in words)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        print("ready", flush=True)
        while True:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(ConnectionError):
                backend.serve(connection)


if __name__ == "__main__":
    main()
