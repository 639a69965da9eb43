"""States through files, pipes and sockets: the same bytes, flat memory, nobody's flags changed."""

from __future__ import annotations

import fcntl
import os
import socket
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.unit.states import BLOCK, FILES, save
from vhostbridge.backends.errors import StateError
from vhostbridge.backends.fds import OwnedFd
from vhostbridge.backends.state import MAX_CHUNK, DeviceState
from vhostbridge.backends.state_stream import (
    CheckedFd,
    Sink,
    Source,
    check_stream,
    load_internal,
    save_stream,
)

MIB = 1 << 20
INTERNAL = bytes(range(256)) * 4096 * 2 + b"the rest"  # two chunks and a bit
Ends = tuple[OwnedFd, OwnedFd]


def ignore(count: int) -> None:
    pass


def pipe() -> Ends:
    reading, writing = os.pipe()
    return OwnedFd(reading), OwnedFd(writing)


def socket_pair() -> Ends:
    reading, writing = socket.socketpair()
    return OwnedFd(reading.detach()), OwnedFd(writing.detach())


CHANNELS: dict[str, Callable[[], Ends]] = {"pipe": pipe, "socket": socket_pair}


async def write_all(fd: OwnedFd, data: bytes) -> None:
    with Sink(fd) as sink:
        await sink.write(data)


async def read_all(fd: OwnedFd) -> bytes:
    found = b""
    with Source(fd) as source:
        while data := await source.read(MAX_CHUNK):
            found += data
    return found


async def save_through(fd: OwnedFd, state: DeviceState, internal: bytes) -> None:
    reading, writing = pipe()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(write_all, writing, internal)
        with Source(reading) as source, Sink(fd) as sink:
            await save_stream(state, source, sink, ignore)


async def internal_of(checked: CheckedFd) -> bytes:
    """What ``load_internal`` gives to a back-end."""
    found = b""
    reading, writing = pipe()

    async def collect() -> None:
        nonlocal found
        found = await read_all(reading)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(collect)
        with checked, Sink(writing) as sink:
            await load_internal(checked, sink, ignore)
    return found


def chunks(data: bytes) -> list[bytes]:
    return [data[at : at + MAX_CHUNK] for at in range(0, len(data), MAX_CHUNK)]


@pytest.mark.parametrize("channel", CHANNELS.values(), ids=CHANNELS)
@pytest.mark.parametrize("internal", [INTERNAL, INTERNAL[:MIB], b"x", b""], ids=len)
async def test_state_goes_through_a_channel_and_comes_out_the_same(
    channel: Callable[[], Ends], internal: bytes
) -> None:
    reading, writing = channel()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(save_through, writing, FILES, internal)
        state, checked = await check_stream(reading, ignore)
    assert state == FILES
    assert await internal_of(checked) == internal


async def test_state_goes_through_a_file_that_is_not_copied(tmp_path: Path) -> None:
    path = tmp_path / "state"
    await save_through(OwnedFd(os.open(path, os.O_CREAT | os.O_WRONLY)), FILES, INTERNAL)
    assert path.read_bytes() == save(FILES, chunks(INTERNAL))
    state, checked = await check_stream(OwnedFd(os.open(path, os.O_RDONLY)), ignore)
    assert state == FILES
    assert os.path.samestat(os.fstat(checked.fileno()), path.stat())
    assert await internal_of(checked) == INTERNAL


