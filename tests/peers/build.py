"""Small peers of our own, a folder each, compiled with Debian's compilers and cached by content."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path

from tests.rig.layer import rust
from tests.rig.report import cache_folder, checked, locked, step
from tests.rig.root import peer_argv, root_folder

COMPILER = ("gcc", "-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-Werror", "-pthread")
LIBRARIES = {"blkio_verify": ("-lblkio",)}
# Debian's libraries lie where crates.io would be.
CARGO = """
[source.crates-io]
replace-with = "debian"
[source.debian]
directory = "/usr/share/cargo/registry"
[build]
rustflags = ["-D", "warnings", "-C", "linker=gcc"]
"""


def build_peer(name: str) -> Path:
    """Return the binary of a folder of C files, compiled if none of the same is cached.

    It runs in the tree (`peer_argv([binary, ...])`), and in the virtual machine, which has the
    same libraries: there put a copy on the share.
    """
    folder = Path(__file__).with_name(name)
    sources, libraries = sorted(folder.glob("*.c")), LIBRARIES.get(name, ())
    recipe = hashlib.sha256(repr((root_folder().name, COMPILER, libraries)).encode())
    for file in sorted(folder.glob("*.[ch]")):
        recipe.update(file.read_bytes())
    binary = cache_folder() / f"{name}-{recipe.hexdigest()[:12]}"
    with locked(name):
        if not binary.exists():
            beside = binary.with_name(f"{binary.name}.new")
            with step(f"compiling {name}"):
                checked(peer_argv([*COMPILER, "-o", beside, *sources, *libraries]))
            beside.rename(binary)
    return binary


def build_rust_peer(name: str) -> Path:
    """Return the binary of a Rust package, built if none of the same is cached.

    It runs in the tree, as others do.
    """
    folder, tree = Path(__file__).with_name(name), rust()
    recipe = hashlib.sha256(repr((tree.name, CARGO)).encode())
    for file in sorted([*folder.glob("*.toml"), *folder.glob("src/*.rs")]):
        recipe.update(file.read_bytes())
    binary = cache_folder() / f"{name}-{recipe.hexdigest()[:12]}"
    with locked(name):
        if not binary.exists():
            with step(f"compiling {name}"), tempfile.TemporaryDirectory(dir=cache_folder()) as work:
                copy = Path(work, "source")
                shutil.copytree(folder, copy)
                Path(work, "config.toml").write_text(CARGO)
                command = f"cd {copy} && CARGO_HOME={work} cargo build --release --offline"
                checked(peer_argv(["sh", "-c", command], root=tree))
                Path(copy, "target/release", name).rename(binary)
    return binary
