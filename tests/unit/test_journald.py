"""The log as entries of the journal: what its datagrams hold, and when they are used."""

from __future__ import annotations

import io
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from vhostbridge.bridge.events import Event, Events, Kind
from vhostbridge.bridge.journald import JournalHandler, leads_to_journal, working_for


def fields_of(datagram: bytes) -> dict[str, str]:
    """An entry, read as journald reads it."""
    fields = {}
    while datagram:
        line, _, datagram = datagram.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            size = int.from_bytes(datagram[:8], "little")
            value, end = datagram[8 : 8 + size], datagram[8 + size : 9 + size]
            assert end == b"\n"
            datagram = datagram[9 + size :]
        assert name.decode() not in fields
        fields[name.decode()] = value.decode()
    return fields


class Journal:
    """A socket as journald has one, and a logger that leads there."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "socket")
        self.stream = io.StringIO()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.path)
        self._socket.settimeout(5)
        self.handler = JournalHandler(self.stream, self.path)

    def entry(self) -> dict[str, str]:
        return fields_of(self._socket.recv(1 << 20))

    def close(self) -> None:
        self.handler.close()
        self._socket.close()


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    found = Journal(tmp_path)
    root = logging.getLogger("vhostbridge")
    root.addHandler(found.handler)
    root.setLevel(logging.DEBUG)
    yield found
    root.removeHandler(found.handler)
    root.setLevel(logging.NOTSET)
    found.close()


@pytest.mark.parametrize(
    ("level", "priority"),
    [
        (logging.CRITICAL, "2"),
        (logging.ERROR, "3"),
        (logging.WARNING, "4"),
        (logging.INFO, "6"),
        (logging.DEBUG, "7"),
    ],
)
def test_line_is_an_entry_with_its_priority(journal: Journal, level: int, priority: str) -> None:
    logging.getLogger("vhostbridge.daemon").log(level, "%s: what happened", "vm1")
    assert journal.entry() == {
        "MESSAGE": "vm1: what happened",
        "PRIORITY": priority,
        "SYSLOG_IDENTIFIER": "vhost-bridge",
        "LOGGER": "vhostbridge.daemon",
    }


def test_entry_of_a_bridges_task_has_its_name(journal: Journal) -> None:
    token = working_for.set("vm1")
    try:
        logging.getLogger("vhostbridge.shadow").info("vdpa:blk0: requests pass straight now")
    finally:
        working_for.reset(token)
    assert journal.entry()["VHOST_BRIDGE"] == "vm1"


def test_event_is_an_entry_with_its_details(journal: Journal) -> None:
    details = {"reason": "operator", "seconds": 0.25, "phases": {"suspend": 0.2}}
    Events().tell(Event("vm2", Kind.PAUSE, "operator, 250 ms", details))
    found = journal.entry()
    assert found.pop("LOGGER") == "vhostbridge.events"
    assert found == {
        "MESSAGE": "vm2: pause: operator, 250 ms",
        "PRIORITY": "7",
        "SYSLOG_IDENTIFIER": "vhost-bridge",
        "VHOST_BRIDGE": "vm2",
        "VHOST_BRIDGE_EVENT": "pause",
        "VHOST_BRIDGE_REASON": "operator",
        "VHOST_BRIDGE_SECONDS": "0.25",
    }


def test_text_of_a_peer_can_not_look_like_a_field(journal: Journal) -> None:
    text = "first\nPRIORITY=0\n_UID=0\n"
    logging.getLogger("vhostbridge.daemon").warning("%s", text)
    found = journal.entry()
    assert (found["MESSAGE"], found["PRIORITY"]) == (text, "4") and "_UID" not in found


def test_traceback_is_in_the_message(journal: Journal) -> None:
    try:
        raise ValueError("of ours")
    except ValueError:
        logging.getLogger("vhostbridge.daemon").exception("internal error")
    lines = journal.entry()["MESSAGE"].splitlines()
    assert (lines[0], lines[-1]) == ("internal error", "ValueError: of ours")


def test_line_goes_to_the_stream_if_there_is_no_journal(journal: Journal) -> None:
    os.unlink(journal.path)
    logging.getLogger("vhostbridge.daemon").error("still told")
    assert journal.stream.getvalue() == "still told\n"


def test_line_that_is_too_long_goes_to_the_stream(journal: Journal) -> None:
    logging.getLogger("vhostbridge.daemon").error("x" * (8 << 20))
    assert len(journal.stream.getvalue()) == (8 << 20) + 1


def test_journal_is_used_only_for_the_stream_that_leads_there(tmp_path: Path) -> None:
    with (tmp_path / "one").open("w") as one, (tmp_path / "two").open("w") as two:
        found = os.fstat(one.fileno())
        told = {"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"}
        assert leads_to_journal(one, told)
        assert not leads_to_journal(two, told)
        assert not leads_to_journal(one, {})
    assert not leads_to_journal(io.StringIO(), told)
