"""The daemon's control interface: varlink methods of ``io.vhostbridge.Control`` to operations.

Its definition is the file ``io.vhostbridge.Control.varlink`` beside this one.
"""

from __future__ import annotations

import fcntl
import logging
import os
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from importlib import resources
from pathlib import Path
from typing import Protocol, TypeVar

import trio

from vhostbridge import __version__
from vhostbridge.backends.errors import BridgeError, TargetError, find_bridge_error
from vhostbridge.backends.fds import OwnedFd
from vhostbridge.backends.vhostuser.sockets import unlisten

from .config import control_folder
from .endpoint import listen_at
from .events import Events
from .following import follow
from .journald import working_for
from .keeping import Keeper
from .metrics import Metrics
from .status import BridgeStatus, SwitchReport, to_wire
from .varlink import (
    Answering,
    Interface,
    Method,
    Parameter,
    Service,
    Values,
    VarlinkError,
    service_error,
)
from .varlink_server import Server

_log = logging.getLogger("vhostbridge.control")

INTERFACE = "io.vhostbridge.Control"

#: Characters of a long text in one reply.
_PIECE = 1 << 17

T = TypeVar("T")


class Controlled(Protocol):
    """A bridge, as the control interface drives it. One operation at a time is its own to ensure.

    Every operation raises ``BridgeError`` when it can't be done; the device is then as it was, or
    FAILED. Descriptors are borrowed.
    """

    @property
    def name(self) -> str: ...

    def status(self) -> BridgeStatus: ...

    async def suspend(self) -> None: ...

    async def resume(self) -> None: ...

    async def reset(self) -> None: ...

    async def save(self, sink: OwnedFd, progress: Callable[[int], None]) -> int:
        """Write the state to ``sink``; ``progress`` is told the bytes so far. Returns all."""

    async def load(
        self, source: OwnedFd, *, dry_run: bool, progress: Callable[[int], None]
    ) -> list[str]:
        """Take the state from ``source`` over. Returns why it doesn't fit.

        An empty list: it was loaded, or with ``dry_run`` would be. Otherwise nothing was done.
        """

    async def switch(self, backend: str, *, dry_run: bool) -> SwitchReport:
        """Go over to another back-end, or tell why that can't be."""


