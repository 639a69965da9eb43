"""Who has a device, file or listening socket open, from /proc.

Works without privilege, for the processes that this user may look into.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROC_ROOT = Path("/proc")

_SO_ACCEPTCON = 0x10000  # the flag of a listening socket in /proc/net/unix


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that has something open; ``pid`` is None when we may not know which."""

    pid: int | None
    comm: str = ""
    cmdline: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.pid is None:
            return "a process of another user"
        # The first words tell the program and mostly the guest; all of them can be kilobytes.
        shown = " ".join(self.cmdline) or self.comm or "ended meanwhile"
        return f"pid {self.pid} ({shown if len(shown) <= 60 else shown[:59] + '…'})"


def holders(target: Path, proc_root: Path = PROC_ROOT) -> list[Holder]:
    """List the processes that have ``target`` open, lowest pid first.

    A device node matches by its device number, through any path and in any mount namespace; any
    other file by itself. Processes that we may not look into are left out.
    """
    try:
        wanted = target.stat()
    except OSError:
        return []
    return [
        _holder(proc_root / str(pid))
        for pid in _pids(proc_root)
        if any(_same_file(fd, wanted, target.name) for fd in _descriptors(proc_root, pid))
    ]


def unix_listener(path: Path, proc_root: Path = PROC_ROOT) -> Holder | None:
    """Return who listens on a UNIX socket, or None when nobody in this network namespace does.

    Doesn't connect: to a server with one client at a time that would be an intrusion. ``pid`` is
    None when the listener is there but not ours to look into.
    """
    wanted = os.path.realpath(path)
    for inode, bound in _listeners(proc_root):
        if os.path.basename(bound) != os.path.basename(path):
            continue
        pid = _socket_owner(inode, proc_root)
        if not os.path.isabs(bound):
            # A name bound relatively is relative to where the listener stood.
            if pid is None:
                continue
            bound = os.path.join(_link(proc_root / str(pid) / "cwd"), bound)
        if os.path.realpath(bound) == wanted:
            return Holder(None) if pid is None else _holder(proc_root / str(pid))
    return None


def listening_at(path: Path) -> set[int]:
    """The inodes of the sockets that listen at ``path``, without looking for who has them.

    That makes it quick. More than one: the path was taken from a socket that lives on.
    """
    wanted = os.path.realpath(path)
    return {
        inode
        for inode, bound in _listeners(PROC_ROOT)
        if os.path.basename(bound) == path.name and os.path.realpath(bound) == wanted
    }


def _pids(proc_root: Path) -> list[int]:
    try:
        return sorted(int(name) for name in os.listdir(proc_root) if name.isdecimal())
    except OSError:
        return []


def _descriptors(proc_root: Path, pid: int) -> list[Path]:
    folder = proc_root / str(pid) / "fd"
    try:
        return [folder / fd for fd in os.listdir(folder)]
    except OSError:
        return []


def _link(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _same_file(fd: Path, wanted: os.stat_result, name: str) -> bool:
    # stat() of a file on a dead network file system hangs: look at the name before.
    link = _link(fd)
    if not (link.startswith("/dev/") or os.path.basename(link).startswith(name)):
        return False
    try:
        found = fd.stat()
    except OSError:
        return False
    if stat.S_ISCHR(wanted.st_mode) or stat.S_ISBLK(wanted.st_mode):
        same_kind = stat.S_IFMT(found.st_mode) == stat.S_IFMT(wanted.st_mode)
        return same_kind and found.st_rdev == wanted.st_rdev
    return os.path.samestat(found, wanted)


def _holder(folder: Path) -> Holder:
    try:
        comm = (folder / "comm").read_text(errors="replace").strip()
        words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:  # it ended meanwhile
        return Holder(int(folder.name))
    return Holder(int(folder.name), comm, tuple(word for word in words if word))


def _listeners(proc_root: Path) -> Iterator[tuple[int, str]]:
    # Num RefCount Protocol Flags Type St Inode Path; the path may hold spaces, or be absent.
    try:
        table = (proc_root / "net/unix").read_text(errors="surrogateescape")
    except OSError:
        return
    for line in table.splitlines()[1:]:
        columns = line.split(None, 7)
        if len(columns) == 8 and int(columns[3], 16) & _SO_ACCEPTCON:
            yield int(columns[6]), columns[7]


def _socket_owner(inode: int, proc_root: Path) -> int | None:
    link = f"socket:[{inode}]"
    for pid in _pids(proc_root):
        if any(_link(fd) == link for fd in _descriptors(proc_root, pid)):
            return pid
    return None
