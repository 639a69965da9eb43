"""`blkio_verify` in the virtual machine: a libblkio client that knows what each block must hold."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROGRAM = str(Path(__file__).parents[2] / "blkio_verify")
USER, VDPA = "virtio-blk-vhost-user", "virtio-blk-vhost-vdpa"


def start(driver: str, path: str, mode: str, **options: object) -> subprocess.Popen[str]:
    """Start it. Options are the program's."""
    argv = [PROGRAM, driver, path, mode]
    for name, value in options.items():
        argv += [f"--{name.replace('_', '-')}", str(value)]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(driver: str, path: str, mode: str, **options: object) -> dict[str, Any]:
    """Run it to its end and return its result; all that it read was right."""
    return finish(start(driver, path, mode, **options))


@contextlib.contextmanager
def running(path: str, **options: object) -> Iterator[subprocess.Popen[str]]:
    """A client that writes and reads, from its first request on; killed when the block ends."""
    client = start(USER, path, "write-read", **options)
    try:
        assert client.stdout is not None
        line = client.stdout.readline()
        assert line == "running\n", line + client.stdout.read()
        yield client
        assert not client.poll(), f"blkio_verify ended with {client.returncode}"
    finally:
        client.kill()
        client.wait()


def finish(client: subprocess.Popen[str]) -> dict[str, Any]:
    """Wait for its end and return its result; all that it read was right."""
    try:
        output, _ = client.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        client.kill()
        client.wait()
        raise
    assert client.returncode == 0, f"blkio_verify ended with {client.returncode}: {output}"
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def kill(client: subprocess.Popen[str]) -> None:
    """End it as a crash would."""
    os.kill(client.pid, 9)
    client.communicate()