class Control:
    """The methods, for the bridges of one daemon."""

    def __init__(self, bridges: Mapping[str, Controlled], events: Events | None = None) -> None:
        self._bridges = bridges
        self._events = events or Events()
        self._metrics = Metrics(bridges)

    def interface(self) -> Interface:
        """The interface with its definition."""
        name = Parameter(str)
        file = {"path": Parameter(str, optional=True), "fileDescriptor": Parameter(int, True)}
        return Interface(
            INTERFACE,
            description(),
            {
                "List": Method({}, self._list),
                "Status": Method({"name": Parameter(str, optional=True)}, self._status),
                "Monitor": Method({"names": Parameter(list, optional=True)}, self._monitor),
                "Metrics": Method({}, self._tell_metrics),
                "Suspend": Method({"name": name}, self._operation(lambda one: one.suspend)),
                "Resume": Method({"name": name}, self._operation(lambda one: one.resume)),
                "Reset": Method({"name": name}, self._operation(lambda one: one.reset)),
                "Save": Method({"name": name, **file}, self._save),
                "Load": Method(
                    {"name": name, **file, "dryRun": Parameter(bool, optional=True)}, self._load
                ),
                "Switch": Method(
                    {
                        "name": name,
                        "backend": Parameter(str),
                        "dryRun": Parameter(bool, optional=True),
                    },
                    self._switch,
                ),
            },
        )

    def _bridge(self, answering: Answering) -> Controlled:
        return self._named(str(answering.call.parameters["name"]))

    def _named(self, name: str) -> Controlled:
        if name not in self._bridges:
            raise _error("NoSuchBridge", name=name, known=sorted(self._bridges))
        return self._bridges[name]

    async def _list(self, answering: Answering) -> Values:
        return {"bridges": sorted(self._bridges)}

    async def _status(self, answering: Answering) -> Values:
        if answering.call.parameters.get("name") is None:
            chosen = [self._bridges[name] for name in sorted(self._bridges)]
        else:
            chosen = [self._bridge(answering)]

        async def look() -> Values:
            if not answering.call.more:
                return {"bridges": [to_wire(bridge.status()) for bridge in chosen]}
            for bridge in chosen:
                await answering.tell({"bridges": [to_wire(bridge.status())]})
                await trio.lowlevel.checkpoint()
            return {"bridges": []}

        return await _refusing(look())

    async def _monitor(self, answering: Answering) -> Values:
        if not answering.call.more:
            raise service_error("ExpectedMore")
        names = answering.call.parameters.get("names") or []
        assert isinstance(names, list)
        chosen = [self._named(name) for name in names or sorted(self._bridges)]
        return await _refusing(follow(self._events, chosen, names, answering.tell))

    async def _tell_metrics(self, answering: Answering) -> Values:
        text = await _refusing(self._metrics.text())
        if not answering.call.more:
            return {"text": text}
        for start in range(0, len(text), _PIECE):
            await answering.tell({"text": text[start : start + _PIECE]})
        return {"text": ""}

    def _operation(
        self, choose: Callable[[Controlled], Callable[[], Awaitable[None]]]
    ) -> Callable[[Answering], Awaitable[Values]]:
        async def run(answering: Answering) -> Values:
            bridge = self._bridge(answering)
            _tell(answering, bridge)
            await _refusing(choose(bridge)())
            return {"state": bridge.status().state}

        return run

    async def _save(self, answering: Answering) -> Values:
        bridge = self._bridge(answering)
        given = _given(answering, os.O_WRONLY)
        _tell(answering, bridge)

        def progress(count: int) -> None:
            answering.progress({"bytes": count, "done": False})

        async def save() -> int:
            if isinstance(given, OwnedFd):
                return await bridge.save(given, progress)
            from vhostbridge.backends.state_stream import atomic_file

            async with _in_threads(atomic_file(given)) as sink:
                return await bridge.save(sink, progress)

        return {"bytes": await _refusing(save()), "done": True}

    async def _load(self, answering: Answering) -> Values:
        bridge = self._bridge(answering)
        given = _given(answering, os.O_RDONLY)
        dry_run = answering.call.parameters.get("dryRun") is True
        _tell(answering, bridge, " (dry run)" if dry_run else "")
        taken = 0

        def reply(done: bool, reasons: list[str]) -> Values:
            state = bridge.status().state
            return {"bytes": taken, "done": done, "reasons": reasons, "state": state}

        def progress(count: int) -> None:
            nonlocal taken
            taken = count
            answering.progress(reply(False, []))

        async def load() -> list[str]:
            if isinstance(given, OwnedFd):
                return await bridge.load(given, dry_run=dry_run, progress=progress)
            async with _in_threads(_opened(given)) as source:
                return await bridge.load(source, dry_run=dry_run, progress=progress)

        reasons = await _refusing(load())
        if reasons and not dry_run:
            raise _error("Incompatible", reasons=reasons)
        return reply(True, reasons)

    async def _switch(self, answering: Answering) -> Values:
        bridge = self._bridge(answering)
        given = answering.call.parameters
        dry_run = given.get("dryRun") is True
        backend = str(given["backend"])
        _tell(answering, bridge, f" to {backend}" + (" (dry run)" if dry_run else ""))
        report = await _refusing(bridge.switch(backend, dry_run=dry_run))
        if report.reasons and not dry_run:
            raise _error("Incompatible", reasons=report.reasons)
        return {
            "reasons": report.reasons,
            "state": report.state,
            "prepare": report.prepare,
            "pause": report.pause,
            "phases": report.phases,
        }


def description() -> str:
    """The interface's definition."""
    return (resources.files(__package__) / f"{INTERFACE}.varlink").read_text(encoding="utf-8")


def _error(error: str, /, **parameters: object) -> VarlinkError:
    return VarlinkError(f"{INTERFACE}.{error}", parameters)


