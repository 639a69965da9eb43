"""The product under test: its wheel, built from the working tree, and the folder for the guest."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from .image import compile_python, run_pip
from .report import REPOSITORY, RigError, cache_folder, locked, step

# What a wheel is made of. A copy is built, so that no left-overs of other builds get in.
SOURCES = (
    *("backends", "bridge", "native", "vhostbridge", "cli"),
    *("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"),
)
LEFT_OVERS = shutil.ignore_patterns("__pycache__", "*.so", "*.o", "_native.c")

SCRIPT = """\
#!/bin/sh
exec python3 -m vhostbridge "$@"
"""


def build_wheel() -> Path:
    """Return the wheel of the working tree as it is now, built if none of the same is cached."""
    folder = cache_folder() / f"wheel-{digest_of()}"
    with locked("wheel"):
        if not folder.is_dir():
            with (
                step("wheel of the working tree"),
                tempfile.TemporaryDirectory(dir=cache_folder()) as name,
            ):
                copy_sources(Path(name) / "source")
                isolation = ["--no-build-isolation"] if _can_build() else []
                wheels = ["--no-deps", "--wheel-dir", f"{name}/wheel", f"{name}/source"]
                run_pip(["wheel", *isolation, *wheels])
                (Path(name) / "wheel").rename(folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


def install_for_guest(wheel: Path, folder: Path) -> None:
    """Unpack a wheel into `folder`, compiled, with the command in `folder`/bin."""
    with zipfile.ZipFile(wheel) as archive:
        if any(".data/" in name for name in archive.namelist()):
            raise RigError(f"{wheel.name} has files for outside the package: unpacking won't do")
        archive.extractall(folder)
    compile_python(folder)
    script = folder / "bin" / "vhost-bridge"
    script.parent.mkdir()
    script.write_text(SCRIPT)
    script.chmod(0o755)


def _can_build() -> bool:
    # As [build-system] in pyproject.toml says; without these pip fetches them by itself.
    try:
        setuptools, cffi = metadata.version("setuptools"), metadata.version("cffi")
    except metadata.PackageNotFoundError:
        return False
    return int(setuptools.split(".")[0]) >= 77 and bool(cffi)


def digest_of(*more: str) -> str:
    """Return what tells the sources, and `more` of the repository's files, from others."""
    digest = hashlib.sha256()
    for path in _files(*more):
        content = bytes(path.readlink()) if path.is_symlink() else path.read_bytes()
        digest.update(f"{path.relative_to(REPOSITORY)} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]


def copy_sources(folder: Path, *more: str) -> None:
    """Copy the sources, and `more` of the repository's files and folders, without left-overs."""
    for path in _files(*more):
        copy = folder / path.relative_to(REPOSITORY)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy, follow_symlinks=False)


def _files(*more: str) -> Iterator[Path]:
    for name in (*SOURCES, *more):
        top = REPOSITORY / name
        for path in (top, *sorted(top.rglob("*"))) if top.is_dir() else (top,):
            ignored = LEFT_OVERS(str(path.parent), [*path.relative_to(REPOSITORY).parts])
            if not ignored and (path.is_symlink() or path.is_file()):
                yield path
