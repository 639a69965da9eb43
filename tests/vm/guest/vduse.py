"""qemu-storage-daemon's vduse-blk: a real file as a vDPA device, served by a process."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .devices import node_of, sh, wait_until

SIZE = 32 << 20
DESTROY_DEV = 0x41008103


@dataclass(slots=True)
class VduseDevice:
    """A vDPA device and the process behind it."""

    name: str
    node: str
    file: Path
    process: subprocess.Popen[bytes]

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def resize(self, size: int) -> None:
        """Make the disk that large; the device's configuration changes."""
        with socket.socket(socket.AF_UNIX) as monitor:
            monitor.connect(f"/tmp/{self.name}.qmp")
            with monitor.makefile("rw") as lines:
                lines.readline()
                for command in (
                    {"execute": "qmp_capabilities"},
                    {"execute": "block_resize", "arguments": {"node-name": "disk", "size": size}},
                ):
                    lines.write(json.dumps(command) + "\n")
                    lines.flush()
                    while "return" not in (answer := json.loads(lines.readline())):
                        assert "error" not in answer, answer


@contextlib.contextmanager
def vduse_block(name: str = "vd0", *, msg_timeout: int | None = None) -> Iterator[VduseDevice]:
    """The device, for the length of the block; whoever has it open must be gone by then.

    `msg_timeout` is how many seconds the kernel waits for the process.
    """
    file = Path(f"/tmp/{name}.img")
    file.unlink(missing_ok=True)
    with file.open("wb") as image:
        image.truncate(SIZE)
    export = f"type=vduse-blk,id=export,name={name},node-name=disk,writable=on"
    process = subprocess.Popen(
        [
            *("qemu-storage-daemon", "--blockdev", _blockdev(file)),
            *("--chardev", f"socket,id=qmp,path=/tmp/{name}.qmp,server=on,wait=off"),
            *("--monitor", "chardev=qmp", "--export", export),
        ]
    )
    try:
        wait_until(lambda: os.path.exists(f"/dev/vduse/{name}"))
        if msg_timeout is not None:
            Path(f"/sys/class/vduse/{name}/msg_timeout").write_text(str(msg_timeout))
        sh(f"vdpa dev add name {name} mgmtdev vduse")
        try:
            yield VduseDevice(name, node_of(name), file, process)
        finally:
            process.send_signal(signal.SIGCONT)
            sh(f"vdpa dev del {name}")
    finally:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        process.wait(20)
        _destroy(name)


@contextlib.contextmanager
def vhost_user_block(file: Path) -> Iterator[str]:
    """The path of a socket where another qemu-storage-daemon serves the same file."""
    path = "/tmp/disk.sock"
    where = f"addr.type=unix,addr.path={path}"
    export = f"type=vhost-user-blk,id=export,node-name=disk,writable=on,{where}"
    process = subprocess.Popen(
        ["qemu-storage-daemon", "--blockdev", _blockdev(file), "--export", export]
    )
    try:
        wait_until(lambda: os.path.exists(path))
        yield path
    finally:
        process.terminate()
        process.wait(20)
        Path(path).unlink(missing_ok=True)


def _blockdev(file: Path) -> str:
    return f"driver=file,node-name=disk,filename={file},locking=off"


def _destroy(name: str) -> None:
    # A process that was killed leaves its device behind.
    if os.path.exists(f"/dev/vduse/{name}"):
        with open("/dev/vduse/control", "r+b", buffering=0) as control:
            fcntl.ioctl(control, DESTROY_DEV, name.encode().ljust(256, b"\0"))
