"""A small VMM in Rust, with the vhost-user library and the order of cloud-hypervisor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.rig.root import peer_argv

from .build import build_rust_peer
from .process import Process


class RustVmm(Process):
    """One whose guest writes and reads at random on the disk at `socket`, and compares.

    Its migrations are to another device on the same disk, in the same process: what the guest has
    in memory afterwards is what the dirty log, and the guest's own writes, said that must be sent.
    """

    def __init__(self, socket: Path, *, queues: int = 1, depth: int = 8) -> None:
        argv: list[str | Path] = [build_rust_peer("rust_vmm"), socket, str(queues), str(depth)]
        super().__init__(peer_argv(argv, die_with_parent=True), name="rust_vmm")
        self._seen = 0

    def __enter__(self) -> RustVmm:
        super().__enter__()
        self._wait_for("running")
        return self

    def _wait_for(self, line: str) -> None:
        self._seen = self.wait_for_output(f"{line}\n", 60, start=self._seen)

    def tell(self, command: str) -> None:
        """Have it `pause`, `resume`, `reset`, `cancel` a migration, or `migrate SOCKET`.

        Raises:
            AssertionError: it failed, or data was not right.
        """
        self.send(f"{command}\n")
        self._wait_for(f"{command}: done")

    def finish(self) -> dict[str, Any]:
        """Have it read everything once more; how many requests there were.

        Raises:
            AssertionError: data was not right, or a request was lost or done twice.
        """
        self.send("end\n")
        status = self.wait(120)
        assert status == 0, self.output[-2000:]
        counts: dict[str, Any] = json.loads(self.output.splitlines()[-1])
        return counts
