"""Who holds a device or listens at a path, in a made-up proc tree and in the real /proc."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from vhostbridge.backends.holders import Holder, holders, listening_at, unix_listener
from vhostbridge.backends.vhostuser.sockets import listen, unlisten


class Proc:
    """A /proc in a temporary folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "net").mkdir()

    def process(self, pid: int, comm: str, *cmdline: str, fds: tuple[str, ...] = ()) -> Path:
        folder = self.root / str(pid)
        (folder / "fd").mkdir(parents=True)
        (folder / "comm").write_text(comm + "\n")
        (folder / "cmdline").write_bytes(b"".join(word.encode() + b"\0" for word in cmdline))
        for number, target in enumerate(fds):
            (folder / "fd" / str(number)).symlink_to(target)
        return folder

    def sockets(self, *rows: tuple[str, int, str]) -> None:
        lines = ["Num       RefCount Protocol Flags    Type St Inode Path"]
        lines += [f"0000: 00000002 00000000 {flags} 0001 01 {i} {path}" for flags, i, path in rows]
        (self.root / "net/unix").write_text("\n".join(lines) + "\n")


LISTENING = "00010000"
CONNECTED = "00000000"


@pytest.fixture
def proc(tmp_path: Path) -> Proc:
    return Proc(tmp_path)


def test_holders_of_a_device_are_found_by_its_number(proc: Proc) -> None:
    proc.process(80, "qemu-system-x86", "qemu-system-x86_64", "-m", "1G", fds=("/dev/null",))
    proc.process(9, "cat", "cat", fds=("/dev/zero",))
    assert holders(Path("/dev/null"), proc.root) == [
        Holder(80, "qemu-system-x86", ("qemu-system-x86_64", "-m", "1G"))
    ]


def test_each_holder_is_listed_once_by_rising_pid(proc: Proc) -> None:
    proc.process(100, "b", "b", fds=("/dev/null", "/dev/null"))
    proc.process(20, "a", "a", fds=("/dev/null",))
    assert [holder.pid for holder in holders(Path("/dev/null"), proc.root)] == [20, 100]


def test_a_process_that_we_may_not_look_into_is_left_out(proc: Proc) -> None:
    folder = proc.root / "33"
    folder.mkdir()
    (folder / "fd").write_text("not a folder: listing it fails as for another user's process")
    proc.process(34, "mine", "mine", fds=("/dev/null",))
    assert [holder.pid for holder in holders(Path("/dev/null"), proc.root)] == [34]


def test_a_target_that_is_gone_has_no_holders(tmp_path: Path) -> None:
    assert holders(tmp_path / "gone") == []


def test_this_process_holds_what_it_has_open(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("w"):
        assert [holder.pid for holder in holders(path)] == [os.getpid()]
    assert holders(path) == []


@pytest.mark.parametrize(
    ("holder", "shown"),
    [
        (
            Holder(123, "qemu", ("qemu-system-x86_64", "-m", "1G")),
            "pid 123 (qemu-system-x86_64 -m 1G)",
        ),
        (Holder(2, "kthreadd"), "pid 2 (kthreadd)"),
        (Holder(5, "x", ("x" * 100,)), f"pid 5 ({'x' * 59}…)"),
        (Holder(None), "a process of another user"),
    ],
)
def test_a_holder_is_shown_on_one_line(holder: Holder, shown: str) -> None:
    assert str(holder) == shown


def test_a_listener_is_found_with_its_process(proc: Proc, tmp_path: Path) -> None:
    path = tmp_path / "with space.sock"
    proc.sockets((CONNECTED, 10, str(path)), (LISTENING, 11, str(path)))
    proc.process(50, "virtiofsd", "virtiofsd", fds=("socket:[11]",))
    assert unix_listener(path, proc.root) == Holder(50, "virtiofsd", ("virtiofsd",))


def test_a_connected_socket_of_that_path_is_no_listener(proc: Proc, tmp_path: Path) -> None:
    proc.sockets((CONNECTED, 10, str(tmp_path / "s")), (LISTENING, 11, str(tmp_path / "other")))
    assert unix_listener(tmp_path / "s", proc.root) is None


def test_a_listener_of_another_user_is_reported_without_its_pid(proc: Proc, tmp_path: Path) -> None:
    proc.sockets((LISTENING, 11, str(tmp_path / "s")))
    assert unix_listener(tmp_path / "s", proc.root) == Holder(None)


def test_a_listener_may_have_bound_a_relative_path(proc: Proc, tmp_path: Path) -> None:
    proc.sockets((LISTENING, 11, "run/s"), (LISTENING, 12, "run/s"))
    (tmp_path / "elsewhere").mkdir()
    (proc.process(50, "a", "a", fds=("socket:[11]",)) / "cwd").symlink_to(tmp_path / "elsewhere")
    (proc.process(51, "b", "b", fds=("socket:[12]",)) / "cwd").symlink_to(tmp_path)
    assert unix_listener(tmp_path / "run/s", proc.root) == Holder(51, "b", ("b",))


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "live.sock"))
        yield sock


def test_a_real_socket_counts_once_it_listens_and_no_longer_than_that(
    listener: socket.socket,
) -> None:
    path = Path(listener.getsockname())
    assert unix_listener(path) is None
    listener.listen(1)
    found = unix_listener(path)
    assert found is not None and found.pid == os.getpid()
    listener.close()
    assert path.exists()
    assert unix_listener(path) is None


def test_looking_for_a_listener_does_not_connect(listener: socket.socket) -> None:
    listener.listen(1)
    unix_listener(Path(listener.getsockname()))
    listener.setblocking(False)
    with pytest.raises(BlockingIOError):
        listener.accept()


def test_path_that_was_taken_from_a_socket_has_two(tmp_path: Path) -> None:
    path = tmp_path / "s"
    assert listening_at(path) == set()
    with socket.socket(socket.AF_UNIX) as first, socket.socket(socket.AF_UNIX) as second:
        first.bind(str(path))
        assert listening_at(path) == set()
        first.listen()
        assert listening_at(path) == {os.fstat(first.fileno()).st_ino}
        path.unlink()
        second.bind(str(path))
        second.listen()
        assert listening_at(path) == {os.fstat(one.fileno()).st_ino for one in (first, second)}


async def test_path_is_removed_by_whom_it_still_belongs_to(tmp_path: Path) -> None:
    path = tmp_path / "s"
    first = listen(str(path))
    path.unlink()
    second = listen(str(path))
    unlisten(first, str(path))
    assert path.is_socket()
    unlisten(second, str(path))
    assert not path.exists()
