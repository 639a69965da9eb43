"""Programs that tests start and talk to: started, watched by their output, ended by their pid."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.rig.root import peer_argv

END_SECONDS = 60.0  # for a program to end once it was told to


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a process holds of the machine at one moment."""

    fds: int
    mappings: int  # of files and shared memory: Python's own grow and shrink
    threads: int
    resident_kib: int


class Process:
    """A running program and all that it has written, stdout and stderr in one.

    As a context manager it is killed on exit, if it still runs; a test that fails gets the end of
    its output as a note. Start it from the main thread: it dies with the thread that started it.
    With `children` those are killed with it.
    """

    def __init__(
        self,
        argv: Sequence[str | Path],
        *,
        name: str = "",
        pass_fds: Sequence[int] = (),
        env: Mapping[str, str] | None = None,
        children: bool = False,
    ) -> None:
        self._children = children
        self.name = name or Path(argv[0]).name
        self._popen = subprocess.Popen(
            list(map(str, argv)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=pass_fds,
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )
        self._chunks: list[bytes] = []
        self._ended = False
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, name=self.name, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()
        if error is not None:
            error.add_note(f"--- {self.name}\n{self.output[-4000:]}")

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def output(self) -> str:
        with self._changed:
            return b"".join(self._chunks).decode(errors="replace")

    def poll(self) -> int | None:
        """Return the exit status, minus the signal's number for a signal; None while it runs."""
        return self._popen.poll()

    def wait_for_output(self, text: str, timeout: float = 30, *, start: int = 0) -> int:
        """Wait until the output, from its character `start` on, has `text`; return where that ends.

        Raises:
            AssertionError: the program ended, or the time is over, without it.
        """
        end = -1

        def seen() -> bool:
            nonlocal end
            place = b"".join(self._chunks).decode(errors="replace").find(text, start)
            end = place + len(text)
            return place >= 0

        self._until(lambda: seen() or self._ended, timeout)
        if not seen():
            how = f"ended with {self._popen.wait()}" if self._ended else f"ran {timeout:g} s"
            raise AssertionError(
                f"{self.name} {how} without writing {text!r}\n{self.output[-4000:]}"
            )
        return end

    def wait(self, timeout: float = END_SECONDS) -> int:
        """Wait for the end and return the status; all output is there then.

        Raises:
            AssertionError: the time is over.
        """
        try:
            status = self._popen.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"{self.name} still runs after {timeout:g} s\n{self.output[-4000:]}"
            ) from None
        self._reader.join()
        return status

    def send(self, text: str) -> None:
        """Write to the program's stdin."""
        assert self._popen.stdin is not None
        self._popen.stdin.write(text.encode())
        self._popen.stdin.flush()

    def signal(self, number: int) -> None:
        self._popen.send_signal(number)

    def kill(self) -> None:
        """End it at once, as `kill -9` does; nothing when it has ended."""
        if self._children and self._popen.poll() is None:
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.kill()
        self._popen.wait()
        self._reader.join()
        for pipe in (self._popen.stdin, self._popen.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue

    def terminate(self) -> int:
        """Send SIGTERM and wait for the end; return the status."""
        self._popen.send_signal(signal.SIGTERM)
        return self.wait()

    def footprint(self) -> Footprint:
        """Count what the process holds now."""
        folder = Path("/proc", str(self.pid))
        status = dict(
            line.split(":", 1) for line in (folder / "status").read_text().splitlines() if line
        )
        maps = (folder / "maps").read_text().splitlines()
        return Footprint(
            fds=len(os.listdir(folder / "fd")),
            mappings=sum("/" in line for line in maps),
            threads=int(status["Threads"]),
            resident_kib=int(status["VmRSS"].split()[0]),
        )

    def _read(self) -> None:
        assert self._popen.stdout is not None
        while data := os.read(self._popen.stdout.fileno(), 65536):
            with self._changed:
                self._chunks.append(data)
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _until(self, done: Callable[[], bool], timeout: float) -> None:
        deadline = time.monotonic() + timeout
        with self._changed:
            while not done() and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)


def peer(
    argv: Sequence[str | Path],
    *,
    pass_fds: Sequence[int] = (),
    env: Mapping[str, str] | None = None,
) -> Process:
    """Start a program of the tree."""
    command = peer_argv(argv, die_with_parent=True)
    return Process(command, name=Path(argv[0]).name, pass_fds=pass_fds, env=env)


def eventually(condition: Callable[[], bool], what: str, timeout: float = 30) -> None:
    """Wait for something that tells nobody when it happens, such as a file of /proc changing."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {timeout:g} s")
        time.sleep(0.01)
