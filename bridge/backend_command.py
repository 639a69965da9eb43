"""A back-end that the bridge starts itself, and starts again when it ends."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

import trio

from vhostbridge.backends.errors import TargetError
from vhostbridge.backends.fds import OwnedFd

_log = logging.getLogger("vhostbridge.backend")

# Pauses before a back-end is started again that did not get as far as serving, in seconds: doubled
# up to the last. One that did is started at once.
FIRST_PAUSE, LAST_PAUSE = 0.5, 10.0
# How long it may take to end when it is told to, in seconds.
END = 10.0
# A line of its output that goes into the log, in bytes; longer ones are cut.
LINE = 2000

# What a service manager tells us, and nobody else.
_OURS = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID")


class BackendCommand:
    """Keeps one program running. What it writes goes to the log, with the bridge's name.

    It gets no descriptor of ours, leads a session of its own, and is killed by the kernel when this
    process dies. Processes of its own that stay in its process group are ended with it.
    """

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self._name = name
        self._command = tuple(command)
        self._stop = trio.Event()
        self._served = False
        #: The process, while there is one.
        self.pid: int | None = None

    def served(self) -> None:
        """It is of use: there is a device."""
        self._served = True

    def kill(self) -> None:
        """End the program and its group at once: it hangs."""
        if self.pid is not None:
            _log.warning("%s: killing the back-end (pid %d): it hangs", self._name, self.pid)
            os.killpg(self.pid, signal.SIGKILL)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Start it, and again whenever it ends, for the block's length; it has ended then.

        Raises:
            TargetError: it could not be started the first time.
        """
        async with trio.open_nursery() as nursery:
            await nursery.start(self._keep_running)
            try:
                yield
            finally:
                self._stop.set()

    async def _keep_running(self, task_status: trio.TaskStatus[None]) -> None:
        with trio.CancelScope(shield=True):
            await self._live(task_status)
            pause = FIRST_PAUSE
            while not self._stop.is_set():
                if self._served:
                    self._served, pause = False, FIRST_PAUSE
                else:
                    with trio.move_on_after(pause):
                        await self._stop.wait()
                        break
                    pause = min(2 * pause, LAST_PAUSE)
                try:
                    await self._live()
                except TargetError as error:
                    _log.error("%s: %s", self._name, error)

    # From its start to its end.
    async def _live(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        number, theirs = os.pipe()
        output = trio.lowlevel.FdStream(number)
        try:
            try:
                pid = self.pid = _spawn(self._command, theirs)
            finally:
                os.close(theirs)
            _log.info("%s: started %s (pid %d)", self._name, self._command[0], pid)
            task_status.started()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._copy_output, output)
                how = await self._until_ended(pid)
                # Others may hold its output still; what it wrote itself is there.
                nursery.cancel_scope.deadline = trio.current_time() + 0.5
            level = logging.INFO if self._stop.is_set() else logging.WARNING
            _log.log(level, "%s: the back-end (pid %d) %s", self._name, pid, how)
        finally:
            await output.aclose()

    async def _until_ended(self, pid: int) -> str:
        with OwnedFd(os.pidfd_open(pid)) as process:
            if not await self._ends_first(process):
                os.kill(pid, signal.SIGTERM)
                with trio.move_on_after(END):
                    await trio.lowlevel.wait_readable(process.fileno())
            # Not waited for yet, so that its number is still its own.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
            await trio.lowlevel.wait_readable(process.fileno())
            self.pid = None
            return _reap(pid)

    # Whether it ends before it is told to.
    async def _ends_first(self, process: OwnedFd) -> bool:
        ended = False
        async with trio.open_nursery() as nursery:

            async def wait_end() -> None:
                nonlocal ended
                await trio.lowlevel.wait_readable(process.fileno())
                ended = True
                nursery.cancel_scope.cancel()

            nursery.start_soon(wait_end)
            await self._stop.wait()
            nursery.cancel_scope.cancel()
        return ended

    async def _copy_output(self, output: trio.lowlevel.FdStream) -> None:
        rest = b""
        async for data in output:
            *lines, rest = (rest + data).split(b"\n")
            if len(rest) > LINE:
                lines, rest = [*lines, rest], b""
            for line in lines:
                self._tell(line)
        self._tell(rest)

    def _tell(self, line: bytes) -> None:
        text = line[:LINE].decode(errors="replace")
        clean = "".join(c if c.isprintable() else " " for c in text).strip()
        if clean:
            _log.info("%s: back-end: %s", self._name, clean)


# How a program ended that has ended.
def _reap(pid: int) -> str:
    end = os.waitid(os.P_PID, pid, os.WEXITED)
    assert end is not None
    if end.si_code == os.CLD_EXITED:
        return f"ended with status {end.si_status}"
    names = {number.value: number.name for number in signal.Signals}
    return f"was ended by {names.get(end.si_status, f'signal {end.si_status}')}"


# In the main thread: the program dies with the thread that started it.
def _spawn(command: Sequence[str], output: int) -> int:
    from vhostbridge.native import ffi, lib

    environment = [f"{key}={value}" for key, value in os.environ.items() if key not in _OURS]
    # The strings live as long as these lists.
    words, values = (
        [ffi.new("char[]", os.fsencode(text)) for text in texts] for texts in (command, environment)
    )
    argv, envp = (ffi.new("char *[]", [*texts, ffi.NULL]) for texts in (words, values))
    result = int(lib.vb_spawn(argv, envp, output))
    if result < 0:
        raise TargetError(f"cannot start {command[0]}: {os.strerror(-result)}")
    return result
