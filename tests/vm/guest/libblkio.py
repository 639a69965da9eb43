"""`blkio_verify` in the virtual machine: a libblkio client that knows what each block must hold."""

from __future__ import annotations

import json
import os
import subprocess
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
    client = start(driver, path, mode, **options)
    try:
        output, _ = client.communicate(timeout=60)
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
