"""A client of QEMU's monitor protocol, over a socket pair that QEMU inherits."""

from __future__ import annotations

import json
import socket
from typing import Any

TIMEOUT = 60.0


class QmpError(Exception):
    """QEMU refused a command."""


class Qmp:
    """One connection. `remote` is QEMU's end: pass it on, and close it here after the start."""

    def __init__(self) -> None:
        self._socket, self.remote = socket.socketpair()
        self._socket.settimeout(TIMEOUT)
        self._lines = self._socket.makefile("rb")
        self.events: list[dict[str, Any]] = []

    def start(self) -> None:
        """Close QEMU's end, wait for its greeting and leave negotiation mode."""
        self.remote.close()
        self._receive()
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: Any) -> Any:
        """Run a command and return what it returns.

        Raises:
            QmpError: it was refused, or QEMU went away.
        """
        request = {"execute": command, "arguments": arguments}
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        while True:
            message = self._receive()
            if "event" in message:
                self.events.append(message)
            elif "error" in message:
                raise QmpError(f"{command}: {message['error']['desc']}")
            else:
                return message["return"]

    def timeout(self, seconds: float) -> None:
        """Answers must come within that time from now on."""
        self._socket.settimeout(seconds)

    def wait_for_event(self, name: str) -> dict[str, Any]:
        """Return the next event of that name, one that has come already included."""
        while True:
            for event in self.events:
                if event["event"] == name:
                    self.events.remove(event)
                    return event
            message = self._receive()
            if "event" in message:
                self.events.append(message)

    def close(self) -> None:
        self._lines.close()
        self._socket.close()
        self.remote.close()

    def _receive(self) -> dict[str, Any]:
        line = self._lines.readline()
        if not line:
            raise QmpError("QEMU closed its monitor")
        message: dict[str, Any] = json.loads(line)
        return message
