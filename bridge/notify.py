"""What systemd is told of a daemon: sd_notify(3), without a library that must be installed."""

from __future__ import annotations

import array
import logging
import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress

import trio

_log = logging.getLogger("vhostbridge.daemon")

# How long a service manager may take to deal with what it was told, in seconds.
SETTLING = 5.0


class Notifier:
    """Tells the service manager that started this process; nobody if none did."""

    def __init__(self) -> None:
        self._path = os.environ.get("NOTIFY_SOCKET", "")
        if self._path.startswith("@"):
            self._path = "\0" + self._path[1:]

    # What must not be lost waits for its turn, where a service manager is busy.
    def _send(self, *lines: str, fds: Sequence[int] = (), wait: float = 0) -> bool:
        if not self._path:
            return False
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        # A service manager that does not listen must not cost a guest its device.
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(wait)
            sock.sendmsg(["\n".join(lines).encode()], ancillary, 0, self._path)
            return True
        return False

    def ready(self, status: str) -> None:
        """Started, or done with reloading."""
        self._send("READY=1", f"STATUS={status}")

    def reloading(self) -> None:
        """The configuration is read again."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """On its way out."""
        self._send("STOPPING=1")

    @property
    def keeps(self) -> bool:
        """Whether the service manager keeps descriptors for the process after this one.

        It says so since systemd 254, where FileDescriptorStoreMax= is set.
        """
        return bool(self._path) and os.environ.get("FDSTORE", "0") not in ("", "0")

    def keep(self, name: str, fd: int) -> bool:
        """Give a descriptor into keeping; False if that was not possible.

        It is not looked at meanwhile: a socket whose other end is closed stays there.
        """
        return self._send("FDSTORE=1", f"FDNAME={name}", "FDPOLL=0", fds=[fd], wait=SETTLING)

    def forget(self, name: str) -> None:
        """Have what is kept under a name closed."""
        self._send("FDSTOREREMOVE=1", f"FDNAME={name}", wait=SETTLING)

    async def settled(self) -> None:
        """Wait until all that was said so far has been dealt with, but not for ever."""
        ours, theirs = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            said = self._send("BARRIER=1", fds=[theirs], wait=SETTLING)
            os.close(theirs)
            if said:
                with trio.move_on_after(SETTLING):
                    await trio.lowlevel.wait_readable(ours)
        finally:
            os.close(ours)

    async def keep_alive(self) -> None:
        """Feed the watchdog, if there is one, for as long as this event loop turns."""
        interval = watchdog_interval()
        if interval is None or not self._path:
            return
        _log.info("watchdog: every %.3g s", interval)
        while True:
            self._send("WATCHDOG=1")
            await trio.sleep(interval)


def watchdog_interval() -> float | None:
    """Seconds between two signs of life, half of what the service manager allows."""
    period = os.environ.get("WATCHDOG_USEC", "")
    for_whom = os.environ.get("WATCHDOG_PID", "")
    if not period.isdecimal() or int(period) == 0:
        return None
    if for_whom and for_whom != str(os.getpid()):
        return None
    return int(period) / 2e6
