"""The control socket, for users that are neither root nor the daemon's."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

from tests.peers.bridge import Bridge
from tests.peers.storage import StorageDaemon

NOBODY = 65534


def as_nobody(work: Callable[[], int]) -> int:
    """What ``work`` returns, 0 to 255, in a child that belongs to nobody and to no group."""
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            os._exit(work())
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def connecting(path: Path) -> int:
    """0: a method was answered. 1: no permission to connect. 2: hung up on."""
    with socket.socket(socket.AF_UNIX) as sock:
        try:
            sock.connect(str(path))
        except PermissionError:
            return 1
        try:
            sock.sendall(b'{"method":"org.varlink.service.GetInfo"}\0')
            return 0 if sock.recv(1) else 2
        except (BrokenPipeError, ConnectionResetError):
            return 2


def test_nobody_reaches_the_control_socket(disk: StorageDaemon, tmp_path: Path) -> None:
    """Its mode keeps others out; where somebody widened it, the daemon itself does."""
    # pytest's folders are its user's only; here the socket's own mode must do.
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_mode & 0o077 == 0:
            folder.chmod(0o755)
    control = tmp_path / "control"
    backend = f"vhost-user:{disk.socket}"
    with Bridge(backend, listen=tmp_path / "vm.sock", control=control) as bridge:
        assert stat.S_IMODE(control.stat().st_mode) == 0o600
        assert stat.S_IMODE(bridge.listen.stat().st_mode) == 0o600
        assert as_nobody(lambda: connecting(control)) == 1
        assert as_nobody(lambda: connecting(bridge.listen)) == 1
        control.chmod(0o666)
        assert as_nobody(lambda: connecting(control)) == 2
        assert "refused: it is neither root nor our user" in bridge.output
        assert connecting(control) == 0