async def test_stream_in_a_file_begins_where_its_descriptor_stands(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_bytes(b"before" + save(FILES, [b"inside"]))
    fd = OwnedFd(os.open(path, os.O_RDONLY))
    os.lseek(fd.fileno(), 6, os.SEEK_SET)
    _, checked = await check_stream(fd, ignore)
    assert await internal_of(checked) == b"inside"


async def test_chunks_do_not_depend_on_how_a_back_end_writes(tmp_path: Path) -> None:
    """The same state is the same file."""
    path = tmp_path / "state"
    reading, writing = pipe()
    with Sink(OwnedFd(os.open(path, os.O_CREAT | os.O_WRONLY))) as sink, Source(reading) as source:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(save_stream, FILES, source, sink, ignore)
            with Sink(writing) as pieces:
                for at in range(0, len(INTERNAL), 100_003):
                    await pieces.write(INTERNAL[at : at + 100_003])
                    await wait_all_tasks_blocked()
    assert path.read_bytes() == save(FILES, chunks(INTERNAL))


async def test_progress_counts_what_was_written_read_and_copied(tmp_path: Path) -> None:
    path = tmp_path / "state"
    whole = len(save(FILES, chunks(INTERNAL)))
    counts: list[list[int]] = [[], [], []]
    (internal := tmp_path / "internal").write_bytes(INTERNAL)
    with (
        Source(OwnedFd(os.open(internal, os.O_RDONLY))) as source,
        Sink(OwnedFd(os.open(path, os.O_CREAT | os.O_WRONLY))) as sink,
    ):
        assert await save_stream(FILES, source, sink, counts[0].append) == whole
    _, checked = await check_stream(OwnedFd(os.open(path, os.O_RDONLY)), counts[1].append)
    with checked, Sink(OwnedFd(os.open(os.devnull, os.O_WRONLY))) as sink:
        await load_internal(checked, sink, counts[2].append)
    assert [count[-1] for count in counts] == [whole, whole, len(INTERNAL)]
    assert all(count == sorted(count) and len(count) >= 3 for count in counts)


@pytest.mark.parametrize("channel", CHANNELS.values(), ids=CHANNELS)
async def test_flags_of_descriptors_that_others_share_stay(channel: Callable[[], Ends]) -> None:
    reading, writing = channel()
    seen: set[int] = set()
    with reading.dup() as theirs, writing.dup() as ours:

        def look(count: int) -> None:
            seen.update(fcntl.fcntl(fd.fileno(), fcntl.F_GETFL) & os.O_NONBLOCK for fd in both)

        both = (theirs, ours)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read_all, reading)
            with Sink(writing) as sink:
                await save_stream(BLOCK, None, sink, look)
                look(0)
            ours.close()  # so that the reader comes to its end
    assert seen == {0}


@pytest.mark.parametrize("channel", CHANNELS.values(), ids=CHANNELS)
async def test_other_tasks_run_while_a_channel_is_empty(channel: Callable[[], Ends]) -> None:
    reading, writing = channel()
    found = b""

    async def read() -> None:
        nonlocal found
        with Source(reading) as source:
            found = await source.read(10)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await wait_all_tasks_blocked()
        await write_all(writing, b"now")
    assert found == b"now"


@pytest.mark.parametrize("channel", CHANNELS.values(), ids=CHANNELS)
async def test_cancelled_save_is_no_state_to_its_reader(channel: Callable[[], Ends]) -> None:
    reading, writing = channel()
    with Sink(writing) as sink, Source(OwnedFd(os.open("/dev/zero", os.O_RDONLY))) as endless:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(save_stream, FILES, endless, sink, ignore)
            await wait_all_tasks_blocked(0.01)
            nursery.cancel_scope.cancel()
    with pytest.raises(StateError, match="cut short"):
        await check_stream(reading, ignore)


@pytest.mark.parametrize("channel", CHANNELS.values(), ids=CHANNELS)
async def test_cancelled_check_lets_go_of_everything(channel: Callable[[], Ends]) -> None:
    reading, writing = channel()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(check_stream, reading, ignore)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert reading.closed
    writing.close()


@pytest.mark.parametrize("channel", CHANNELS.values(), ids=CHANNELS)
async def test_reader_that_went_away_is_told(channel: Callable[[], Ends]) -> None:
    reading, writing = channel()
    reading.close()
    with Sink(writing) as sink, pytest.raises(StateError, match="the device state: Broken pipe"):
        await save_stream(BLOCK, None, sink, ignore)


async def test_disk_that_is_full_is_told() -> None:
    full = Sink(OwnedFd(os.open("/dev/full", os.O_WRONLY)))
    with full, pytest.raises(StateError, match="No space left on device"):
        await save_stream(BLOCK, None, full, ignore)


async def test_what_can_not_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="cannot read the device state: Is a directory"):
        await check_stream(OwnedFd(os.open(tmp_path, os.O_RDONLY)), ignore)


@pytest.mark.parametrize("owner", ["vhost-user", None])
async def test_internal_state_without_owner_or_the_reverse_is_the_callers_mistake(
    owner: str | None,
) -> None:
    state = replace(FILES, internal_owner=owner)
    with (
        Sink(OwnedFd(os.open(os.devnull, os.O_WRONLY))) as sink,
        Source(OwnedFd(os.open(os.devnull, os.O_RDONLY))) as source,
        pytest.raises(ValueError, match="owner"),
    ):
        await save_stream(state, None if owner else source, sink, ignore)


