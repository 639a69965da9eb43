"""Trace files: whose they are, how large they grow, and what remains of them after damage."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.peers.process import eventually
from vhostbridge.backends.errors import BridgeError, TargetError
from vhostbridge.backends.trace import Tracer
from vhostbridge.bridge.trace import writer
from vhostbridge.bridge.trace.entry import Entry
from vhostbridge.bridge.trace.reader import read, records
from vhostbridge.bridge.trace.tracing import Tracing
from vhostbridge.bridge.trace.writer import TraceFile

LIMIT = 1 << 20


@contextmanager
def writing(path: Path, limit: int = LIMIT) -> Iterator[Tracer]:
    file, trace = TraceFile(path, limit), Tracer("b")
    trace.attach(file.put)
    try:
        yield trace
    finally:
        file.close()


def entries(path: Path, notes: list[str] | None = None) -> list[Entry]:
    said: list[str] = []
    found = [entry for entry, _ in read(str(path), note=said.append)]
    if notes is None:
        assert said == []
    else:
        notes += said
    return found


def numbers(path: Path) -> list[object]:
    return [(e.fields or {})["number"] for e in entries(path) if e.name == "count"]


def test_what_is_told_is_in_the_file_in_its_order(tmp_path: Path) -> None:
    path = tmp_path / "t"
    with writing(path) as trace:
        for number in range(1000):
            trace.event("count", number=number)
    assert numbers(path) == list(range(1000))
    assert path.stat().st_mode & 0o777 == 0o600


def test_records_are_there_while_the_daemon_runs(tmp_path: Path) -> None:
    """So a process that is killed loses milliseconds."""
    path = tmp_path / "t"
    with writing(path) as trace:
        trace.event("count", number=1)
        eventually(lambda: b'"count"' in path.read_bytes(), "the record is written", 10)


def test_file_of_another_daemon_is_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.touch(0o666)
    path.chmod(0o666)
    for number in range(3):
        with writing(path) as trace:
            trace.event("count", number=number)
    assert numbers(path) == [0, 1, 2]
    assert [e.name for e in entries(path) if e.kind == "start"] == ["start"] * 3
    assert path.stat().st_mode & 0o777 == 0o600


def test_line_that_a_killed_daemon_tore_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "t"
    with writing(path) as trace:
        trace.event("count", number=0)
        trace.event("count", number=1)
    os.truncate(path, path.stat().st_size - 9)
    notes: list[str] = []
    assert [e.fields for e in entries(path, notes) if e.name == "count"] == [{"number": 0}]
    assert notes == [f"{path}: the last record is torn, as by a daemon that was killed"]
    with writing(path) as trace:
        trace.event("count", number=2)
    notes.clear()
    found = [(e.fields or {})["number"] for e in entries(path, notes) if e.name == "count"]
    assert found == [0, 2]
    assert notes == [f"{path}: line 3 is torn, as by a daemon that was killed"]


def test_full_file_is_put_aside(tmp_path: Path) -> None:
    path, aside = tmp_path / "t", tmp_path / "t.1"
    with writing(path, 20_000) as trace:
        for number in range(400):
            trace.event("count", number=number, text="x" * 50)
            if number % 20 == 0:
                eventually(lambda: trace_size(path) > 0, "it is written")
    assert path.stat().st_size <= 20_000 and aside.stat().st_size <= 20_000
    assert (path.stat().st_mode & 0o777, aside.stat().st_mode & 0o777) == (0o600, 0o600)
    kept = [*numbers(aside), *numbers(path)]
    assert kept == list(range(400))[-len(kept) :] and len(kept) > 50
    assert entries(path)[0].name == "continued"


def trace_size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def test_other_files_are_never_written_to(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("mine\n")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "new")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path, said in (
        (text, "is there and is no trace"),
        (link, "cannot write the trace"),
        (pipe, "is no regular file"),
        (tmp_path, "cannot write the trace"),
        (tmp_path / "none" / "t", "cannot write the trace"),
    ):
        with pytest.raises(TargetError, match=said):
            TraceFile(path, LIMIT)
    assert text.read_text() == "mine\n" and not (tmp_path / "new").exists()


def test_one_file_has_one_writer(tmp_path: Path) -> None:
    path = tmp_path / "t"
    with writing(path), pytest.raises(TargetError, match="another vhost-bridge writes the trace"):
        TraceFile(path, LIMIT)
    with writing(path):
        pass


def test_slow_disk_costs_records_but_never_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "WAITING", 10)
    path, go = tmp_path / "t", threading.Event()
    write = os.write

    def slowly(fd: int, data: bytes) -> int:
        go.wait(30)
        return write(fd, data)

    with writing(path) as trace:
        monkeypatch.setattr(os, "write", slowly)
        for number in range(100):
            trace.event("count", number=number)
        go.set()
        eventually(lambda: b'"count"' in path.read_bytes(), "the disk is there again")
        trace.event("count", number=100)
    lost = [e.fields or {} for e in entries(path) if e.name == "records lost"]
    kept = [n for n in numbers(path) if n != 100]
    assert kept == list(range(len(kept))) and len(kept) < 30
    assert sum(int(str(one["count"])) for one in lost) == 100 - len(kept)


def test_disk_that_is_full_ends_the_trace_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(fd: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    with Tracing(tmp_path / "t", LIMIT) as tracing:
        trace = tracing.tracer("b")
        assert trace.on
        monkeypatch.setattr(os, "write", full)
        trace.event("count", number=0)
        eventually(lambda: not trace.on, "the trace ends")
        trace.event("count", number=1)
    assert f"cannot write the trace {tmp_path / 't'}: No space left on device" in caplog.text


def test_trace_begins_and_ends_while_bridges_run(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    with Tracing() as tracing:
        trace = tracing.tracer("b")
        assert not trace.on
        trace.event("count", number=0)
        tracing.become(one, LIMIT)
        trace.event("count", number=1)
        tracing.become(one, LIMIT)
        tracing.become(two, LIMIT)
        assert tracing.tracer("b") is trace
        assert tracing.tracer("later").on
        trace.event("count", number=2)
        tracing.become(tmp_path / "no" / "where", LIMIT)
        assert not trace.on
        tracing.become(two, LIMIT)
        trace.event("count", number=3)
        tracing.become(None, LIMIT)
        assert not trace.on
    assert (numbers(one), numbers(two)) == ([1], [2, 3])


def test_log_is_part_of_the_trace(tmp_path: Path) -> None:
    log = logging.getLogger("vhostbridge.daemon")
    before = log.level
    log.setLevel(logging.INFO)
    try:
        with Tracing(tmp_path / "t", LIMIT) as tracing:
            tracing.tracer("vm1")
            log.info("%s: suspended", "vm1")
            log.error("%s: no bridge", "/dev/x")
            log.debug("%s: not this", "vm1")
        log.info("%s: nor this", "vm1")
    finally:
        log.setLevel(before)
    found = [(e.bridge, e.name, e.fields) for e in entries(tmp_path / "t") if e.kind == "event"]
    assert found == [
        ("vm1", "info", {"text": "suspended"}),
        ("", "error", {"text": "/dev/x: no bridge"}),
    ]


# Damage


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small trace with a record of each kind."""
    path = tmp_path_factory.mktemp("trace") / "t"
    with writing(path) as trace:
        trace.event("state", before="reset", now="running", device="vdpa:x")
        trace.record(
            lambda device_id: [
                {"kind": "message", "from": "front-end", "to": "bridge", "name": "SET_OWNER"},
                {"kind": "ioctl", "from": "bridge", "to": "/dev/x", "name": "y", "result": -1},
            ]
        )
    return path.read_bytes()


