"""A command in the virtual machine, as the host sees it, and how it can go wrong."""

from __future__ import annotations

import dataclasses
import shlex
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

KILL_SECONDS = 30.0  # for the guest to say that a killed command is gone


class VmLost(Exception):
    """The virtual machine ended or doesn't answer: another thing than a command that failed."""


@dataclasses.dataclass(frozen=True, slots=True)
class Completed:
    """A command that ended. Its output is text; bytes that aren't UTF-8 are surrogate escapes."""

    argv: tuple[str, ...]
    returncode: int  # minus the signal's number where a signal ended it
    stdout: str
    stderr: str

    @property
    def stdout_bytes(self) -> bytes:
        """The output exactly as written."""
        return self.stdout.encode(errors="surrogateescape")


class CommandFailed(Exception):
    """A command in the guest ended with another status than 0."""

    def __init__(self, completed: Completed, why: str = "") -> None:
        self.completed = completed
        why = why or f"ended with {completed.returncode}"
        super().__init__(
            f"`{shlex.join(completed.argv)[:500]}` {why}\n"
            f"--- stdout\n{completed.stdout[-8000:]}\n--- stderr\n{completed.stderr[-8000:]}"
        )


class CommandTimeout(CommandFailed):
    """A command in the guest was over its deadline; it and its process group are killed."""


class Job:
    """A command that was started in the guest. Made by `Vm.start`."""

    def __init__(
        self,
        number: int,
        argv: tuple[str, ...],
        tell: Callable[..., None],
        lost: Callable[[str], VmLost],
    ) -> None:
        self.argv = argv
        self.pid: int | None = None  # in the guest
        self.returncode: int | None = None
        self._number = number
        self._tell = tell
        self._lost = lost  # ends the machine, and says what its console said
        self._chunks: dict[str, list[bytes]] = {"stdout": [], "stderr": []}
        self._why_lost: str | None = None
        self._changed = threading.Condition()

    def poll(self) -> int | None:
        """Return the exit status, or None while the command runs."""
        self._check()
        return self.returncode

    def output(self) -> Completed:
        """Return what the command has written so far; returncode is 0 while it runs."""
        with self._changed:
            out, err = (
                b"".join(self._chunks[name]).decode(errors="surrogateescape")
                for name in ("stdout", "stderr")
            )
            return Completed(self.argv, self.returncode or 0, out, err)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to the command's process group."""
        self._check()
        self._tell("signal", id=self._number, signal=int(number))

    def wait(self, timeout: float = 120) -> Completed:
        """Wait for the command's end; over the deadline it is killed and CommandTimeout raised."""
        if not self._until(lambda: self.returncode is not None, timeout):
            self.kill()
            if not self._until(lambda: self.returncode is not None, KILL_SECONDS):
                raise self._lost(
                    f"the guest doesn't end `{shlex.join(self.argv)[:200]}` when told to"
                )
            raise CommandTimeout(self.output(), f"was over its deadline of {timeout:g} s")
        return self.output()

    def wait_for_output(self, text: str, timeout: float = 120) -> Completed:
        """Wait until stdout or stderr holds `text`; the command's end without it is a failure."""

        def seen() -> bool:
            return any(text.encode() in b"".join(chunks) for chunks in self._chunks.values())

        if not self._until(lambda: seen() or self.returncode is not None, timeout):
            raise CommandTimeout(self.output(), f"didn't write {text!r} in {timeout:g} s")
        if not seen():
            raise CommandFailed(self.output(), f"ended without writing {text!r}")
        return self.output()

    def wait_started(self, timeout: float) -> None:
        """Wait until the guest says that it has started the command."""
        if not self._until(lambda: self.pid is not None, timeout):
            raise self._lost(
                f"the guest doesn't answer (waited {timeout:g} s for a command's start)"
            )

    def report(self, event: dict[str, Any], data: bytes) -> None:
        """Take in what the guest says of this command (called by the Vm's reader)."""
        with self._changed:
            match event["event"]:
                case "started":
                    self.pid = event["pid"]
                case "output":
                    self._chunks[event["stream"]].append(data)
                case "exit":
                    self.returncode = event["status"]
            self._changed.notify_all()

    def lose(self, why: str) -> None:
        """Wake all that wait: the virtual machine is gone (called by the Vm's reader)."""
        with self._changed:
            self._why_lost = why
            self._changed.notify_all()

    def _check(self) -> None:
        if self._why_lost and self.returncode is None:
            raise self._lost(self._why_lost)

    def _until(self, done: Callable[[], bool], timeout: float) -> bool:
        deadline = time.monotonic() + timeout
        with self._changed:
            while not done():
                self._check()
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(left)
            return True
