"""A host of its own for the commands of a guide: they run as they are written.

Its /run and /srv are empty and private, and so are its processes and its network. Programs that
this machine lacks are those of the rig's tree, called by their names; what they write there is gone
afterwards. Everything else is this machine's.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.rig.report import REPOSITORY, cache_folder
from tests.rig.root import INSIDE_PATH, ensure_root

from .process import Process

#: Folders that are the place's own, here and in the tree.
PRIVATE = ("run", "srv")
SHARED = ("dev", "proc", "sys", "tmp")
TREE_PROGRAMS = (
    *("qemu-system-x86_64", "qemu-storage-daemon", "qemu-img", "qemu-io", "virtiofsd"),
    *("dpdk-testpmd", "libvirtd", "virtlogd", "virsh", "virt-xml-validate", "varlinkctl"),
    *("ovs-vsctl", "ovs-vswitchd", "ovsdb-server", "ovsdb-tool"),
)
# Process 1 of the place. It waits for all that it inherits, as libvirt expects of one.
INIT = 'sh -c "$SETUP" && echo ready && while :; do sleep 1000 & wait; done'


class Place:
    """The place, for the length of a `with` block; whatever runs in it ends with it.

    With `layer` that folder lies over the tree.
    """

    def __init__(self, layer: Path | None = None) -> None:
        self._layer = layer
        self.folder = Path(tempfile.mkdtemp(prefix="vb-place-"))
        self._programs = self.folder / "programs"
        self._init: Process | None = None

    def __enter__(self) -> Self:
        tree = ensure_root()
        for name in (*PRIVATE, "tree", "upper", "work", "programs"):
            (self.folder / name).mkdir()
        for name in TREE_PROGRAMS:
            self._make_program(name, self.folder / "tree")
        self._init = Process(
            [
                *("setpriv", "--pdeathsig", "KILL"),
                *("unshare", "--mount", "--propagation", "private"),
                *("--net", "--pid", "--fork", "--kill-child", "--mount-proc"),
                *("sh", "-c", INIT),
            ],
            name="place",
            env={"SETUP": self._setup(tree)},
        )
        try:
            self._init.wait_for_output("ready")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._init is not None:
            self._init.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def path(self, name: str) -> Path:
        """Where this machine finds a file of the place, such as `/run/vm1.sock`."""
        return self.folder / name.lstrip("/")

    def argv(self, command: str | Sequence[str]) -> list[str]:
        """What runs a command there; a string is the shell's."""
        assert self._init is not None
        inner = ["sh", "-c", command] if isinstance(command, str) else list(command)
        path = f"{self._programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        # nsenter's child is the program; unshare's is the place's first process.
        return [
            *("nsenter", "--target", str(self._first()), "--mount", "--net", "--pid"),
            *("env", "-C", "/srv", f"PATH={path}", f"TREE={self.folder / 'tree'}", *inner),
        ]

    def start(
        self,
        command: str | Sequence[str],
        *,
        pass_fds: Sequence[int] = (),
        env: Mapping[str, str] | None = None,
    ) -> Process:
        """Start a command; it ends with the place, or by its own pid."""
        return Process(
            self.argv(command), name=str(command)[:40], pass_fds=pass_fds, env=env, children=True
        )

    def run(self, command: str, timeout: float = 60) -> str:
        """Run a line of shell and return what it wrote.

        Raises:
            AssertionError: it failed.
        """
        with self.start(command) as process:
            status = process.wait(timeout)
            assert status == 0, f"`{command}` ended with {status}: {process.output}"
            return process.output

    def _first(self) -> int:
        assert self._init is not None
        deadline = time.monotonic() + 20
        children = Path(f"/proc/{self._init.pid}/task/{self._init.pid}/children")
        while not (found := children.read_text().split()):
            assert time.monotonic() < deadline, "the place has no process"
        return int(found[0])

    def _setup(self, tree: Path) -> str:
        return " && ".join(self._mounts(tree))

    def _mounts(self, below: Path) -> Iterator[str]:
        def mount(*arguments: str | Path) -> str:
            return shlex.join(["mount", "-n", *map(str, arguments)])

        tree = self.folder / "tree"
        layers = ":".join(str(path) for path in (self._layer, below) if path is not None)
        yield "ip link set lo up"
        upper = f"upperdir={self.folder / 'upper'},workdir={self.folder / 'work'}"
        yield mount("-t", "overlay", "overlay", "-o", f"lowerdir={layers},{upper}", tree)
        for name in PRIVATE:
            yield mount("--bind", self.folder / name, Path("/", name))
            yield mount("--bind", self.folder / name, tree / name)
        shared = [Path("/", name) for name in SHARED] + [REPOSITORY, cache_folder()]
        for path in shared:
            if not any(other in path.parents for other in shared):
                inside = tree / path.relative_to("/")
                yield shlex.join(["mkdir", "-p", str(inside)])
                yield mount("--rbind", path, inside)

    def _make_program(self, name: str, tree: Path) -> None:
        enter = 'cd "$1" 2>/dev/null; shift; exec "$@"'
        argv = ["chroot", str(tree), "/usr/bin/env", f"PATH={INSIDE_PATH}", "LC_ALL=C.UTF-8"]
        inner = [*argv, "sh", "-c", enter, "sh"]
        file = self._programs / name
        file.write_text(f'#!/bin/sh\nexec {shlex.join(inner)} "$PWD" {name} "$@"\n')
        file.chmod(0o755)
