"""What users install: the wheel, built from the sdist, in an environment of its own."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*argv: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [str(arg) for arg in argv], cwd=cwd, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{argv}: {done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that ``build`` makes from the sdist, from a clean copy of the tree."""
    folder = tmp_path_factory.mktemp("build")
    tree = folder / "tree"
    files = run("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).splitlines()
    for name in files:
        if (ROOT / name).exists():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name, follow_symlinks=False)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", tree)
    (built,) = (folder / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment's ``bin`` with the wheel in it."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    pip = folder / "bin/pip"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    run(pip, "install", "-q", wheel, *project["dependency-groups"]["test"])
    return folder / "bin"


def test_wheel_has_one_top_level_name_and_is_for_every_python(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"vhostbridge"}
    assert "vhostbridge/py.typed" in names
    assert "vhostbridge/native/_native.abi3.so" in names
    assert "cp311-abi3" in wheel.name


def test_command_and_module_run_from_the_wheel(environment: Path, tmp_path: Path) -> None:
    as_command = run(environment / "vhost-bridge", "--version", cwd=tmp_path)
    as_module = run(environment / "python", "-m", "vhostbridge", "--version", cwd=tmp_path)
    assert as_command == as_module
    assert as_command.startswith("vhost-bridge ")


def test_list_from_the_wheel_reaches_the_kernel(environment: Path, tmp_path: Path) -> None:
    assert "{" in run(environment / "vhost-bridge", "list", "-j", cwd=tmp_path)


# They need all that a wheel could lack: the extension, the varlink file, every package.
UNIT = ("cli", "native", "shadow_rings", "session_running", "varlink_server", "trace_show")


def test_unit_tests_pass_against_the_wheel(environment: Path, tmp_path: Path) -> None:
    """The tree has no compiled extension here, so it is the wheel's code that is tested."""
    shutil.copytree(ROOT / "tests", tmp_path / "tests")
    shutil.copytree(ROOT / "packaging", tmp_path / "packaging")
    shutil.copy2(ROOT / "pyproject.toml", tmp_path)
    path = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"}
    files = [f"tests/unit/test_{name}.py" for name in UNIT]
    output = run(environment / "pytest", "-q", *files, cwd=tmp_path, env=path)
    assert " passed" in output


EVERY_MODULE = """
import pkgutil, vhostbridge
for module in pkgutil.walk_packages(vhostbridge.__path__, "vhostbridge."):
    if not module.name.endswith(("__main__", ".ffi_build")):
        print(__import__(module.name, fromlist=["x"]).__name__)
"""


def test_every_module_of_the_tree_is_in_the_wheel(environment: Path, tmp_path: Path) -> None:
    there = run(environment / "python", "-c", EVERY_MODULE, cwd=tmp_path).split()
    for package in ("backends", "bridge", "cli"):
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(("vhostbridge", *parts)).removesuffix(".__init__")
            assert name in there or name.endswith("__main__"), name
