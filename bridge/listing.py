"""What of vDPA and of bridges exists on this host, as plain values for tables and JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from vhostbridge.backends.errors import ConfigError
from vhostbridge.backends.holders import PROC_ROOT, Holder, holders
from vhostbridge.backends.vdpa.discovery import DEV_ROOT, SYSFS_ROOT
from vhostbridge.backends.vdpa.inventory import (
    Report,
    device_report,
    management_report,
    take_inventory,
)

_OPTIONS = ("name", "backend", "listen", "connect", "fd", "config")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningBridge:
    """A bridge as the command line of its process has it.

    ``config`` is the file that names it, read now: the process may have read an older one.
    """

    pid: int
    name: str | None = None
    backend: str | None = None
    listen: str | None = None
    connect: str | None = None
    fd: str | None = None
    config: str | None = None

    def report(self) -> Report:
        """What is known of it, for JSON."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def serve_options(cmdline: Sequence[str]) -> Mapping[str, str] | None:
    """The options of ``vhost-bridge serve`` in a command line, None when it is another's."""
    command = _after_program(cmdline)
    if command is None or "serve" not in command:
        return None
    options: dict[str, str] = {}
    words = iter(command[command.index("serve") + 1 :])
    for word in words:
        key, equals, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and key in _OPTIONS:
            options[key] = value if equals else next(words, "")
    return options


# The program itself, or Python and its options before the script or ``-m vhostbridge``. What
# starts programs (sudo, timeout) has another name and is not taken for a bridge.
def _after_program(cmdline: Sequence[str]) -> Sequence[str] | None:
    programs = [word.rpartition("/")[2] for word in cmdline]
    if not programs or not (programs[0] == "vhost-bridge" or programs[0].startswith("python")):
        return None
    for at, program in enumerate(programs):
        if program == "vhost-bridge" or programs[at - 1 : at + 1] == ["-m", "vhostbridge"]:
            return cmdline[at + 1 :]
    return None


def bridges_of(pid: int, cmdline: Sequence[str], folder: Path) -> list[RunningBridge]:
    """The bridges that a process serves; ``folder`` is where it stands."""
    options = serve_options(cmdline)
    if options is None:
        return []
    file = options.get("config")
    if file is None:
        return [RunningBridge(pid=pid, **options)]
    path = folder / file
    # Not a terminal or pipe: reading it would take what is not ours, or wait for ever.
    if not path.is_file():
        return [RunningBridge(pid=pid, config=file)]
    # Few hosts have one, and all would wait for what reads it.
    from .config import load_config

    with suppress(ConfigError):
        return [
            RunningBridge(
                pid=pid,
                name=bridge.name,
                backend=bridge.backend,
                listen=bridge.listen,
                connect=bridge.connect,
                fd=None if bridge.fd is None else str(bridge.fd),
                config=file,
            )
            for bridge in load_config(path).bridges
        ]
    return [RunningBridge(pid=pid, config=file)]


def running_bridges(proc_root: Path = PROC_ROOT) -> list[RunningBridge]:
    """The bridges of all processes that we may look into, lowest pid first."""
    return [
        bridge
        for pid, cmdline in _processes(proc_root)
        for bridge in bridges_of(pid, cmdline, proc_root / str(pid) / "cwd")
    ]


def _processes(proc_root: Path) -> Iterator[tuple[int, list[str]]]:
    for pid in sorted(int(entry.name) for entry in proc_root.iterdir() if entry.name.isdecimal()):
        with suppress(OSError):  # it ended meanwhile
            words = (proc_root / str(pid) / "cmdline").read_bytes().split(b"\0")
            yield pid, [word.decode(errors="replace") for word in words[:-1]]


def holder_report(
    holder: Holder, bridges: Sequence[RunningBridge], backends: Sequence[str]
) -> Report:
    """Who has something open, for JSON; ``bridge`` is its name where a bridge of ours has it.

    ``backends`` are the URIs of what is held: they tell the bridges of one process apart.
    """
    report: Report = {"pid": holder.pid, "comm": holder.comm, "command": list(holder.cmdline)}
    own = [bridge for bridge in bridges if bridge.pid == holder.pid]
    matching = [bridge for bridge in own if bridge.backend in backends] or own
    if len(matching) == 1 and matching[0].name is not None:
        report["bridge"] = matching[0].name
    return report


def node_holders(name: str, node: Path, bridges: Sequence[RunningBridge]) -> list[Report]:
    """Who has the character device of a vDPA device open."""
    backends = (f"vdpa:{name}", f"vdpa:{node}")
    return [holder_report(holder, bridges, backends) for holder in holders(node)]


def list_report(
    sysfs_root: Path = SYSFS_ROOT, dev_root: Path = DEV_ROOT, proc_root: Path = PROC_ROOT
) -> Report:
    """Management devices, vDPA devices with their holders, and bridges.

    ``note`` and ``note_hint`` are there when the kernel could not be asked for all of it.
    """
    inventory = take_inventory(sysfs_root)
    bridges = running_bridges(proc_root)
    devices: dict[str, Report] = {}
    for entry in inventory.devices:
        devices[entry.name] = device_report(entry, dev_root)
        if entry.bus is not None and entry.bus.char_device is not None:
            node = dev_root / entry.bus.char_device
            devices[entry.name]["held_by"] = node_holders(entry.name, node, bridges)
    report: Report = {
        "mgmtdev": {one.handle: management_report(one) for one in inventory.management},
        "dev": devices,
        "bridges": [bridge.report() for bridge in bridges],
    }
    if inventory.problem is not None:
        report |= {"note": inventory.problem.message, "note_hint": inventory.problem.hint}
    return report
