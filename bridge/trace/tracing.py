"""The traces of one daemon: a tracer for each bridge, and the file that they all go to, if any."""

from __future__ import annotations

import logging
from pathlib import Path
from types import TracebackType
from typing import Self

from vhostbridge.backends.errors import TargetError
from vhostbridge.backends.trace import Tracer

from .writer import TraceFile

_log = logging.getLogger("vhostbridge.trace")


class Tracing:
    """Tracers exist all the time, so that a trace can begin and end while bridges run."""

    def __init__(self, path: Path | None = None, limit: int = 0, *, required: bool = True) -> None:
        """Trace to ``path``, from ``with`` on; a file grows to ``limit`` bytes.

        One that can't be written is an error if it is ``required``, else a line in the log.
        """
        self._wanted = (path, limit)
        self._required = required
        self._tracers: dict[str, Tracer] = {}
        self._file: TraceFile | None = None
        self._handler = _LogEvents(self)
        # What happens to no bridge in particular.
        self._daemon = Tracer()

    def tracer(self, bridge: str = "") -> Tracer:
        """The tracer of a bridge, always the same; without a name the daemon's own."""
        if not bridge:
            return self._daemon
        if bridge not in self._tracers:
            self._tracers[bridge] = Tracer(bridge)
            if self._file is not None:
                self._tracers[bridge].attach(self._file.put)
        return self._tracers[bridge]

    def knows(self, bridge: str) -> bool:
        return bridge in self._tracers

    def __enter__(self) -> Self:
        """Raises ``TargetError`` when a trace that is required can't be written."""
        try:
            self._begin()
        except TargetError as error:
            if self._required:
                raise
            self._tell_failure(error)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def become(self, path: Path | None, limit: int) -> None:
        """Trace to ``path`` from now on; one that can't be written is told in the log."""
        if self._wanted == (path, limit):
            return
        self._end()
        self._wanted = (path, limit)
        try:
            self._begin()
        except TargetError as error:
            self._tell_failure(error)

    def _tell_failure(self, error: TargetError) -> None:
        _log.error("no trace is written: %s", error)

    def _begin(self) -> None:
        path, limit = self._wanted
        if path is None:
            return
        self._file = TraceFile(path, limit, self._failed)
        for tracer in self._all():
            tracer.attach(self._file.put)
        logging.getLogger("vhostbridge").addHandler(self._handler)

    # What waits is written.
    def _end(self) -> None:
        self._detach()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _detach(self) -> None:
        logging.getLogger("vhostbridge").removeHandler(self._handler)
        for tracer in self._all():
            tracer.detach()

    def _all(self) -> list[Tracer]:
        return [self._daemon, *self._tracers.values()]

    # In the writer's thread.
    def _failed(self, reason: str) -> None:
        self._detach()
        _log.error("%s; it ends here, the bridges go on", reason)


class _LogEvents(logging.Handler):
    """What the daemon logs is part of the trace."""

    def __init__(self, tracing: Tracing) -> None:
        super().__init__(logging.INFO)
        self._tracing = tracing

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text, name = record.getMessage(), self._bridge(record)
            self._tracing.tracer(name).event(
                record.levelname.lower(), text=text.removeprefix(f"{name}: ")
            )
        except Exception:
            self.handleError(record)

    # Messages of a bridge begin with its name.
    def _bridge(self, record: logging.LogRecord) -> str:
        if not (isinstance(record.args, tuple) and record.args and record.msg.startswith("%s: ")):
            return ""
        name = str(record.args[0])
        return name if self._tracing.knows(name) else ""
