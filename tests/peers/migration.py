"""Live migration from one QEMU to another."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .guest import Guest

SECONDS = 60.0
DONE = ("completed", "failed", "cancelled")


class MigrationError(Exception):
    """It failed; the reason is QEMU's."""


def begin(
    source: Guest, destination: Guest, socket: Path, *, bandwidth: int = 0, pause: bool = False
) -> None:
    """Start it; `destination` waits for it. `bandwidth` limits it to that many bytes a second.

    With `pause` it waits for `finish` when the guest stands still and its devices are to follow.
    """
    socket.unlink(missing_ok=True)
    # The source goes on where the destination says that it can't.
    wanted = {"return-path": True, "pause-before-switchover": pause}
    for side in (source, destination):
        capabilities = [{"capability": name, "state": state} for name, state in wanted.items()]
        side.qmp.execute("migrate-set-capabilities", capabilities=capabilities)
    destination.qmp.execute("migrate-incoming", uri=f"unix:{socket}")
    source.qmp.execute(
        "migrate-set-parameters",
        **{"max-bandwidth": bandwidth or 1 << 30, "downtime-limit": 300},
    )
    source.qmp.execute("migrate", uri=f"unix:{socket}")


def pass_pause(source: Guest, at_pause: Callable[[], None]) -> None:
    """Call `at_pause` when a migration that was begun with `pause` waits, and let it go on.

    Raises:
        MigrationError: it ended before, or took too long.
    """
    _wait(source, "pre-switchover")
    at_pause()
    source.qmp.execute("migrate-continue", state="pre-switchover")


def finish(source: Guest) -> dict[str, Any]:
    """Wait for the end and return what QEMU tells of it: downtime, total-time, ram, ...

    Raises:
        MigrationError: it failed, was cancelled, or took too long.
    """
    return _wait(source, "completed")


def _wait(source: Guest, wanted: str) -> dict[str, Any]:
    deadline = time.monotonic() + SECONDS
    while True:
        told: dict[str, Any] = source.qmp.execute("query-migrate")
        if told.get("status") == wanted:
            return told
        if told.get("status") in DONE or time.monotonic() > deadline:
            raise MigrationError(f"{told.get('status')}: {told.get('error-desc', '')}")
        time.sleep(0.02)


def migrate(
    source: Guest,
    destination: Guest,
    socket: Path,
    *,
    bandwidth: int = 0,
    at_pause: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """All of it; `source` has ended afterwards, as after a real one."""
    begin(source, destination, socket, bandwidth=bandwidth, pause=at_pause is not None)
    if at_pause is not None:
        pass_pause(source, at_pause)
    told = finish(source)
    destination.qmp.wait_for_event("RESUME")
    source.qmp.execute("quit")
    source.wait()
    return told


def break_off(source: Guest, destination: Guest, socket: Path, how: str) -> None:
    """Begin one that takes long; it ends "cancelled", or "failed" since its destination is killed.

    Raises:
        AssertionError: it did not end so.
    """
    begin(source, destination, socket, bandwidth=4 << 20)
    source.run("sleep 1")
    if how == "cancelled":
        source.qmp.execute("migrate_cancel")
    else:
        destination.kill()
    try:
        finish(source)
        told = "completed"
    except MigrationError as error:
        told = str(error)
    assert how in told, told
