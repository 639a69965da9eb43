"""Runs `blkio_verify`, the libblkio client that knows what every block must hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .build import build_peer
from .process import Process, peer

RUNNING = "running\n"


def start(socket: Path, mode: str, **options: object) -> Process:
    """Start it on a vhost-user socket. Options are those of the program, `_` for `-`."""
    return start_driver("virtio-blk-vhost-user", socket, mode, **options)


def start_driver(driver: str, path: Path, mode: str, **options: object) -> Process:
    """Start it with any of its drivers."""
    argv: list[str | Path] = [build_peer("blkio_verify"), driver, path, mode]
    for name, value in options.items():
        argv += [f"--{name.replace('_', '-')}", str(value)]
    return peer(argv)


def finish(client: Process, timeout: float = 120) -> dict[str, Any]:
    """Wait for its end and return its result; all that it read was right.

    Raises:
        AssertionError: it was not, or an operation failed or hung.
    """
    status = client.wait(timeout)
    assert status == 0, f"blkio_verify ended with {status}: {client.output[-2000:]}"
    result: dict[str, Any] = json.loads(client.output.splitlines()[-1])
    return result


def run(socket: Path, mode: str, **options: object) -> dict[str, Any]:
    """Run it on a vhost-user socket to its end and return its result."""
    with start(socket, mode, **options) as client:
        return finish(client)


def verify_file(image: Path, **options: object) -> dict[str, Any]:
    """Compare the blocks of a raw image file, without any device."""
    with start_driver("file", image, "verify", **options) as client:
        return finish(client)
