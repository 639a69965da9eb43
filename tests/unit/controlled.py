"""A bridge that does as it is told, and its daemon's control socket in a thread."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import trio

from vhostbridge.backends.errors import BridgeError
from vhostbridge.backends.fds import OwnedFd
from vhostbridge.bridge.control import Controlled, serve_control
from vhostbridge.bridge.events import Event, Events
from vhostbridge.bridge.status import BridgeStatus, SwitchReport, VringStatus

STATE = b"state of a device" * 100


class FakeBridge:
    """Takes part in the interface as `Controlled` says; remembers what it was asked."""

    def __init__(self, name: str = "vm1", *, state: str = "running") -> None:
        self.name = name
        self.state = state
        self.asked: list[str] = []
        #: What was loaded last.
        self.loaded = b""
        #: Raised by every operation.
        self.error: Exception | None = None
        #: Why a state doesn't fit.
        self.reasons: list[str] = []
        #: Operations wait here half-way.
        self.gate: trio.Event | None = None
        #: Set when one was cancelled there.
        self.cancelled = threading.Event()
        self.device: str | None = "block"

    def status(self) -> BridgeStatus:
        if isinstance(self.error, BridgeError) and "status" in str(self.error):
            raise self.error
        return BridgeStatus(
            name=self.name,
            backend="vdpa:blk0",
            listen="/run/vm1.sock",
            device=self.device,
            state=self.state,
            failure="",
            held=self.state == "suspended",
            incoming=False,
            kept=False,
            front_end=4711,
            features=1 << 32 | 1 << 9,
            status=15,
            control={},
            capabilities={
                "suspend": {"how": "native", "why": "VHOST_VDPA_SUSPEND"},
                "dirty_log": {"how": "no", "why": "not offered"},
            },
            vrings=(
                VringStatus(
                    index=0,
                    size=256,
                    running=self.state == "running",
                    enabled=True,
                    packed=False,
                    base=9 if self.state == "suspended" else None,
                    available=12,
                    used=7,
                    problem="used index 7 is not the device's base 9"
                    if self.state == "suspended"
                    else "",
                ),
            ),
        )

    async def _operate(self, verb: str) -> None:
        self.asked.append(verb)
        if self.error is not None:
            raise self.error
        if self.gate is not None:
            try:
                await self.gate.wait()
            except trio.Cancelled:
                self.cancelled.set()
                raise

    async def suspend(self) -> None:
        await self._operate("suspend")
        self.state = "suspended"

    async def resume(self) -> None:
        await self._operate("resume")
        self.state = "running"

    async def reset(self) -> None:
        await self._operate("reset")
        self.state = "reset"

    async def save(self, sink: OwnedFd, progress: Callable[[int], None]) -> int:
        half = len(STATE) // 2
        os.write(sink.fileno(), STATE[:half])
        progress(half)
        await self._operate("save")
        os.write(sink.fileno(), STATE[half:])
        progress(len(STATE))
        return len(STATE)

    async def load(
        self, source: OwnedFd, *, dry_run: bool, progress: Callable[[int], None]
    ) -> list[str]:
        data = await trio.to_thread.run_sync(_read_all, source.fileno())
        progress(len(data))
        await self._operate("dry run" if dry_run else "load")
        if not self.reasons and not dry_run:
            self.loaded, self.state = data, "suspended"
        return self.reasons

    async def switch(self, backend: str, *, dry_run: bool) -> SwitchReport:
        await self._operate(f"switch to {backend}" + " (dry run)" * dry_run)
        done = not self.reasons and not dry_run
        phases = {"suspend": 0.001, "state": 0.0005, "resume": 0.002} if done else {}
        return SwitchReport(self.reasons, done, 0.01, phases, self.state)


def _read_all(number: int) -> bytes:
    data = b""
    while piece := os.read(number, 65536):
        data += piece
    return data


def some_fds(count: int) -> list[OwnedFd]:
    """Descriptors of nothing much."""
    return [OwnedFd(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)) for _ in range(count)]


@contextmanager
def daemon(path: Path, *bridges: FakeBridge) -> Iterator[Callable[[Event], None]]:
    """Serve `bridges` on `path`, in a thread with an event loop of its own.

    Gives what tells an event there.
    """
    named: Mapping[str, Controlled] = {bridge.name: bridge for bridge in bridges}
    ready = threading.Event()
    events = Events()
    token: list[tuple[trio.lowlevel.TrioToken, trio.CancelScope]] = []

    async def serve() -> None:
        with trio.CancelScope() as scope:
            token.append((trio.lowlevel.current_trio_token(), scope))
            async with trio.open_nursery() as nursery:
                await nursery.start(partial(serve_control, path, named, events=events))
                ready.set()

    thread = threading.Thread(target=trio.run, args=[serve])
    thread.start()
    try:
        assert ready.wait(10)
        yield lambda event: token[0][0].run_sync_soon(events.tell, event)
    finally:
        for loop, scope in token:
            loop.run_sync_soon(scope.cancel)
        thread.join()
