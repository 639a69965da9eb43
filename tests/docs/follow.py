"""Follows a document as a person would: its commands as they are written, in their order. Python's
library only."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from .blocks import Command, section

JOBS = re.compile(r"(kill|wait)(?: %\d+)*")
NUMBER = re.compile(r"\d+")
SOCKET = re.compile(r"(?:addr\.path=|--socket-path |iface=)(/[\w./-]+)")
# Commands of ours that go on until they are stopped, although nothing puts them behind.
ON = re.compile(r"vhost-bridge (?:serve\b|monitor\b(?!.*--until)|.*--follow\b)")


class Job(Protocol):
    """A command that goes on."""

    def text(self) -> str:
        """What it has printed."""

    def ended(self) -> int | None:
        """Its exit status; None while it runs."""

    def stop(self) -> None:
        """Tell it to end, as `kill` does."""

    def wait(self) -> int:
        """Wait for its end; the status."""


J = TypeVar("J", bound=Job)


class Follower(ABC, Generic[J]):
    """A person with a shell; `root` has the documents."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.jobs: list[J] = []  # %1 is the first

    @abstractmethod
    def begin(self, text: str) -> J:
        """Start a command that goes on."""

    @abstractmethod
    def run(self, text: str) -> str:
        """Run a command of the host to its end; what it printed.

        Raises:
            AssertionError: it failed.
        """

    @abstractmethod
    def exists(self, path: str) -> bool:
        """Whether the host has a file of that name."""

    @abstractmethod
    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait until it is so, a reasonable time.

        Raises:
            AssertionError: it was not.
        """

    def here(self, text: str) -> str:
        """The command as it is run here."""
        return text

    def elsewhere(self, text: str, where: str) -> str:
        """Run a command that is not the host's; what it printed."""
        raise AssertionError(f"nothing here runs commands of {where}")

    def commands(self, name: str) -> list[Command]:
        """The commands of a section."""
        return [c for block in section(self.root, name) for c in block.commands()]

    def follow(self, name: str, *, leave_out: str = "") -> None:
        """Do all that a section says, options for QEMU and one command excepted."""
        for command in self.commands(name):
            if command.where != "options" and command.text != leave_out:
                self.do(command)

    def do(self, command: Command) -> None:
        """Do what a command says; what it prints must be what the document says.

        Raises:
            AssertionError: it failed, or printed something else.
        """
        text = self.here(command.text)
        try:
            if command.where != "host":
                compare(command.output, self.elsewhere(text, command.where))
            elif jobs := JOBS.fullmatch(text):
                self._end(jobs[1], [int(number) for number in re.findall(r"%(\d+)", text)])
            elif text.endswith("&") or ON.match(text):
                self._begin(text.removesuffix("&").strip(), command.output)
            else:
                compare(command.output, self.run(text))
        except BaseException as error:
            error.add_note(f"{command.place}: {command.text}")
            raise

    def _begin(self, text: str, output: str) -> None:
        job = self.begin(text)
        self.jobs.append(job)
        if " serve " in text:
            self._wait(job, lambda: "serving " in job.text())
        else:
            for name in SOCKET.findall(text):
                self._wait(job, partial(self.exists, name))
        if output:
            self._wait(job, lambda: agrees(output, job.text()))
        assert job.ended() is None, f"`{text}` ended: {job.text()}"

    def _wait(self, job: J, condition: Callable[[], bool]) -> None:
        self.wait_until(lambda: condition() or job.ended() is not None, job.text())
        assert condition(), job.text()

    def _end(self, verb: str, numbers: list[int]) -> None:
        for number in numbers or range(1, len(self.jobs) + 1):
            job = self.jobs[number - 1]
            if verb == "kill":
                job.stop()
            else:
                job.wait()


def compare(documented: str, printed: str) -> None:
    """Fail unless that was printed: `…` stands for anything, each number for any number."""
    assert agrees(documented, printed), f"it printed\n{printed}\nand not\n{documented}"


def agrees(documented: str, printed: str) -> bool:
    if not documented.strip():
        return True
    pattern = ".*".join(map(re.escape, re.split(r"\s*…\s*", _plain(documented))))
    return re.fullmatch(pattern, _plain(printed), re.DOTALL) is not None


def _plain(text: str) -> str:
    return " ".join(NUMBER.sub("#", text).split())
