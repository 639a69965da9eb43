"""Descriptors of a peer's that would make us wait, and what they stand for."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.fakes import eventfd, memfd
from vhostbridge.backends.fds import OwnedFd
from vhostbridge.backends.foreign_fds import ForeignFd, Kind, kind_of


def lingering() -> OwnedFd:
    """A TCP socket whose close waits for half a minute: nobody takes what it has sent."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        ours = socket.create_connection(listener.getsockname())
        ours.setblocking(False)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 30))
        theirs, _ = listener.accept()
    _peers.append(theirs)
    try:
        while True:
            ours.send(bytes(1 << 20))
    except BlockingIOError:
        return OwnedFd(ours.detach())


_peers: list[socket.socket] = []


def end_of_pipe() -> OwnedFd:
    reader, writer = os.pipe()
    os.close(writer)
    return OwnedFd(reader)


def end_of_socket() -> OwnedFd:
    ours, theirs = socket.socketpair()
    theirs.close()
    return OwnedFd(ours.detach())


def huge_page() -> OwnedFd:
    return OwnedFd(os.memfd_create("huge", os.MFD_HUGETLB))


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (eventfd, Kind.EVENTFD),
        (lambda: memfd(1), Kind.MEMORY),
        (huge_page, Kind.MEMORY),
        (end_of_pipe, Kind.PIPE),
        (end_of_socket, Kind.SOCKET),
        (lambda: OwnedFd(socket.socket().detach()), Kind.OTHER),
        (lambda: OwnedFd(os.open("/dev/null", os.O_RDONLY)), Kind.OTHER),
        (lambda: OwnedFd(os.open("/proc/self/status", os.O_RDONLY)), Kind.OTHER),
        (lambda: OwnedFd(os.open("/", os.O_RDONLY)), Kind.OTHER),
    ],
)
def test_what_descriptors_stand_for(make: Callable[[], OwnedFd], kind: Kind) -> None:
    with make() as fd:
        assert kind_of(fd) is kind


def test_names_do_not_make_a_file_what_it_is_not(tmp_path: Path) -> None:
    for name in ("pipe:[1]", "socket:[1]", "anon_inode:[eventfd]"):
        file = tmp_path / name
        os.mkfifo(file)
        with OwnedFd(os.open(file, os.O_RDWR)) as fd:
            assert kind_of(fd) is Kind.OTHER


def test_closing_does_not_wait_for_a_socket_that_lingers() -> None:
    """30 s, if we waited; and several of them are closed after all when their peers go."""
    began = time.monotonic()
    numbers = []
    for _ in range(6):
        fd = ForeignFd(lingering().detach())
        numbers.append(fd.fileno())
        fd.close()
        assert fd.closed
    assert time.monotonic() - began < 20
    for peer in _peers:
        peer.close()
    _peers.clear()
    while any(_open(number) for number in numbers):
        time.sleep(0.01)


def _open(number: int) -> bool:
    return Path(f"/proc/self/fd/{number}").is_symlink()
