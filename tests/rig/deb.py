"""The product's Debian packages, built in the tree, whose debhelper makes them."""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from email.utils import formatdate
from pathlib import Path

from .image import requirements, run_pip
from .product import copy_sources, digest_of
from .report import REPOSITORY, RigError, cache_folder, checked, locked, say, step
from .root import ensure_root, peer_argv

# What the packages have besides the wheel's sources.
FILES = ("CHANGELOG.md", "SECURITY.md", "docs", "packaging")
MAINTAINER = re.compile(r"^Maintainer: (.+)$", re.MULTILINE)
VERSION = re.compile(r'^__version__ = "(.+)"$', re.MULTILINE)

# What Debian 12 has not new enough; without parts in C, so one package is for every Python.
OLD_IN_DEBIAN_12 = ("cbor2", "pyroute2", "trio")
PURE = ("--only-binary=:all:", "--platform=any", "--implementation=py", "--abi=none")


def build_debs() -> Path:
    """Return the folder of the working tree's packages, built if none of the same are cached."""
    folder = cache_folder() / f"deb-{ensure_root().name.partition('-')[2]}-{digest_of(*FILES)}"
    with locked("deb"):
        if not folder.is_dir():
            with (
                step("Debian packages of the working tree"),
                tempfile.TemporaryDirectory(dir=cache_folder()) as name,
            ):
                _build(Path(name) / "source")
                result = Path(name) / "result"
                result.mkdir()
                for package in Path(name).glob("vhost-bridge*.deb"):
                    package.rename(result / package.name)
                result.rename(folder)
    return folder


def build_deb() -> Path:
    """Return the product's own package."""
    (package,) = build_debs().glob("vhost-bridge_*.deb")
    return package


def newer_deb(package: Path, version: str, folder: Path) -> Path:
    """Return the same package as a later version, which it also says of itself, in `folder`."""
    tree = folder / "tree"
    checked(peer_argv(["dpkg-deb", "--raw-extract", package, tree]))
    control = tree / "DEBIAN/control"
    control.write_text(re.sub(r"(?m)^Version: .+$", f"Version: {version}", control.read_text()))
    init = tree / "usr/lib/python3/dist-packages/vhostbridge/__init__.py"
    init.write_text(VERSION.sub(f'__version__ = "{version}"', init.read_text()))
    result = folder / f"vhost-bridge_{version}_amd64.deb"
    build: list[str | Path] = ["dpkg-deb", "--root-owner-group", "-Znone", "--build", tree, result]
    checked(peer_argv(build))
    return result


def _build(source: Path) -> None:
    copy_sources(source, *FILES)
    debian = source / "debian"
    shutil.copytree(source / "packaging/debian", debian)
    for unit in (source / "packaging/systemd").iterdir():
        shutil.copy(unit, debian / unit.name)
    _write_changelog(source)
    wanted = [one for one in requirements() if one.startswith(OLD_IN_DEBIAN_12)]
    for_python = ["--python-version", "3.11", "--no-compile", "--target", str(debian / "python")]
    run_pip(["install", *PURE, *for_python, *wanted])
    shutil.rmtree(debian / "python/bin", ignore_errors=True)
    # All that it is built with is in the tree; it lacks a part of build-essential, C++.
    command = 'cd "$1" && exec dpkg-buildpackage --build=binary --no-sign --no-check-builddeps'
    checked(peer_argv(["sh", "-c", command, "sh", source]))


def _write_changelog(source: Path) -> None:
    version = VERSION.search((source / "vhostbridge/__init__.py").read_text())
    maintainer = MAINTAINER.search((source / "debian/control").read_text())
    if version is None or maintainer is None:
        raise RigError("the sources have no version, or the package no maintainer")
    date = formatdate((REPOSITORY / "CHANGELOG.md").stat().st_mtime)
    (source / "debian/changelog").write_text(
        f"vhost-bridge ({version[1]}) unstable; urgency=medium\n\n"
        "  * /usr/share/doc/vhost-bridge/CHANGELOG.md says what changed.\n\n"
        f" -- {maintainer[1]}  {date}\n"
    )


def main() -> int:
    """Build the packages into a folder: ``python -m tests.rig.deb FOLDER``."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "dist")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for package in sorted(build_debs().iterdir()):
            print(shutil.copy(package, folder))
    except RigError as error:
        say(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