def survives(data: bytes) -> list[Entry] | str:
    """What is read of it, or the one line that says why it can't be."""
    try:
        found = records(BytesIO(data), "t", more=lambda: False, note=lambda text: None)
        return [entry for entry, _ in found]
    except BridgeError as error:
        said = str(error)
    assert "\n" not in said
    return said


def test_damage_at_every_byte_is_read_or_told(sound: bytes) -> None:
    whole = survives(sound)
    for at in range(len(sound)):
        for value in (0, 0x0A, 0x22, 0x5B, 0x7B, 0xFF, sound[at] ^ 1):
            survives(sound[:at] + bytes([value]) + sound[at + 1 :])
        cut = survives(sound[:at])
        if at > len(sound.split(b"\n")[0]):
            assert isinstance(cut, list) and cut == whole[: len(cut)]


@given(st.binary(max_size=300))
def test_any_bytes_behind_a_trace_are_read_or_told(sound: bytes, tail: bytes) -> None:
    survives(sound + tail)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"[" * 100_000, "it is no JSON"),
        (b'{"mono":' + b"9" * 5000 + b"}", "it is no JSON"),
        (b'{"mono":1,"wall":NaN}', "it is no JSON"),
        (b"[1]", "it is no object"),
        (b'{"mono":1}', "its wall is no number"),
        (b'{"mono":true,"wall":1}', "its mono is no number"),
        (b'{"mono":1,"wall":1,"kind":"x","name":"y"}', "there is no kind of record 'x'"),
        (b'{"mono":1,"wall":1,"kind":"ioctl","name":"y"}', "from whom to whom"),
        (b'{"mono":1,"wall":1,"kind":"event","name":"y","fields":[]}', "its fields are nested"),
        (
            b'{"mono":1,"wall":1,"kind":"event","name":"y","fields":{"a":[[[[[1]]]]]}}',
            "its fields are nested",
        ),
        (b'{"vhost-bridge-trace":2,"mono":1,"wall":1,"kind":"start","name":"s"}', "of format 2"),
        (b"x" * (3 << 20), "it is longer than 1048576 bytes"),
    ],
)
def test_line_that_is_no_record_is_told_with_its_number(
    sound: bytes, line: bytes, said: str
) -> None:
    found = survives(sound + line + b"\n" + sound.split(b"\n")[1] + b"\n")
    assert isinstance(found, str) and said in found
    assert "t is damaged in line 5: " in found