def _tell(answering: Answering, bridge: Controlled, more: str = "") -> None:
    verb = answering.call.method.rpartition(".")[2].lower()
    working_for.set(bridge.name)
    _log.info("%s: %s asked for by %s%s", bridge.name, verb, answering.asked_by, more)


# An operation whose failures are the caller's to know. A bug is the daemon's log's to know, too.
async def _refusing(operation: Awaitable[T]) -> T:
    try:
        return await operation
    except Exception as error:
        known = find_bridge_error(error)
        if known is None:
            _log.exception("internal error in an operation")
            known = BridgeError("internal error", "the daemon's log has more; please report it")
        raise _error(
            "Refused", kind=type(known).__name__, message=known.message, hint=known.hint
        ) from error


# What a state goes to or comes from: a path, or a descriptor of the call that allows it.
def _given(answering: Answering, access: int) -> Path | OwnedFd:
    path = answering.call.parameters.get("path")
    index = answering.call.parameters.get("fileDescriptor")
    if (path is None) == (index is None):
        raise service_error("InvalidParameter", parameter="path")
    if isinstance(path, str):
        if not path.startswith("/") or not _is_path(path):
            raise service_error("InvalidParameter", parameter="path")
        return Path(path)
    fds = answering.call.fds
    if not isinstance(index, int) or not 0 <= index < len(fds):
        raise service_error("InvalidParameter", parameter="fileDescriptor")
    flags = fcntl.fcntl(fds[index].fileno(), fcntl.F_GETFL)
    if flags & os.O_PATH or flags & os.O_ACCMODE not in (access, os.O_RDWR):
        raise service_error("InvalidParameter", parameter="fileDescriptor")
    return fds[index]


def _is_path(text: str) -> bool:
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


@contextmanager
def _opened(path: Path) -> Iterator[OwnedFd]:
    try:
        # Opening a pipe would wait for its other end.
        fd = OwnedFd(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError as error:
        raise TargetError(f"cannot read {path}: {os.strerror(error.errno or 0)}") from None
    with fd:
        if not stat.S_ISREG(os.fstat(fd.fileno()).st_mode):
            raise TargetError(f"{path} is no regular file", "pass a descriptor of it instead")
        yield fd


# Opening, syncing and renaming wait for a disk: not in the thread that answers front-ends.
@asynccontextmanager
async def _in_threads(manager: AbstractContextManager[OwnedFd]) -> AsyncIterator[OwnedFd]:
    opened = await trio.to_thread.run_sync(manager.__enter__)
    try:
        yield opened
    except BaseException as error:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(manager.__exit__, type(error), error, error.__traceback__)
        raise
    with trio.CancelScope(shield=True):
        await trio.to_thread.run_sync(manager.__exit__, None, None, None)


async def serve_control(
    path: Path,
    bridges: Mapping[str, Controlled],
    keeper: Keeper | None = None,
    events: Events | None = None,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve the interface on ``path`` (mode 0600) until cancelled; the path is removed then.

    ``bridges`` may change meanwhile; ``events`` is what happens to them. The folder is made when it
    is the usual one. A socket that ``keeper`` inherited for the path is used.

    Raises:
        TargetError: another daemon listens there, or the path can't be had.
    """
    if path.parent == control_folder():
        _make_folder(path.parent)
    listener, ours = listen_at(str(path), 0o600, keeper)
    info = {
        "vendor": "vhost-bridge",
        "product": "vhost-bridge",
        "version": __version__,
        "url": "man:vhost-bridge(1)",
    }
    try:
        _log.info("control socket: %s", path)
        task_status.started()
        await Server(Service([Control(bridges, events).interface()], info)).serve(listener)
    finally:
        if ours and (keeper is None or not keeper.keeps):
            unlisten(listener, str(path))
        else:
            listener.close()


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise TargetError(
            f"cannot make {folder}: {os.strerror(error.errno or 0)}",
            "--control PATH puts the control socket elsewhere, --no-control does without",
        ) from None
