"""Descriptors that a peer sent: what they stand for is found out without asking the file itself.

A file system in user space answers when its owner likes to: ``fstat``, ``read`` and even ``close``
wait for it. So does closing a TCP socket that lingers. Nothing of a bridge's may wait for a peer.
"""

from __future__ import annotations

import fcntl
import os
import queue
import socket
import stat
import threading
from contextlib import suppress
from enum import Enum
from pathlib import Path

from .fds import OwnedFd

# File systems that answer from this machine's own memory and disks.
_LOCAL = frozenset(["tmpfs", "hugetlbfs", "ramfs", "ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs"])


class Kind(Enum):
    """What a descriptor stands for, as far as the bridge uses any."""

    EVENTFD = "an eventfd"
    #: shared memory, or a regular file of a local file system
    MEMORY = "memory"
    PIPE = "a pipe"
    SOCKET = "a UNIX socket"
    OTHER = "something else"


def kind_of(fd: OwnedFd) -> Kind:
    """What ``fd`` stands for. Never waits."""
    number = fd.fileno()
    link = os.readlink(f"/proc/self/fd/{number}")
    # Files have absolute names, so that none can look like these.
    if link == "anon_inode:[eventfd]":
        return Kind.EVENTFD
    if link.startswith("pipe:["):
        return Kind.PIPE
    if link.startswith("socket:["):
        return Kind.SOCKET if _is_unix(number) else Kind.OTHER
    with suppress(OSError):
        # Only shared memory and huge pages know of seals.
        fcntl.fcntl(number, fcntl.F_GET_SEALS)
        return Kind.MEMORY
    if _file_system(number) in _LOCAL and stat.S_ISREG(os.fstat(number).st_mode):
        return Kind.MEMORY
    return Kind.OTHER


def _is_unix(number: int) -> bool:
    sock = socket.socket(fileno=number)
    try:
        return sock.family == socket.AF_UNIX
    finally:
        sock.detach()


# By the mount that the file was opened through; empty if that is not one of ours.
def _file_system(number: int) -> str:
    lines = Path(f"/proc/self/fdinfo/{number}").read_text(encoding="ascii").splitlines()
    mount = next((line.split()[1] for line in lines if line.startswith("mnt_id:")), "")
    mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
    for line in mounts.splitlines():
        if line.split(" ", 1)[0] == mount:
            return line.rpartition(" - ")[2].split(" ", 1)[0]
    return ""


class ForeignFd(OwnedFd):
    """A descriptor that a peer sent. ``close`` never waits."""

    __slots__ = ()

    def close(self) -> None:
        if self.closed:
            return
        if kind_of(self) is Kind.OTHER:
            _close_elsewhere(self.detach())
        else:
            super().close()


# A few threads that nobody waits for, not even the interpreter at its end. If all of them hang,
# what comes later stays open; whoever sent it was cut off.
_CLOSERS = 4
_to_close: queue.SimpleQueue[int] = queue.SimpleQueue()
_closers: list[threading.Thread] = []


def _close_elsewhere(number: int) -> None:
    if len(_closers) < _CLOSERS:
        _closers.append(threading.Thread(target=_closer, name="closer", daemon=True))
        _closers[-1].start()
    _to_close.put(number)


def _closer() -> None:
    while True:
        with suppress(OSError):
            os.close(_to_close.get())
