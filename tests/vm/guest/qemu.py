"""A guest inside the guest: QEMU in the virtual machine, its firmware the driver.

A Linux kernel takes minutes to boot in an emulated machine in an emulated machine; see
bootsector.S for what runs instead.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .devices import sh

SOURCE = Path(__file__).with_name("bootsector.S")
FROM, TO, PIECE = 64, 0x10000, 32  # sectors


def boot_sector(count: int) -> bytes:
    """The guest that copies `count` pieces."""
    values = f"-DCOUNT={count} -DFROM={FROM} -DTO={TO}"
    sh(
        f"cd /tmp && gcc -m32 {values} -c -o boot.o {SOURCE} && "
        "ld -m elf_i386 -Ttext 0x7c00 --oformat binary -o boot.bin boot.o"
    )
    return Path("/tmp/boot.bin").read_bytes()


class NestedGuest:
    """QEMU that runs, by way of its monitor and the guest's serial port."""

    def __init__(self, serial: socket.socket, monitor: socket.socket) -> None:
        self._serial = serial
        self._monitor = monitor.makefile("rw")
        self._monitor.readline()
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: object) -> Any:
        """A monitor command's result."""
        self._monitor.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._monitor.flush()
        while True:
            answer = json.loads(self._monitor.readline())
            assert "error" not in answer, answer
            if "return" in answer:
                return answer["return"]

    def wait_done(self) -> None:
        """Wait until the guest has copied all."""
        said = self._serial.recv(1)
        assert said == b"D", f"the guest said {said!r}"


@contextlib.contextmanager
def nested_guest(path: str, *, seconds: float = 60.0) -> Iterator[NestedGuest]:
    """A guest with shared memory that boots from the vhost-user-blk back-end at `path`."""
    with contextlib.ExitStack() as stack:
        pairs = [socket.socketpair() for _ in range(2)]
        (serial, far_serial), (monitor, far_monitor) = pairs
        for end in (*pairs[0], *pairs[1]):
            stack.enter_context(end).settimeout(seconds)
        for end in (far_serial, far_monitor):
            end.setblocking(True)
        log = stack.enter_context(open("/tmp/nested.log", "w+", encoding="utf-8"))
        argv = [
            *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none"),
            *("-machine", "pc,memory-backend=mem", "-accel", "tcg", "-m", "64M"),
            *("-object", "memory-backend-memfd,id=mem,size=64M,share=on"),
            *("-chardev", f"socket,id=serial,fd={far_serial.fileno()}"),
            *("-device", "isa-serial,chardev=serial"),
            *("-chardev", f"socket,id=monitor,fd={far_monitor.fileno()}"),
            *("-mon", "chardev=monitor,mode=control"),
            *("-chardev", f"socket,id=blk,path={path}"),
            *("-device", "vhost-user-blk-pci,chardev=blk,num-queues=1,bootindex=0"),
        ]
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[far_serial.fileno(), far_monitor.fileno()],
        )
        for end in (far_serial, far_monitor):
            end.close()
        try:
            yield NestedGuest(serial, monitor)
        except BaseException as error:
            log.seek(0)
            error.add_note(f"QEMU said: {log.read()[-3000:]}")
            raise
        finally:
            process.kill()
            process.wait()
