"""`vhost-bridge serve` as its users run it: a process of its own."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from .process import Process

COMMAND = Path(sys.executable).with_name("vhost-bridge")
# Every warning is shown, so that what was left open by mistake is seen.
ENVIRONMENT = {"PYTHONWARNINGS": "default", "PYTHONFAULTHANDLER": "1"}
NEVER_IN_A_LOG = re.compile(r"Traceback|\w*Warning:|Exception ignored|Fatal Python error")


class Bridge(Process):
    """A running bridge; on entry it is waited for, on exit it is stopped and its log looked at.

    `arguments` are those of `serve`. Exactly one of `listen`, `connect` and `fd` goes in too.
    """

    def __init__(
        self,
        backend: str = "",
        *,
        name: str = "b",
        listen: Path | None = None,
        connect: Path | None = None,
        fd: int | None = None,
        arguments: Sequence[str | Path] = (),
    ) -> None:
        argv: list[str | Path] = [COMMAND, "serve", *arguments]
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
            if error is None:
                self.stop()
        finally:
            super().__exit__(kind, error, trace)

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