def test_files_that_are_no_traces_are_told(tmp_path: Path) -> None:
    for data in (b"", b"hello\n", b'{"a":1}\n', b"\0" * 100, b"\xff\xfe"):
        said = survives(data)
        assert isinstance(said, str) and "no trace" in said, data
    with pytest.raises(TargetError, match="cannot read the trace"):
        entries(tmp_path / "none")


def test_large_trace_is_read_as_a_stream(tmp_path: Path, sound: bytes) -> None:
    """Of a file of 1 GiB, most of it a hole, the records before it come and memory stays small."""
    path = tmp_path / "t"
    path.write_bytes(sound)
    os.truncate(path, 1 << 30)
    found: list[Entry] = []
    with pytest.raises(TargetError, match="damaged in line 5: it is longer than"):
        found.extend(entry for entry, _ in read(str(path), note=lambda text: None))
    assert len(found) == 4


def test_trace_is_followed_over_its_end(tmp_path: Path) -> None:
    path = tmp_path / "t"
    found: list[int] = []

    def follow() -> None:
        for entry, _ in read(str(path), follow=True, note=lambda text: None):
            if entry.name == "count":
                found.append(json.loads(str((entry.fields or {})["number"])))
                if found[-1] == 299:
                    return

    with writing(path, 20_000) as trace:
        trace.event("count", number=0)
        eventually(lambda: b'"count"' in path.read_bytes(), "it is written")
        reader = threading.Thread(target=follow)
        reader.start()
        for number in range(1, 300):
            trace.event("count", number=number, text="x" * 50)
            if number % 60 == 0:
                eventually(lambda: found[-1:] == [number], "it is followed")  # noqa: B023
    reader.join(30)
    assert found == list(range(300))
