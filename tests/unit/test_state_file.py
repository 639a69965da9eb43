"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vhostbridge.backends.errors import StateError
from vhostbridge.backends.state_file import atomic_file


@pytest.fixture(params=["nameless files", "no nameless files"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, on a file system with O_TMPFILE and on one without."""
    opened = os.open

    def refusing(path: str, flags: int, *more: int, **named: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return opened(path, flags, *more, **named)

    if request.param == "no nameless files":
        monkeypatch.setattr(os, "open", refusing)
    return tmp_path


@pytest.fixture(params=[0o000, 0o777])
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


def put(path: Path, data: bytes) -> None:
    with atomic_file(path) as file:
        os.write(file.fileno(), data)


def interrupted(path: Path) -> None:
    with atomic_file(path) as file:
        os.write(file.fileno(), b"new")
        raise KeyError


def test_file_appears_when_the_block_ends(folder: Path) -> None:
    path = folder / "state"
    with atomic_file(path) as file:
        os.write(file.fileno(), b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert list(folder.iterdir()) == [path]


def test_file_takes_the_place_of_an_older_one(folder: Path) -> None:
    path = folder / "state"
    path.write_bytes(b"old")
    with atomic_file(path) as file:
        os.write(file.fileno(), b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(folder.iterdir()) == [path]


@pytest.mark.usefixtures("umask")
def test_file_is_its_owners_alone_whatever_the_umask(folder: Path) -> None:
    put(folder / "state", b"new")
    assert stat.S_IMODE((folder / "state").stat().st_mode) == 0o600


@pytest.mark.parametrize("before", [None, b"old"])
def test_block_that_raises_leaves_what_was_there(folder: Path, before: bytes | None) -> None:
    path = folder / "state"
    if before is not None:
        path.write_bytes(before)
    with pytest.raises(KeyError):
        interrupted(path)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == (
        {} if before is None else {"state": before}
    )


def test_descriptor_may_be_closed_within_the_block(folder: Path) -> None:
    with atomic_file(folder / "state") as file, file:
        os.write(file.fileno(), b"new")
    assert (folder / "state").read_bytes() == b"new"


def test_file_that_can_not_get_its_name_leaves_nothing(folder: Path) -> None:
    with pytest.raises(StateError, match="cannot write"), atomic_file(folder / "state"):
        (folder / "state").mkdir()
    assert [p.name for p in folder.iterdir()] == ["state"]


def test_link_stays_and_its_target_is_replaced(folder: Path) -> None:
    (folder / "target").write_bytes(b"old")
    (folder / "link").symlink_to("target")
    put(folder / "link", b"new")
    assert (folder / "link").is_symlink()
    assert (folder / "target").read_bytes() == b"new"


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(fifo := tmp_path / "fifo")
    (folder := tmp_path / "folder").mkdir()
    for path in (fifo, folder, Path(os.devnull), Path("/dev/stdout")):
        kind = stat.S_IFMT(path.stat().st_mode)
        if kind == stat.S_IFREG:
            continue  # pytest's own standard output
        with pytest.raises(StateError, match="it is there and is no regular file"):
            put(path, b"new")
        assert stat.S_IFMT(path.stat().st_mode) == kind


def test_folder_that_is_missing_is_told(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="No such file or directory"):
        put(tmp_path / "nowhere" / "state", b"new")


KILLED = """
import os, sys
from vhostbridge.backends.state_file import atomic_file
with atomic_file(sys.argv[1]) as file:
    os.write(file.fileno(), b"new")
    os.write(1, b"ready")
    sys.stdin.read()
"""


def test_writer_that_is_killed_leaves_what_was_there(tmp_path: Path) -> None:
    (path := tmp_path / "state").write_bytes(b"old")
    argv = [sys.executable, "-c", KILLED, str(path)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None and writer.stdout.read(5) == b"ready"
        writer.kill()
        assert writer.wait(10) == -signal.SIGKILL
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"state": b"old"}
