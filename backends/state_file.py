"""Files that hold states: one that appears whole or not at all, and one without a name."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import StateError
from .fds import OwnedFd

# What does not tell how a file system without O_TMPFILE refuses it.
_NO_TMPFILE = (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL)
_SPOOL_FOLDER = "/var/tmp"  # not /tmp, which is often memory
_IN_MEMORY = 4 << 20
_BLOCK = 1 << 20


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[OwnedFd]:
    """Write a file that appears at ``path``, whole and on its disk, when the block ends.

    If the block raises, or the process or machine dies, what was there before stays as it was. The
    file belongs to its owner alone (0600). Waits for the disk: call it in a thread.

    Raises:
        StateError: there can't be such a file; ``path`` is something else than a file.
    """
    try:
        target = _target(Path(path))
        folder = OwnedFd(os.open(target.parent, os.O_DIRECTORY | os.O_PATH | os.O_CLOEXEC))
    except OSError as error:
        raise _refused(path, error) from None
    with folder:
        temporary = f".{target.name[:200]}.{secrets.token_hex(8)}.part"
        try:
            try:
                file, named = _create(folder, temporary)
            except OSError as error:
                raise _refused(path, error) from None
            with file:
                os.fchmod(file.fileno(), 0o600)  # whatever the umask is
                with file.dup() as given:
                    yield given
                try:
                    os.fsync(file.fileno())
                    if not named:
                        _name(file, folder, temporary)
                    os.rename(
                        temporary,
                        target.name,
                        src_dir_fd=folder.fileno(),
                        dst_dir_fd=folder.fileno(),
                    )
                    _sync_folder(target.parent)
                except OSError as error:
                    raise _refused(path, error) from None
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary, dir_fd=folder.fileno())
            raise


# A link's target: replacing the link itself would surprise. Only a file is replaced.
def _target(path: Path) -> Path:
    target = path.resolve()
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return target
    if not stat.S_ISREG(mode):
        raise OSError(errno.EEXIST, "it is there and is no regular file")
    return target


def _create(folder: OwnedFd, temporary: str) -> tuple[OwnedFd, bool]:
    where = f"/proc/self/fd/{folder.fileno()}"
    try:
        return OwnedFd(os.open(where, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)), False
    except OSError as error:
        if error.errno not in _NO_TMPFILE:
            raise
    flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC
    return OwnedFd(os.open(temporary, flags, 0o600, dir_fd=folder.fileno())), True


# linkat never replaces: the file gets a name of its own first, and is renamed then.
def _name(file: OwnedFd, folder: OwnedFd, temporary: str) -> None:
    os.link(
        f"/proc/self/fd/{file.fileno()}",
        temporary,
        dst_dir_fd=folder.fileno(),
        follow_symlinks=True,
    )


def _sync_folder(folder: Path) -> None:
    with OwnedFd(os.open(folder, os.O_DIRECTORY | os.O_RDONLY | os.O_CLOEXEC)) as fd:
        sync(fd.fileno())


def sync(number: int) -> None:
    """Wait until a file's bytes are on its disk; nothing for what has no disk.

    Raises:
        OSError: they could not be written.
    """
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EROFS, errno.ENOTSUP):
            raise


def _refused(path: str | os.PathLike[str], error: OSError) -> StateError:
    return StateError(f"cannot write {os.fspath(path)}: {error.strerror}")


class Spool:
    """Bytes that came through a pipe, to be read again: in memory while few, then in a file."""

    def __init__(self) -> None:
        self.fd = OwnedFd(os.memfd_create("state", os.MFD_CLOEXEC))
        self._size = 0
        self._on_disk = False

    def write(self, data: bytes) -> None:
        """Add ``data``. Waits for the disk.

        Raises:
            StateError: the disk is full, or broken.
        """
        try:
            if not self._on_disk and self._size + len(data) > _IN_MEMORY:
                self._move_to_disk()
            write_all(self.fd.fileno(), data)
        except OSError as error:
            raise StateError(
                f"cannot keep a copy of the state in {_SPOOL_FOLDER}: {error.strerror}",
                "make room there, or load from a file",
            ) from None
        self._size += len(data)

    def _move_to_disk(self) -> None:
        flags = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
        old, self.fd = self.fd, OwnedFd(os.open(_SPOOL_FOLDER, flags, 0o600))
        self._on_disk = True
        with old:
            os.lseek(old.fileno(), 0, os.SEEK_SET)
            while data := os.read(old.fileno(), _BLOCK):
                write_all(self.fd.fileno(), data)


class Copy:
    """Bytes on their way to somebody else, kept as well if there is room."""

    def __init__(self) -> None:
        self._spool: Spool | None = Spool()

    def add(self, data: bytes) -> None:
        """Add ``data``. Waits for the disk."""
        if self._spool is not None:
            try:
                self._spool.write(data)
            except StateError:
                self.close()

    def take(self) -> OwnedFd | None:
        """All of it, which is the caller's now; ``None`` if there was no room."""
        spool, self._spool = self._spool, None
        return None if spool is None else spool.fd

    def close(self) -> None:
        if (fd := self.take()) is not None:
            fd.close()


def write_all(number: int, data: bytes) -> int:
    """Write all of ``data`` to a descriptor that may wait; return how much that was."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(number, rest) :]
    return len(data)
