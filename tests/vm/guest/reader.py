"""Follows a guide in the virtual machine: a host with vDPA devices."""

from __future__ import annotations

import importlib
import os
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.docs.follow import Follower

from .devices import BridgeProcess, sh, spawn, wait_until

# What commands import when they are used: forks of this process have it then.
for name in (
    *("backends.vdpa.netlink", "bridge.listing", "bridge.inspect", "bridge.render"),
    *("bridge.control_client", "bridge.saved", "bridge.status_text", "bridge.monitoring"),
):
    importlib.import_module(f"vhostbridge.{name}")

PAGES = Path(__file__).parents[2] / "pages"
WORK = Path("/srv")
PLAIN = set("|&;<>$`*\\")  # a command with none of these needs no shell


class OurJob:
    """A `vhost-bridge` that goes on: a fork of this process, because imports are slow here."""

    def __init__(self, process: BridgeProcess) -> None:
        self._process = process

    def text(self) -> str:
        return self._process.text()

    def ended(self) -> int | None:
        return self._process.poll()

    def stop(self) -> None:
        if self.ended() is None:
            os.kill(self._process.pid, signal.SIGTERM)

    def wait(self) -> int:
        return self._process.wait()


class OtherJob:
    """Any other command that goes on."""

    def __init__(self, text: str) -> None:
        fd, log = tempfile.mkstemp(prefix="job-", suffix=".log")
        self._log = Path(log)
        self._process = subprocess.Popen(
            ["sh", "-c", f"exec {text}"], stdin=subprocess.DEVNULL, stdout=fd, stderr=fd, cwd=WORK
        )
        os.close(fd)

    def text(self) -> str:
        return self._log.read_text()

    def ended(self) -> int | None:
        return self._process.poll()

    def stop(self) -> None:
        self._process.terminate()

    def wait(self) -> int:
        return self._process.wait(40)


class Reader(Follower[OurJob | OtherJob]):
    """A person at this machine, for the length of a `with` block."""

    def __init__(self) -> None:
        super().__init__(PAGES)

    def __enter__(self) -> Self:
        WORK.mkdir(exist_ok=True)
        os.chdir(WORK)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for job in self.jobs:
            if error is not None:
                error.add_note(f"--- a job\n{job.text()[-3000:]}")
            job.stop()
        for job in self.jobs:
            job.wait()
        os.chdir("/")

    def run(self, text: str) -> str:
        words = shlex.split(text)
        if words[0] != "vhost-bridge" or PLAIN & set(text):
            return sh(text, timeout=60)
        process = spawn(words[1:])
        status = process.wait()
        assert status == 0, f"`{text}` ended with {status}: {process.text()}"
        return process.text()

    def begin(self, text: str) -> OurJob | OtherJob:
        words = shlex.split(text)
        if words[0] == "vhost-bridge":
            return OurJob(spawn(words[1:]))
        return OtherJob(text)

    def exists(self, path: str) -> bool:
        return os.path.exists(path)

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        try:
            wait_until(condition, 40)
        except TimeoutError as error:
            raise AssertionError(what) from error
