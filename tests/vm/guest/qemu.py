"""A guest inside the guest: QEMU in the virtual machine, its firmware the driver.

A Linux kernel takes minutes to boot in an emulated machine in an emulated machine; see
bootsector.S for what runs instead.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .devices import sh

SOURCE = Path(__file__).with_name("bootsector.S")
FROM, TO, PIECE = 64, 0x10000, 32  # sectors
STARTED, COPIED, DONE, FAILED = "S.DF"
MACHINE = (
    *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none"),
    *("-machine", "pc,memory-backend=mem", "-accel", "tcg", "-m", "32M"),
    *("-object", "memory-backend-memfd,id=mem,size=32M,share=on"),
    *("-device", "isa-debugcon,iobase=0xe9,chardev=console"),
    *("-device", "vhost-user-blk-pci,chardev=blk,num-queues=1,bootindex=0"),
)


def boot_sector(count: int) -> bytes:
    """The guest that copies `count` pieces."""
    values = f"-DCOUNT={count} -DFROM={FROM} -DTO={TO}"
    sh(
        f"cd /tmp && gcc -m32 {values} -c -o boot.o {SOURCE} && "
        "ld -m elf_i386 -Ttext 0x7c00 --oformat binary -o boot.bin boot.o"
    )
    return Path("/tmp/boot.bin").read_bytes()


class NestedGuest:
    """QEMU that runs, by way of its monitor and what the guest says on its debug port."""

    def __init__(self, console: socket.socket, monitor: socket.socket) -> None:
        self.said = ""
        self._console = console
        self._monitor = monitor.makefile("rw")
        self._monitor.readline()
        self.execute("qmp_capabilities")

    def execute(self, command: str) -> Any:
        """A monitor command's result."""
        self._monitor.write(json.dumps({"execute": command}) + "\n")
        self._monitor.flush()
        while line := self._monitor.readline():
            answer = json.loads(line)
            assert "error" not in answer, answer
            if "return" in answer:
                return answer["return"]
        raise AssertionError(f"QEMU ended over {command}")

    def wait_copied(self, pieces: int, *, boots: int = 1) -> None:
        """Wait until so many pieces are copied, in the guest's boot of that number."""
        while self.said.count(STARTED) < boots or self.copied < pieces:
            self._listen()

    def wait_done(self) -> None:
        """Wait until the guest has copied all."""
        while not self.said.endswith(DONE):
            self._listen()

    def catch_up(self) -> None:
        """Take what the guest has said, without waiting for more."""
        while select.select([self._console], [], [], 0)[0]:
            self._listen()

    @property
    def copied(self) -> int:
        """How many pieces the guest has said it has copied since it last started."""
        return self.said.rpartition(STARTED)[2].count(COPIED)

    def _listen(self) -> None:
        try:
            heard = self._console.recv(4096).decode()
        except TimeoutError:
            raise AssertionError(f"the guest says no more than {self.said!r}") from None
        assert heard, f"QEMU ended; the guest had said {self.said!r}"
        self.said += heard
        assert FAILED not in heard, f"the guest failed: {self.said!r}"


@contextlib.contextmanager
def nested_guest(path: str, *, seconds: float = 40.0) -> Iterator[NestedGuest]:
    """A guest with shared memory that boots from the vhost-user-blk back-end at `path`.

    It may be silent for `seconds`. QEMU is told to quit, and must end with status 0.
    """
    with contextlib.ExitStack() as stack:
        console, far_console = (stack.enter_context(end) for end in socket.socketpair())
        monitor, far_monitor = (stack.enter_context(end) for end in socket.socketpair())
        console.settimeout(seconds)
        monitor.settimeout(seconds)
        log = stack.enter_context(open("/tmp/nested.log", "w+", encoding="utf-8"))
        argv = [
            *MACHINE,
            *("-chardev", f"socket,id=console,fd={far_console.fileno()}"),
            *("-chardev", f"socket,id=monitor,fd={far_monitor.fileno()}"),
            *("-mon", "chardev=monitor,mode=control"),
            *("-chardev", f"socket,id=blk,path={path}"),
        ]
        ends = [far_console.fileno(), far_monitor.fileno()]
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=ends
        )
        far_console.close()
        far_monitor.close()
        try:
            guest = NestedGuest(console, monitor)
            yield guest
            guest.execute("quit")
            assert process.wait(seconds) == 0, process.returncode
        except BaseException as error:
            log.seek(0)
            error.add_note(f"QEMU said: {log.read()[-3000:]}")
            raise
        finally:
            process.kill()
            process.wait()
