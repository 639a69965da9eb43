"""What systemd is told of a daemon: sd_notify(3), without a library that must be installed."""

from __future__ import annotations

import logging
import os
import socket
import time
from contextlib import suppress

import trio

_log = logging.getLogger("vhostbridge.daemon")


class Notifier:
    """Tells the service manager that started this process; nobody if none did."""

    def __init__(self) -> None:
        self._path = os.environ.get("NOTIFY_SOCKET", "")
        if self._path.startswith("@"):
            self._path = "\0" + self._path[1:]

    def _send(self, *lines: str) -> None:
        if not self._path:
            return
        # A service manager that does not listen must not cost a guest its device.
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.sendto("\n".join(lines).encode(), self._path)

    def ready(self, status: str) -> None:
        """Started, or done with reloading."""
        self._send("READY=1", f"STATUS={status}")

    def reloading(self) -> None:
        """The configuration is read again."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """On its way out."""
        self._send("STOPPING=1")

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
