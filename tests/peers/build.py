"""Small C peers, a folder each, compiled with the tree's compiler and cached by their content."""

from __future__ import annotations

import hashlib
from pathlib import Path

from tests.rig.report import cache_folder, checked, locked, step
from tests.rig.root import peer_argv, root_folder

COMPILER = ("gcc", "-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-Werror", "-pthread")
LIBRARIES = {"blkio_verify": ("-lblkio",)}


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
