"""`vhost-bridge serve` as its users run it: a process of its own."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from vhostbridge.bridge.control_client import ControlClient
from vhostbridge.bridge.status import BridgeStatus

from .process import Process

COMMAND = Path(sys.executable).with_name("vhost-bridge")
# Every warning is shown, so that what was left open by mistake is seen.
ENVIRONMENT = {"PYTHONWARNINGS": "default", "PYTHONFAULTHANDLER": "1"}
NEVER_IN_A_LOG = re.compile(r"Traceback|\w*Warning:|Exception ignored|Fatal Python error")


class Bridge(Process):
    """A running bridge; on entry it is waited for, on exit it is stopped and its log looked at,
    unless it was killed.

    `arguments` are those of `serve`. Exactly one of `listen`, `connect` and `fd` goes in too.
    Its control socket is at `control`, or in a folder of its own: the usual one is shared by tests.
    """

    def __init__(
        self,
        backend: str = "",
        *,
        name: str = "b",
        listen: Path | None = None,
        connect: Path | None = None,
        fd: int | None = None,
        control: Path | None = None,
        arguments: Sequence[str | Path] = (),
    ) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="vb-"))
        #: Its control socket.
        self.control = control or self._folder / "control"
        argv: list[str | Path] = [COMMAND, "serve", "--control", self.control, *arguments]
        if backend:
            argv += ["--name", name, "--backend", backend]
        for option, value in (("--listen", listen), ("--connect", connect), ("--fd", fd)):
            if value is not None:
                argv += [option, str(value)]
        super().__init__(
            argv,
            name=f"vhost-bridge {name}",
            pass_fds=[] if fd is None else [fd],
            env=ENVIRONMENT,
        )
        self.bridge_name = name
        self._killed = False
        self._listen = listen

    def __enter__(self) -> Self:
        try:
            self.wait_for_output("serving ")
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None and not self._killed:
                self.stop()
        finally:
            super().__exit__(kind, error, trace)
            shutil.rmtree(self._folder)

    def kill(self) -> None:
        self._killed = True
        super().kill()

    def operate(self, method: str) -> str:
        """Ask for Suspend, Resume or Reset as the command line does; the state afterwards.

        Raises:
            BridgeError: it was refused.
        """
        with ControlClient(self.control) as client:
            return client.operate(method, self.bridge_name)

    def status(self) -> BridgeStatus:
        """What it says of itself."""
        with ControlClient(self.control) as client:
            return client.status(self.bridge_name)[0]

    def command(
        self, verb: str, *arguments: str | Path, check: bool = True, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run `vhost-bridge VERB NAME ...` on it, with its output as text."""
        return subprocess.run(
            [COMMAND, verb, "--control", self.control, self.bridge_name, *map(str, arguments)],
            check=check,
            text=True,
            capture_output=True,
            timeout=120,
            **options,
        )

    @property
    def listen(self) -> Path:
        """Where front-ends connect."""
        assert self._listen is not None
        return self._listen

    def stop(self) -> None:
        """End it by SIGTERM, unless it has ended; it ends well and has logged nothing bad.

        Raises:
            AssertionError: it did not.
        """
        status = self.terminate() if self.poll() is None else self.wait()
        assert status == 0, f"{self.name} ended with {status}\n{self.output[-4000:]}"
        self.check_log()

    def check_log(self) -> None:
        """Fail when the log has a traceback or one of Python's warnings.

        Raises:
            AssertionError: it has.
        """
        bad = NEVER_IN_A_LOG.search(self.output)
        assert bad is None, f"{self.name} logged {bad[0] if bad else ''}\n{self.output[-6000:]}"

    def lines(self, level: str) -> list[str]:
        """The log's lines of a level ("INFO", "WARNING", "ERROR")."""
        return [line for line in self.output.splitlines() if line.startswith(f"{level} ")]

    def wait_for_departures(self, count: int) -> None:
        """Wait until `count` front-ends in all have come and gone, in order or cut off."""
        start = 0
        for _ in range(count):
            start = self.wait_for_output("front-end (pid ", start=start)
