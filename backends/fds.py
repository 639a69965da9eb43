"""File descriptors with exactly one owner."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable

from .closing import Closing


class OwnedFd(Closing):
    """One open file descriptor that is closed exactly once.

    Whoever holds the object owns the descriptor. ``close`` is idempotent; ``detach`` gives the
    number away. One that is dropped while open is closed with a ``ResourceWarning``.
    """

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        """The number; raises ``ValueError`` once closed or detached."""
        if self._fd < 0:
            raise ValueError("file descriptor is closed")
        return self._fd

    @property
    def closed(self) -> bool:
        return self._fd < 0

    def dup(self) -> OwnedFd:
        """A second descriptor (close-on-exec) for the same open file."""
        return OwnedFd(os.dup(self.fileno()))

    def detach(self) -> int:
        """Give up ownership and return the number."""
        fd, self._fd = self.fileno(), -1
        return fd

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, stacklevel=2, source=self)
            self.close()

    def __repr__(self) -> str:
        return f"<OwnedFd {self._fd}>" if self._fd >= 0 else "<OwnedFd closed>"


def close_all(fds: Iterable[OwnedFd | None]) -> None:
    """Close every descriptor of ``fds``; ``None`` stands for one that was never there."""
    for fd in fds:
        if fd is not None:
            fd.close()


def new_eventfd() -> OwnedFd:
    """A non-blocking, close-on-exec eventfd with count 0."""
    return OwnedFd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))


def is_eventfd(fd: OwnedFd) -> bool:
    """Whether a descriptor that a peer sent is an eventfd, and so can be waited for and counted."""
    return os.readlink(f"/proc/self/fd/{fd.fileno()}") == "anon_inode:[eventfd]"


async def signal_eventfds(*fds: OwnedFd | None) -> None:
    """Add 1 to eventfds, any of which may be absent.

    A counter at its maximum means that the other side has not read 2^64 - 2 signals: one more
    changes nothing, so it is skipped. A peer that fills the counter just then makes the write
    wait, for a millisecond; that is why a thread does it. (The non-blocking flag would be the
    peer's too, and it may count on reads that wait.)
    """
    numbers = [fd.fileno() for fd in fds if fd is not None and not fd.closed]
    if numbers:
        # Here, because commands that only ask a daemon start without it.
        import trio

        await trio.to_thread.run_sync(_signal, numbers, limiter=trio.CapacityLimiter(1))


def _signal(numbers: Iterable[int]) -> None:
    from vhostbridge.native import lib

    for number in numbers:
        lib.vb_signal_eventfd(number)