async def checked_through_pipe(state: DeviceState, internal: bytes) -> tuple[str, CheckedFd]:
    reading, writing = pipe()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(save_through, writing, state, internal)
        _, checked = await check_stream(reading, ignore)
    return os.readlink(f"/proc/self/fd/{checked.fileno()}"), checked


async def test_small_state_from_a_pipe_is_kept_in_memory() -> None:
    link, checked = await checked_through_pipe(FILES, INTERNAL)
    assert link.startswith("/memfd:")
    assert await internal_of(checked) == INTERNAL


async def test_large_state_from_a_pipe_is_kept_in_a_file_without_a_name() -> None:
    link, checked = await checked_through_pipe(FILES, INTERNAL * 3)
    assert link.startswith("/var/tmp/") and link.endswith(" (deleted)")
    assert await internal_of(checked) == INTERNAL * 3


async def test_copy_that_has_no_room_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vhostbridge.backends.state_file._SPOOL_FOLDER", "/nowhere")
    reading, writing = pipe()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(write_until_refused, writing, save(FILES, chunks(INTERNAL * 3)))
        with pytest.raises(StateError, match="cannot keep a copy of the state in /nowhere"):
            await check_stream(reading, ignore)


async def write_until_refused(fd: OwnedFd, data: bytes) -> None:
    with pytest.raises(StateError, match="Broken pipe"):
        await write_all(fd, data)


CHANGES: dict[str, Callable[[bytes], bytes]] = {
    "a byte": lambda raw: raw[:-200] + bytes([raw[-200] ^ 1]) + raw[-199:],
    "cut": lambda raw: raw[:-200],
    "longer": lambda raw: raw + b"x",
    "empty": lambda raw: b"",
    "another state": lambda raw: save(FILES, [b"another"]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
async def test_file_that_changes_after_it_was_checked_is_refused(
    tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / "state"
    path.write_bytes(raw := save(FILES, [INTERNAL[:MIB], b"x" * 1000]))
    _, checked = await check_stream(OwnedFd(os.open(path, os.O_RDONLY)), ignore)
    path.write_bytes(change(raw))
    sink = Sink(OwnedFd(os.open(os.devnull, os.O_WRONLY)))
    with checked, sink, pytest.raises(StateError, match="changed while it was loaded"):
        await load_internal(checked, sink, ignore)


async def test_file_that_is_replaced_after_it_was_checked_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_bytes(save(FILES, [b"first"]))
    _, checked = await check_stream(OwnedFd(os.open(path, os.O_RDONLY)), ignore)
    (other := tmp_path / "other").write_bytes(save(FILES, [b"second"]))
    other.rename(path)
    assert await internal_of(checked) == b"first"


async def test_damaged_state_is_refused_and_its_descriptor_closed(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_bytes(save(FILES, chunks(INTERNAL))[:-1])
    fd = OwnedFd(os.open(path, os.O_RDONLY))
    with pytest.raises(StateError, match="cut short"):
        await check_stream(fd, ignore)
    assert fd.closed


async def test_pipe_that_may_not_be_opened_again_works_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user's: /proc/self/fd refuses it."""
    opened = os.open

    def refusing(path: str, flags: int, *more: int) -> int:
        if str(path).startswith("/proc/self/fd/"):
            raise PermissionError(13, "Permission denied")
        return opened(path, flags, *more)

    monkeypatch.setattr(os, "open", refusing)
    reading, writing = pipe()
    found = b""

    async def read() -> None:
        nonlocal found
        found = await read_all(reading)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await wait_all_tasks_blocked()
        await write_all(writing, INTERNAL)
    assert found == INTERNAL


async def test_64_mib_of_internal_state_pass_in_flat_memory() -> None:
    data = bytes(MAX_CHUNK)
    into, out_of = pipe()
    through, saved = pipe()

    async def back_end() -> None:
        with Sink(out_of) as sink:
            for _ in range(64):
                await sink.write(data)

    async def save_all() -> None:
        with Source(into) as source, Sink(saved) as sink:
            await save_stream(FILES, source, sink, ignore)

    tracemalloc.start()
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(back_end)
            nursery.start_soon(save_all)
            _, checked = await check_stream(through, ignore)
        with checked, Sink(OwnedFd(os.open(os.devnull, os.O_WRONLY))) as sink:
            await load_internal(checked, sink, ignore)
        assert tracemalloc.get_traced_memory()[1] < 16 * MIB
    finally:
        tracemalloc.stop()
