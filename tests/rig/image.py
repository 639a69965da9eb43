"""Disk images of the virtual machine: the tree itself, and what the product depends on."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

from .report import REPOSITORY, RigError, cache_folder, checked, locked, step
from .root import ensure_root, install_host_packages, peer_argv

FORMAT = 1
ROOT_SIZE = 3 << 30  # bytes; sparse, and what the guest writes goes to a snapshot
PYTHON = "3.13"  # the tree's
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux2014_x86_64", "manylinux_2_17_x86_64")


def root_image() -> Path:
    """Return the ext4 image of the whole tree, made if need be."""
    tree = ensure_root()
    image = tree.with_name(f"{tree.name}-{FORMAT}.ext4")
    with locked("image"):
        if not image.exists():
            with step(f"disk image of the tree ({image})"):
                _pack(tree, image, ROOT_SIZE)
    return image


def requirements() -> list[str]:
    """Return what the product says it needs at run time."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    return [str(requirement) for requirement in project["dependencies"]]


def python_image() -> Path:
    """Return the ext4 image with the product's dependencies, compiled for the tree's Python."""
    wanted = requirements()
    key = hashlib.sha256(repr((FORMAT, PYTHON, wanted)).encode()).hexdigest()[:12]
    image = cache_folder() / f"python-{key}.ext4"
    with locked("python"):
        if not image.exists():
            _check_python(ensure_root())
            with (
                step(f"Python packages for the guest: {', '.join(wanted)}"),
                tempfile.TemporaryDirectory(dir=cache_folder()) as name,
            ):
                _install(wanted, Path(name))
                compile_python(Path(name))
                size = sum(path.stat().st_size for path in Path(name).rglob("*"))
                _pack(Path(name), image, 2 * size + (16 << 20))
    return image


def compile_python(folder: Path) -> None:
    """Compile a folder's modules with the tree's Python: importing sources is slow under TCG."""
    checked(peer_argv(["python3", "-m", "compileall", "-q", "-j", "2", folder]))


def run_pip(arguments: Sequence[str]) -> None:
    """Run this interpreter's pip, which has this machine's settings."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    if subprocess.run([*pip, "--version"], capture_output=True, check=False).returncode:
        raise RigError(f"{sys.executable} has no pip: run `make venv`, or install python3-pip")
    checked([*pip, *arguments])


def _install(wanted: Sequence[str], folder: Path) -> None:
    platforms = [option for name in PLATFORMS for option in ("--platform", name)]
    run_pip(
        [
            *("install", "--target", str(folder), "--only-binary=:all:", "--no-compile"),
            *("--implementation", "cp", "--python-version", PYTHON, *platforms, *wanted),
        ]
    )


def _check_python(tree: Path) -> None:
    found = re.search(r"python(3\.\d+)", str((tree / "usr/bin/python3").readlink()))
    if found is None or found[1] != PYTHON:
        raise RigError(f"the tree's Python isn't {PYTHON}: set PYTHON in {__file__}")


def _pack(folder: Path, image: Path, size: int) -> None:
    install_host_packages()
    beside = image.with_name(f"{image.name}.new")
    beside.unlink(missing_ok=True)
    options = ["-q", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-d", str(folder)]
    checked(["mke2fs", *options, str(beside), f"{size >> 10}k"])
    beside.rename(image)
