"""Writing a trace: the file, its size, and the thread that writes it.

Who traces only puts into a queue. The thread takes what is there, makes lines of it and appends
them in one piece; a process that is killed loses what it did in its last milliseconds, and at most
tears the last line.
"""

from __future__ import annotations

import fcntl
import os
import queue
import stat
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from vhostbridge.backends.errors import TargetError
from vhostbridge.backends.fds import OwnedFd
from vhostbridge.backends.trace import Item

from . import format as trace_format

# How many records may wait; what comes when the disk is that far behind is only counted.
WAITING = 100_000
# How long the thread lets records gather, in seconds, so that it does not run against the event
# loop for each one.
GATHER = 0.005
# After so many it lets the event loop have the interpreter, unless more than so many wait.
PIECE, BUSY = 4, 1000
# How many become one write.
BATCH = 256


class TraceFile:
    """One trace. At its limit it becomes ``FILE.1``, in place of an older one, and begins anew."""

    def __init__(
        self, path: Path, limit: int, on_failure: Callable[[str], None] | None = None
    ) -> None:
        """Open ``path`` to append to it, or make it, for this user only.

        ``limit`` is in bytes. ``on_failure`` is called, from another thread, when nothing more can
        be written.

        Raises:
            TargetError: it can't be written, is another process's trace or none at all.
        """
        self.path = path.absolute()
        self._limit = limit
        self._on_failure = on_failure or (lambda reason: None)
        self._queue: queue.SimpleQueue[Item | None] = queue.SimpleQueue()
        self._counting = threading.Lock()
        self._dropped = 0
        self._fd, self._size = open_trace(self.path)
        try:
            self._write(trace_format.header(continued=False))
        except OSError as error:
            self._fd.close()
            raise TargetError(f"cannot write the trace {path}: {error.strerror}") from None
        self._thread = threading.Thread(target=self._run, name="trace", daemon=True)
        self._thread.start()

    def put(self, item: Item) -> None:
        """Take a record. Never blocks; any thread may call it."""
        if self._queue.qsize() < WAITING:
            self._queue.put(item)
        else:
            with self._counting:
                self._dropped += 1

    def close(self) -> None:
        """Write what waits, and close the file."""
        self._queue.put(None)
        self._thread.join()
        self._fd.close()

    def _run(self) -> None:
        failed = ended = False
        while not ended:
            batch = self._take()
            ended = batch[-1] is None
            if failed:
                continue
            try:
                self._append([item for item in batch if item is not None])
            except OSError as error:
                failed = True
                self._on_failure(f"cannot write the trace {self.path}: {error.strerror}")
            except TargetError as error:
                failed = True
                self._on_failure(str(error))

    # What waits, at least one; after None comes nothing.
    def _take(self) -> list[Item | None]:
        batch = [self._queue.get()]
        if batch[0] is not None:
            time.sleep(GATHER)
        with suppress(queue.Empty):
            while batch[-1] is not None and len(batch) < BATCH:
                batch.append(self._queue.get_nowait())
        return batch

    def _append(self, batch: list[Item]) -> None:
        lines: list[bytes] = []
        for number, item in enumerate(batch, 1):
            lines += trace_format.lines(item)
            if number % PIECE == 0 and self._queue.qsize() < BUSY:
                time.sleep(0.0002)
        if self._dropped:
            with self._counting:
                count, self._dropped = self._dropped, 0
            lost = {"count": count, "reason": "the disk is too slow"}
            lines.append(trace_format.event("records lost", **lost))
        data = bytearray()
        for line in lines:
            if self._size + len(data) + len(line) > self._limit:
                self._write(data)
                self._put_aside()
                data.clear()
            data += line
        self._write(data)

    def _put_aside(self) -> None:
        self.path.rename(self.path.with_name(f"{self.path.name}.1"))
        fd, self._size = open_trace(self.path)
        self._fd.close()
        self._fd = fd
        self._write(trace_format.header(continued=True))

    def _write(self, data: bytes | bytearray) -> None:
        done = 0
        while done < len(data):
            done += os.write(self._fd.fileno(), data[done:])
        self._size += done


def open_trace(path: Path) -> tuple[OwnedFd, int]:
    """Open a trace to append to it, or make one; its size in bytes too.

    It is locked for this process, and for this user only. Links are not followed.

    Raises:
        TargetError: it can't be written, is another process's trace or none at all.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        fd = OwnedFd(os.open(path, flags, 0o600))
    except OSError as error:
        raise TargetError(f"cannot write the trace {path}: {error.strerror}") from None
    try:
        return fd, _prepare(fd, path)
    except OSError as error:
        fd.close()
        raise TargetError(f"cannot write the trace {path}: {error.strerror}") from None
    except TargetError:
        fd.close()
        raise


def _prepare(fd: OwnedFd, path: Path) -> int:
    number = fd.fileno()
    facts = os.fstat(number)
    if not stat.S_ISREG(facts.st_mode):
        raise TargetError(f"{path} is no regular file", "a trace is written to a file")
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise TargetError(
            f"another vhost-bridge writes the trace {path}", "name another file"
        ) from None
    if facts.st_size and not os.pread(number, 64, 0).startswith(trace_format.MAGIC):
        raise TargetError(f"{path} is there and is no trace", "name another file, or remove it")
    os.fchmod(number, 0o600)
    if facts.st_size and os.pread(number, 1, facts.st_size - 1) != b"\n":
        # Its last line was torn when a daemon was killed.
        return facts.st_size + os.write(number, b"\n")
    return facts.st_size
