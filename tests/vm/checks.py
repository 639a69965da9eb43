"""Checks that run inside the virtual machine, as tests of this side: one test each."""

from __future__ import annotations

import ast
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.peers.build import build_peer, build_rust_peer
from tests.rig.accel import accelerator
from tests.rig.deb import build_deb, newer_deb
from tests.rig.image import compile_python
from tests.rig.job import Completed, Job
from tests.rig.report import REPOSITORY
from tests.rig.vm import Vm

GUEST = Path(__file__).parent / "guest"
ASKED = "/run/checks/asked"
FOLLOWING = ("blocks.py", "follow.py")  # how documents are read
PASSED_ON = ("VHOST_BRIDGE_SOAK",)
SECONDS = 1000.0  # for a check; the guest has deadlines of its own, which tell more


def checks_of(module: str) -> list[str]:
    """The names of a guest module's checks, in their order."""
    tree = ast.parse((GUEST / f"{module}.py").read_text())
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    return [name.removeprefix("check_") for name in functions if name.startswith("check_")]


@dataclass(slots=True)
class GuestChecks:
    """Runs checks: all that are wanted of a module in one process, a fork of the harness."""

    vm: Vm
    wanted: dict[str, list[str]]
    _results: dict[str, dict[str, str]] = field(default_factory=dict)
    _server: Job | None = None
    _asked: int = 0

    def __post_init__(self) -> None:
        # Through the share into memory, where Python can keep what it compiles.
        shutil.copytree(
            GUEST,
            self.vm.share_host / "tests/vm/guest",
            ignore=shutil.ignore_patterns("__pycache__"),
        )
        self._copy_documents()
        shutil.copy(build_peer("blkio_verify"), self.vm.share_host / "tests/blkio_verify")
        shutil.copy(build_rust_peer("rust_vmm"), self.vm.share_host / "tests/rust_vmm")
        if "checks_service" in self.wanted:
            self._give_packages(self.vm.share_host / "tests/packages")
        self.vm.run("mkdir -p /run/checks && cp -r /rig/tests /run/checks/")

    def _copy_documents(self) -> None:
        tests = self.vm.share_host / "tests"
        shutil.copytree(REPOSITORY / "docs", tests / "pages/docs")
        shutil.copy(REPOSITORY / "README.md", tests / "pages")
        (tests / "docs").mkdir()
        for name in FOLLOWING:
            shutil.copy(REPOSITORY / "tests/docs" / name, tests / "docs")

    # The product's Debian package, the same as a later version, and its compiled modules.
    def _give_packages(self, folder: Path) -> None:
        package = build_deb()
        for name in ("old", "new"):
            (folder / name).mkdir(parents=True)
        shutil.copy(package, folder / "old")
        version = package.name.split("_")[1]
        with tempfile.TemporaryDirectory() as work:
            shutil.copy(newer_deb(package, f"{version}+new", Path(work)), folder / "new")
            modules = Path(work, "tree/usr/lib/python3/dist-packages")
            compile_python(modules)
            for compiled in modules.rglob("__pycache__"):
                shutil.copytree(compiled, folder / "compiled" / compiled.relative_to(modules))

    def require(self, module: str, name: str) -> None:
        """Fail with what the guest said unless the check has passed."""
        if module not in self._results:
            self._results[module] = self._run(module, self.wanted[module])
        problem = self._results[module].get(name, "it did not get that far")
        if problem:
            raise AssertionError(problem)

    def _run(self, module: str, names: Sequence[str]) -> dict[str, str]:
        done = self.python(module, *[f"check_{name}" for name in names])
        results = {}
        for line in done.stdout.splitlines():
            result = json.loads(line)
            results[result["check"].removeprefix("check_")] = result["problem"]
        if done.returncode:
            for name in names:
                results.setdefault(name, f"the run ended with {done.returncode}:\n{done.stderr}")
        return results

    def python(self, module: str, *names: str) -> Completed:
        """Have the guest's harness run functions of a module."""
        server = self._server = self._server or self._start_server()
        number, self._asked = self._asked, self._asked + 1
        return self.vm.run(
            f"cd {ASKED} && echo {module} {' '.join(names)} >{number}.new && "
            f"mv {number}.new {number} && "
            f"until [ -e {number}.status ]; do "
            f"[ -d /proc/{server.pid} ] || exit 99; sleep 0.2; done; "
            f"cat {number}.out; cat {number}.err >&2; exit $(cat {number}.status)",
            timeout=SECONDS * len(names),
            check=False,
        )

    def _start_server(self) -> Job:
        self.vm.run(f"mkdir {ASKED}")
        env = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        if accelerator() == "tcg":
            env["EMULATED"] = "1"
        return self.vm.start(
            "cd /run/checks && exec env PYTHONPATH=/run/checks:$PYTHONPATH "
            f"python3 -m tests.vm.guest.harness {ASKED}",
            env=env,
        )
