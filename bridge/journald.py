"""The log as entries of systemd's journal, with fields: its native protocol, without a library.

An entry is a datagram. Each field is ``NAME=value``, or, where the value has lines, the name on a
line of its own, the value's length in 8 bytes, little-endian, and the value. So no text of a peer
can look like a field.
"""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Mapping
from contextvars import ContextVar
from typing import TextIO

from .events import Event

SOCKET = "/run/systemd/journal/socket"

#: The bridge that the running task works for; empty for the daemon itself.
working_for: ContextVar[str] = ContextVar("working_for", default="")

# Those of syslog(3); the first one that is not above the record's level.
_PRIORITIES = (
    (logging.CRITICAL, 2),
    (logging.ERROR, 3),
    (logging.WARNING, 4),
    (logging.INFO, 6),
    (0, 7),
)
_NO_NAME = re.compile(r"[^A-Z0-9]+")


def leads_to_journal(stream: TextIO, environment: Mapping[str, str] | None = None) -> bool:
    """Whether a stream is the one that the service manager connected to the journal."""
    told = (os.environ if environment is None else environment).get("JOURNAL_STREAM", "")
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return told == f"{found.st_dev}:{found.st_ino}"


def entry(fields: Mapping[str, object]) -> bytes:
    """The datagram of an entry."""
    parts = []
    for name, value in fields.items():
        text = str(value).encode(errors="surrogateescape")
        if b"\n" in text:
            parts.append(b"%s\n%s%s\n" % (name.encode(), len(text).to_bytes(8, "little"), text))
        else:
            parts.append(b"%s=%s\n" % (name.encode(), text))
    return b"".join(parts)


def log_to(stream: TextIO, level: int) -> None:
    """Have all that is logged from ``level`` on go to a stream, or to the journal it leads to.

    The journal gets all events as well.
    """
    if not leads_to_journal(stream):
        logging.basicConfig(level=level, format="%(levelname)s %(message)s", stream=stream)
        return
    logging.basicConfig(level=level, format="%(message)s", handlers=[JournalHandler(stream)])
    logging.getLogger("vhostbridge.events").setLevel(logging.DEBUG)


class JournalHandler(logging.StreamHandler[TextIO]):
    """Gives records to the journal; what it does not take goes to a stream as lines."""

    def __init__(self, stream: TextIO, path: str = SOCKET) -> None:
        super().__init__(stream)
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        # A journal that is busy must not keep a front-end waiting.
        self._socket.setblocking(False)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._socket.sendto(entry(self._fields(record)), self._path)
        except OSError:
            super().emit(record)
        except Exception:
            self.handleError(record)

    def _fields(self, record: logging.LogRecord) -> dict[str, object]:
        fields: dict[str, object] = {
            "MESSAGE": self.format(record),
            "PRIORITY": next(number for level, number in _PRIORITIES if record.levelno >= level),
            "SYSLOG_IDENTIFIER": "vhost-bridge",
            "LOGGER": record.name,
        }
        bridge, event = working_for.get(), getattr(record, "event", None)
        if isinstance(event, Event):
            bridge = event.bridge
            fields["VHOST_BRIDGE_EVENT"] = event.kind
            for name, value in event.details.items():
                if isinstance(value, str | int | float):
                    fields[f"VHOST_BRIDGE_{_NO_NAME.sub('_', name.upper())}"] = value
        if bridge:
            fields["VHOST_BRIDGE"] = bridge
        return fields

    def close(self) -> None:
        self._socket.close()
        super().close()
