"""Small parts that every measurement uses."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path

TICK = os.sysconf("SC_CLK_TCK")


def processor_seconds(pid: int) -> float:
    """User and system time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def memory_kib(pid: int, field: str) -> int:
    """A line of /proc/PID/status, such as VmRSS or VmHWM, in KiB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise KeyError(field)


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Median, and least and greatest, as text."""
    middle = statistics.median(values)
    return f"{middle:.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def distribution(seconds: Sequence[float], digits: int = 2) -> list[str]:
    """Median, 99th percentile and greatest, in ms; below 100 values the last two are one."""
    ordered = sorted(one * 1e3 for one in seconds)
    p99 = ordered[math.ceil(len(ordered) * 0.99) - 1]
    return [f"{one:.{digits}f}" for one in (statistics.median(ordered), p99, ordered[-1])]


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
