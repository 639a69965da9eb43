"""Writing a trace: the file, its size, and the thread that writes it.

Who traces only puts into a queue. The thread takes what is there, makes lines of it and appends
them in one piece; a process that is killed loses what it did in its last milliseconds, and at most
tears the last line.
"""

from __future__ import annotations

import fcntl
import logging
import os
import queue
import stat
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from vhostbridge.backends.errors import TargetError
from vhostbridge.backends.fds import OwnedFd
from vhostbridge.backends.trace import Item, Tracer

from . import format as trace_format

_log = logging.getLogger("vhostbridge.trace")

#: How large a file becomes before it is put aside, in bytes.
LIMIT = 64 << 20
# How many records may wait; what comes when the disk is that far behind is only counted.
WAITING = 100_000
# How many become one write.
BATCH = 256


class TraceFile:
    """One trace. At its limit it becomes ``FILE.1``, in place of an older one, and begins anew."""

    def __init__(
        self, path: Path, limit: int = LIMIT, on_failure: Callable[[str], None] | None = None
    ) -> None:
        """Open ``path`` to append to it, or make it, for this user only.

        ``on_failure`` is called from another thread when nothing more can be written.

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
            raise TargetError(f"cannot write {path}: {error.strerror}") from None
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
        failed = False
        while (batch := self._take())[0] is not None:
            if failed:
                continue
            try:
                self._append(batch)
            except OSError as error:
                failed = True
                self._on_failure(f"cannot write {self.path}: {error.strerror}")
            if batch[-1] is None:
                return

    # What waits, at least one; after None comes nothing.
    def _take(self) -> list[Item | None]:
        batch = [self._queue.get()]
        with suppress(queue.Empty):
            while batch[-1] is not None and len(batch) < BATCH:
                batch.append(self._queue.get_nowait())
        return batch

    def _append(self, batch: list[Item | None]) -> None:
        data = b"".join(
            line for item in batch if item is not None for line in trace_format.lines(item)
        )
        if self._dropped:
            with self._counting:
                count, self._dropped = self._dropped, 0
            data += b"".join(trace_format.lines(_dropped(count, batch[0])))
        if self._size + len(data) > self._limit:
            self._put_aside()
        self._write(data)

    def _put_aside(self) -> None:
        self.path.rename(self.path.with_name(f"{self.path.name}.1"))
        fd, self._size = open_trace(self.path)
        self._fd.close()
        self._fd = fd
        self._write(trace_format.header(continued=True))

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            count = os.write(self._fd.fileno(), view)
            self._size += count
            view = view[count:]
