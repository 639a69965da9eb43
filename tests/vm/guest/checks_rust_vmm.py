"""The small VMM in Rust, which pauses and migrates as cloud-hypervisor does, on vDPA devices."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from .checks_model import control
from .devices import block_device, serving, simulator_options, wait_until
from .vduse import vduse_block, vhost_user_block

PROGRAM = str(Path(__file__).parents[2] / "rust_vmm")
MOVES = 20 if os.environ.get("VHOST_BRIDGE_SOAK") else 4


class RustVmm:
    """One with a disk of one queue; see the program's source."""

    def __init__(self, socket: str) -> None:
        self._process = subprocess.Popen(
            [PROGRAM, socket, "1", "8"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Self:
        self._read("running")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def _read(self, line: str) -> None:
        assert self._process.stdout is not None
        assert (got := self._process.stdout.readline().rstrip()) == line, got

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def tell(self, command: str) -> None:
        """Give a command and wait until it is done."""
        self._send(command)
        self._read(f"{command}: done")

    def finish(self) -> None:
        """Have it compare everything that was written."""
        output, _ = self._process.communicate("end\n", timeout=300)
        assert self._process.returncode == 0, output
        counts = json.loads(output.splitlines()[-1])
        assert counts["writes"] > 100 and counts["verified"] == counts["reads"] > 100, counts


def move_between_simulators(*more: str) -> None:
    with (
        simulator_options("", block="shared_backend=1"),
        block_device("blk1"),
        block_device("blk2"),
        serving(("one", "vdpa:blk1"), more=more) as one,
        serving(("other", "vdpa:blk2"), more=more) as other,
        RustVmm(one.socket) as vmm,
    ):
        for _ in range(MOVES // 2):
            vmm.tell(f"migrate {other.socket}")
            vmm.tell(f"migrate {one.socket}")
        vmm.tell("cancel")
        vmm.finish()


def check_guest_moves_between_vdpa_devices() -> None:
    move_between_simulators()


def check_guest_moves_where_all_memory_is_sent_again() -> None:
    move_between_simulators("--dirty-log", "all")


def check_guest_moves_from_vduse_to_vhost_user_and_back() -> None:
    """VDUSE has no SUSPEND: it is let finish and reset."""
    with (
        vduse_block() as device,
        vhost_user_block(device.file) as socket,
        serving(("one", "vdpa:vd0")) as one,
        serving(("other", f"vhost-user:{socket}"), more=["--type", "block"]) as other,
        RustVmm(one.socket) as vmm,
    ):
        for _ in range(MOVES // 2):
            with control("one") as client:
                # The device starts a moment after the VMM has set it up.
                wait_until(lambda: client.status("one")[0].state == "running")
                vmm.tell("pause")
                assert client.status("one")[0].state == "suspended"
            before = device.file.read_bytes()
            time.sleep(0.2)
            assert device.file.read_bytes() == before
            vmm.tell("resume")
            vmm.tell(f"migrate {other.socket}")
            vmm.tell(f"migrate {one.socket}")
        vmm.finish()
