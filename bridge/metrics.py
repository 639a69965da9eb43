"""What is known of bridges as metrics: Prometheus' text format, version 0.0.4."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import trio

from vhostbridge import __version__
from vhostbridge.backends.lifecycle import State

from .following import Followed
from .status import BridgeStatus

#: The text is made anew at most this often, in seconds.
FRESH = 0.5

_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


@dataclass(slots=True)
class Family:
    """A metric with its samples: values by labels."""

    name: str
    kind: str
    told: str
    samples: list[tuple[Mapping[str, str], float]] = field(default_factory=list)

    def add(self, value: float, **labels: str | int) -> None:
        self.samples.append(({key: str(label) for key, label in labels.items()}, value))

    def text(self) -> str:
        """Its lines; nothing without samples."""
        if not self.samples:
            return ""
        head = f"# HELP {self.name} {self.told}\n# TYPE {self.name} {self.kind}\n"
        return head + "".join(f"{self.name}{_labels(at)} {_number(v)}\n" for at, v in self.samples)


def _labels(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{key}="{v.translate(_ESCAPES)}"' for key, v in labels.items()) + "}"


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(float(value))


# One row a metric that has one value for each bridge.
_OF_BRIDGES: tuple[tuple[str, str, str, Callable[[BridgeStatus], float]], ...] = (
    ("held", "gauge", "Whether an operator has suspended the device", lambda s: s.held),
    ("state_since_seconds", "gauge", "When the device came to its state, in seconds since 1970",
     lambda s: s.since),
    ("frontend_connected", "gauge", "Whether a front-end is connected",
     lambda s: s.front_end is not None),
    ("frontend_connections_total", "counter", "Front-ends that have connected",
     lambda s: s.front_ends),
    ("frontend_errors_total", "counter", "Front-ends that were cut off", lambda s: s.errors),
    ("backend_failures_total", "counter", "How often the back-end has failed",
     lambda s: s.failures),
    ("shadowed", "gauge", "Whether requests pass through shadow vrings", lambda s: bool(s.shadow)),
    ("dirty_log", "gauge", "Whether writes are logged for a migration",
     lambda s: bool(s.dirty_log)),
    ("pause_current_seconds", "gauge", "How long the device has paused by now; 0 if it does not",
     lambda s: 0 if s.paused is None else s.paused.seconds),
)  # fmt: skip

# And for each vring: its name, and the attribute of a vring's status.
_OF_VRINGS = (
    ("requests_total", "counter", "Requests that passed through the shadow vring", "requests"),
    ("bytes_total", "counter", "Bytes of these requests' buffers", "bytes"),
    ("kicks_total", "counter", "Notifications from the guest on the shadow vring", "kicks"),
    ("calls_total", "counter", "Interrupts to the guest from the shadow vring", "calls"),
    ("in_flight", "gauge", "Requests that were made and not answered", "in_flight"),
    ("used_index", "gauge", "The used index in guest memory, which goes on modulo 65536", "used"),
)


def _per_bridge(statuses: Sequence[BridgeStatus]) -> Iterator[Family]:
    state = Family("vhost_bridge_state", "gauge", "1 for the state that the device is in")
    for status in statuses:
        for one in State:
            state.add(one.value == status.state, bridge=status.name, state=one.value)
    yield state
    for name, kind, told, value in _OF_BRIDGES:
        family = Family(f"vhost_bridge_{name}", kind, told)
        for status in statuses:
            family.add(value(status), bridge=status.name)
        yield family


def _pauses(statuses: Sequence[BridgeStatus]) -> Iterator[Family]:
    count = Family("vhost_bridge_pauses_total", "counter", "Pauses of the device, by reason")
    length = Family(
        "vhost_bridge_pause_seconds_total", "counter", "How long they took, by reason and phase"
    )
    longest = Family("vhost_bridge_pause_longest_seconds", "gauge", "The longest one, by reason")
    for status in statuses:
        for reason, tally in status.pauses.items():
            labels = {"bridge": status.name, "reason": str(reason)}
            count.add(tally.count, **labels)
            for phase, took in tally.phases.items():
                length.add(took, **labels, phase=phase)
            if tally.longest is not None:
                longest.add(tally.longest.seconds, **labels)
    yield from (count, length, longest)


# What is counted in shadow vrings only is left out for vrings that have never been such.
def _per_vring(statuses: Sequence[BridgeStatus]) -> Iterator[Family]:
    for name, kind, told, attribute in _OF_VRINGS:
        family = Family(f"vhost_bridge_vring_{name}", kind, told)
        for status in statuses:
            for vring in status.vrings:
                value = getattr(vring, attribute)
                known = vring.requests or vring.kicks if kind == "counter" else value is not None
                if known:
                    family.add(value, bridge=status.name, vring=vring.index)
        yield family


def _of_daemon(count: int) -> Iterator[Family]:
    build = Family("vhost_bridge_build_info", "gauge", "1, with the version")
    build.add(1, version=__version__)
    bridges = Family("vhost_bridge_bridges", "gauge", "Bridges of this daemon")
    bridges.add(count)
    yield from (build, bridges, *_of_process())


# The names that client libraries use for any process.
def _of_process() -> Iterator[Family]:
    with suppress(OSError):
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        ticks, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
        boot = next(
            int(line.split()[1])
            for line in Path("/proc/stat").read_text().splitlines()
            if line.startswith("btime ")
        )
        open_fds = len(os.listdir("/proc/self/fd")) - 1  # the listing's own
        for name, kind, told, value in (
            ("cpu_seconds_total", "counter", "User and system time",
             (int(fields[11]) + int(fields[12])) / ticks),
            ("resident_memory_bytes", "gauge", "Resident memory", int(fields[21]) * page),
            ("virtual_memory_bytes", "gauge", "Virtual memory", int(fields[20])),
            ("start_time_seconds", "gauge", "When it started, in seconds since 1970",
             boot + int(fields[19]) / ticks),
            ("open_fds", "gauge", "Open descriptors", open_fds),
            ("max_fds", "gauge", "The most there may be",
             resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
        ):  # fmt: skip
            family = Family(f"process_{name}", kind, told)
            family.add(value)
            yield family


def families(statuses: Sequence[BridgeStatus]) -> Iterator[Family]:
    """All metrics, each with the samples of all bridges."""
    yield from _per_bridge(statuses)
    yield from _pauses(statuses)
    yield from _per_vring(statuses)
    yield from _of_daemon(len(statuses))


class Metrics:
    """The metrics of one daemon's bridges, made when somebody asks."""

    def __init__(self, bridges: Mapping[str, Followed]) -> None:
        self._bridges = bridges
        self._lock = trio.Lock()
        self._made = float("-inf")
        self._text = ""

    async def text(self) -> str:
        """All metrics in Prometheus' text format, no older than ``FRESH``.

        It gives way to front-ends between bridges and between metrics.
        """
        async with self._lock:
            if trio.current_time() - self._made > FRESH:
                self._text = await self._make()
                self._made = trio.current_time()
            return self._text

    async def _make(self) -> str:
        statuses = []
        for name in sorted(self._bridges):
            await trio.lowlevel.checkpoint()
            if name in self._bridges:
                statuses.append(self._bridges[name].status())
        parts = []
        for family in families(statuses):
            await trio.lowlevel.checkpoint()
            parts.append(family.text())
        return "".join(parts)


def merged(texts: Sequence[str]) -> str:
    """The metrics of daemons in one text, which node_exporter may read.

    What is a process' own is left out: node_exporter has these of itself. So is
    what can't be told apart of several daemons.
    """
    left_out = ["# HELP process_", *["# HELP vhost_bridge_bridges "] * (len(texts) > 1)]
    found: dict[str, list[str]] = {}
    for text in texts:
        head = ""
        for line in text.splitlines():
            name = line.split()[2] if line.startswith("#") else ""
            if name and line.startswith("# HELP"):
                head = line
                found.setdefault(head, [])
            elif line.startswith("# TYPE"):
                found[head][:1] = [line]
            else:
                found[head].append(line)
    lines = [
        line
        for head, samples in found.items()
        if not head.startswith(tuple(left_out))
        for line in dict.fromkeys([head, *samples])
    ]
    return "".join(f"{line}\n" for line in lines)
