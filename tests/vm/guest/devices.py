"""vDPA devices and bridges in the virtual machine, each for the length of a `with` block."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

SYSFS = Path("/sys/bus/vdpa/devices")
SECOND_PROCESSOR = Path("/sys/devices/system/cpu/cpu1/online")


def sh(command: str, *, timeout: float = 30.0) -> str:
    """Run a shell command that must succeed, and return its output."""
    done = subprocess.run(
        ["sh", "-c", command], capture_output=True, text=True, timeout=timeout, check=False
    )
    if done.returncode:
        raise AssertionError(f"`{command}` ended with {done.returncode}: {done.stderr}")
    return done.stdout


def wait_until(condition: Callable[[], object], timeout: float = 20.0) -> None:
    """Look again and again until it is so."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not so within {timeout:g} s")
        time.sleep(0.002)


@contextlib.contextmanager
def both_processors() -> Iterator[None]:
    """The machine has its second processor for the block's length: see the harness."""
    before = SECOND_PROCESSOR.read_text()
    SECOND_PROCESSOR.write_text("1")
    try:
        yield
    finally:
        SECOND_PROCESSOR.write_text(before)


def node_of(name: str) -> str:
    """The character device of a vDPA device."""
    (found,) = [p.name for p in (SYSFS / name).iterdir() if p.name.startswith("vhost-vdpa-")]
    return f"/dev/{found}"


@contextlib.contextmanager
def vdpa_device(name: str, mgmtdev: str, *options: str) -> Iterator[str]:
    """A vDPA device; gives its character device. It must be closed when the block ends."""
    sh(f"vdpa dev add name {name} mgmtdev {mgmtdev} {' '.join(options)}")
    try:
        yield node_of(name)
    finally:
        if (SYSFS / name).exists():
            sh(f"vdpa dev del {name}")


def block_device(name: str = "blk0") -> contextlib.AbstractContextManager[str]:
    return vdpa_device(name, "vdpasim_blk")


def net_device(name: str = "net0") -> contextlib.AbstractContextManager[str]:
    return vdpa_device(name, "vdpasim_net", "mac", "52:54:00:11:22:33")


@contextlib.contextmanager
def simulator_options(options: str, *, block: str = "") -> Iterator[None]:
    """The simulators with options of vdpa_sim and vdpa_sim_blk; there must be no device of them."""
    _reload(options, block)
    try:
        yield
    finally:
        _reload("", "")


def _reload(options: str, block: str) -> None:
    sh(
        "modprobe -r vdpa_sim_net vdpa_sim_blk vdpa_sim; "
        f"modprobe vdpa_sim {options} && modprobe vdpa_sim_blk {block} && modprobe vdpa_sim_net"
    )


@dataclass(slots=True)
class BridgeProcess:
    """A `vhost-bridge` that runs in this machine."""

    pid: int
    socket: str
    log: Path
    status: int | None = field(default=None)

    def text(self) -> str:
        """What it has written."""
        return self.log.read_text()

    def wait_for(self, text: str, timeout: float = 20.0) -> None:
        """Wait until it has written `text`."""
        deadline = time.monotonic() + timeout
        while text not in self.text():
            if self.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"no {text!r} (status {self.status}) in:\n{self.text()}")
            time.sleep(0.005)

    def poll(self) -> int | None:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status

    def stop(self, number: int = signal.SIGTERM, timeout: float = 45.0) -> int:
        """Signal it, and return its exit status."""
        if self.poll() is None:
            os.kill(self.pid, number)
        return self.wait(timeout)

    def wait(self, timeout: float = 45.0) -> int:
        """Wait for its end and return its exit status."""
        deadline = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                self.status = -signal.SIGKILL
                raise AssertionError(f"it does not end; its log:\n{self.text()}")
            time.sleep(0.005)
        return status


def spawn(
    arguments: Sequence[str],
    socket: str = "",
    *,
    prefix: Sequence[str] = (),
    before: Callable[[], None] | None = None,
) -> BridgeProcess:
    """Start `vhost-bridge` with arguments, in a fork of this process: imports are slow here.

    `before` is what the fork does first. With a prefix, such as setpriv and its options, the
    command itself is run.
    """
    fd, log = tempfile.mkstemp(prefix="bridge-", suffix=".log")
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _become_bridge(fd, arguments, prefix, before)
    os.close(fd)
    return BridgeProcess(pid, socket, Path(log))


def _become_bridge(
    log: int,
    arguments: Sequence[str],
    prefix: Sequence[str],
    before: Callable[[], None] | None,
) -> None:
    status = 70
    try:
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.closerange(3, 4096)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        if before is not None:
            before()
        if prefix:
            os.execvp(prefix[0], [*prefix, "vhost-bridge", *arguments])
        from vhostbridge import cli

        sys.argv = ["vhost-bridge", *arguments]
        cli.main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


@contextlib.contextmanager
def serving(
    *bridges: tuple[str, str],
    prefix: Sequence[str] = (),
    before: Callable[[], None] | None = None,
    more: Sequence[str] = (),
    patience: float = 120.0,
) -> Iterator[BridgeProcess]:
    """A daemon that serves `(name, back-end)` pairs on /tmp/NAME.sock; must end with status 0.

    One pair goes by options, several by a configuration file. `prefix` and `before` are as
    for spawn(), `more` are further options for one pair. Within `patience` seconds it must be up.
    """
    sockets = [f"/tmp/{name}.sock" for name, _ in bridges]
    if len(bridges) == 1:
        (name, backend), path = bridges[0], sockets[0]
        options = ["--name", name, "--listen", path, "--backend", backend, *more]
        daemon = spawn(["serve", *options], path, prefix=prefix, before=before)
    else:
        tables = [
            f'[[bridge]]\nname = "{name}"\nlisten = "{path}"\nbackend = "{backend}"\n'
            for (name, backend), path in zip(bridges, sockets, strict=True)
        ]
        file = Path(tempfile.mkstemp(suffix=".toml")[1])
        file.write_text("".join(tables))
        arguments = ["serve", "--config", str(file)]
        daemon = spawn(arguments, sockets[0], prefix=prefix, before=before)
    try:
        daemon.wait_for(f"serving {len(bridges)} bridge", patience)
        yield daemon
    except BaseException:
        daemon.stop()
        sys.stderr.write(f"--- log of the daemon\n{daemon.text()}")
        raise
    status = daemon.stop()
    assert status == 0, f"the daemon ended with {status}:\n{daemon.text()}"
    assert "Traceback" not in daemon.text(), daemon.text()
