"""Reading traces, as a stream: nothing but one record is in memory at a time."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from vhostbridge.backends.errors import TargetError

from .entry import Damaged, Entry, parse
from .format import LONGEST, MAGIC

# How often a trace that is followed is looked at, in seconds.
POLL = 0.2

#: A record, and the line that it was read from.
Read = tuple[Entry, bytes]


def read(path: str, *, follow: bool = False, note: Callable[[str], None]) -> Iterator[Read]:
    """The records of a file, or of standard input for ``-``; ``follow`` waits for more for ever.

    A last line that is torn, as by a daemon that was killed, is left out; ``note`` is told.

    Raises:
        TargetError: the file can't be read, is no trace, or is damaged; what came is right.
    """
    try:
        if path == "-":
            yield from records(sys.stdin.buffer, "standard input", lambda: False, note)
            return
        while True:
            with Path(path).open("rb") as file:
                yield from records(file, path, _waiting(path, file, follow), note)
            if not follow:
                return
    except OSError as error:
        raise TargetError(f"cannot read the trace {path}: {error.strerror}") from None


# What is asked at a file's end: whether to try again. One that was put aside has a successor.
def _waiting(path: str, file: BinaryIO, follow: bool) -> Callable[[], bool]:
    def more() -> bool:
        if not follow:
            return False
        mine, there = os.fstat(file.fileno()), Path(path)
        if there.exists() and there.stat().st_ino != mine.st_ino:
            # Its last records may have come since.
            return file.tell() < mine.st_size
        time.sleep(POLL)
        return True

    return more


def records(
    file: BinaryIO, name: str, more: Callable[[], bool], note: Callable[[str], None]
) -> Iterator[Read]:
    """The records of an open file; ``more`` is asked at its end whether to look again."""
    first = True
    torn: tuple[int, Damaged] | None = None
    for number, line in enumerate(_lines(file, more), 1):
        if first and not line.startswith(MAGIC[: len(line)] or MAGIC):
            raise TargetError(f"{name} is no trace", "serve --trace FILE writes one")
        first = False
        if torn is not None and not line.startswith(MAGIC):
            raise _damaged(name, *torn)
        if not line.endswith(b"\n") and len(line) <= LONGEST:
            note(f"{name}: the last record is torn, as by a daemon that was killed")
            return
        if torn is not None:
            note(f"{name}: line {torn[0]} is torn, as by a daemon that was killed")
            torn = None
        if line == b"\n":
            continue
        try:
            entry = parse(line)
        except Damaged as damage:
            torn = number, damage
        else:
            yield entry, line
    if torn is not None:
        raise _damaged(name, *torn)
    if first:
        raise TargetError(f"{name} is empty, no trace", "serve --trace FILE writes one")


def _damaged(name: str, number: int, damage: Damaged) -> TargetError:
    return TargetError(f"{name} is damaged in line {number}: {damage}")


# Whole lines; the last one may have no end, and one that is too long is cut.
def _lines(file: BinaryIO, more: Callable[[], bool]) -> Iterator[bytes]:
    line = b""
    while True:
        line += file.readline(LONGEST + 1 - len(line))
        if line.endswith(b"\n") or len(line) > LONGEST:
            yield line
            line = b""
        elif not more():
            if line:
                yield line
            return
