"""systemd as process 1 of a namespace in the virtual machine: a boot without a boot."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .devices import sh, wait_until

FOLDER = Path("/run/systemd")
# Of all that belongs to a start of the machine, what a service needs.
WANTED = (
    *("systemd-journald.service", "systemd-journald.socket", "systemd-journald-dev-log.socket"),
    *("systemd-udevd.service", "systemd-udevd-control.socket", "systemd-udevd-kernel.socket"),
)
TARGET = """\
[Unit]
Requires=sysinit.target
After=sysinit.target
AllowIsolate=yes
"""
START = (
    *("unshare", "--pid", "--mount", "--fork", "--mount-proc", "--kill-child"),
    *("env", "-i", "PATH=/usr/sbin:/usr/bin", "container=rig", "/lib/systemd/systemd"),
    *(
        "--unit=rig.target",
        "--log-target=journal-or-kmsg",
        "--show-status=no",
        "--log-level=notice",
    ),
)


@dataclass(frozen=True, slots=True)
class System:
    """A running systemd; commands run beside its services."""

    pid: int
    log: Path

    def run(self, *argv: str, check: bool = True, timeout: float = 60) -> str:
        """Run a command as root among the services; return what it wrote."""
        command = ["nsenter", f"--target={self.pid}", "--mount", "--pid", "--", *argv]
        environment = {name: os.environ[name] for name in ("PATH", "LC_ALL") if name in os.environ}
        environment["PATH"] = environment["PATH"].replace("/run/product/bin:", "")
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
            env=environment,
        )
        if check and done.returncode:
            raise AssertionError(f"{' '.join(argv)} ended with {done.returncode}: {done.stdout}")
        return done.stdout

    def systemctl(self, *arguments: str, check: bool = True) -> str:
        return self.run("systemctl", "--no-pager", *arguments, check=check).strip()

    def show(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.systemctl("show", "--value", f"--property={name}", unit)

    def entries(self, *matches: str) -> list[dict[str, str]]:
        """Entries of the journal, oldest first."""
        self.run("journalctl", "--sync")
        # Without an entry it ends with another status than 0.
        told = self.run(
            "journalctl", "--no-pager", "--output=json", "--quiet", *matches, check=False
        )
        return [json.loads(line) for line in told.splitlines()]


# Units that a start wants and generators, which a reload runs too, are what takes time.
def _mask(name: str) -> None:
    mask = FOLDER / name
    mask.parent.mkdir(parents=True, exist_ok=True)
    if not mask.is_symlink():
        mask.symlink_to("/dev/null")


@contextlib.contextmanager
def systemd() -> Iterator[System]:
    """A systemd that has nothing to do, for a block's length."""
    if not os.path.ismount("/sys/fs/cgroup"):
        sh("mount -t cgroup2 cgroup2 /sys/fs/cgroup")
    vendor = Path("/lib/systemd")
    for unit in vendor.glob("system/*.target.wants/*"):
        if unit.name not in WANTED:
            _mask(f"system/{unit.name}")
    for generator in vendor.glob("system-generators/*"):
        _mask(f"system-generators/{generator.name}")
    (FOLDER / "system/rig.target").write_text(TARGET)
    log = Path("/tmp/systemd.log")
    with log.open("w") as out:
        outer = subprocess.Popen(START, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    try:
        children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
        wait_until(lambda: children.read_text().strip())
        wait_until((FOLDER / "private").is_socket, timeout=60)
        system = System(int(children.read_text()), log)
        system.systemctl("start", "rig.target")
        yield system
    except BaseException as error:
        error.add_note(f"--- systemd\n{log.read_text()[-4000:]}")
        raise
    finally:
        outer.kill()
        outer.wait()
