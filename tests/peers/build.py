"""Small C peers, compiled with the tree's compiler and cached by their content."""

from __future__ import annotations

import hashlib
from pathlib import Path

from tests.rig.report import cache_folder, checked, locked, step
from tests.rig.root import peer_argv, root_folder

COMPILER = ("gcc", "-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-Werror", "-pthread")
LIBRARIES = {"blkio_verify.c": ("-lblkio",)}


def build_peer(name: str) -> Path:
    """Return the binary of a C file of this folder, compiled if none of the same is cached.

    It runs in the tree (`peer_argv([binary, ...])`), and in the virtual machine, which has the
    same libraries: there put a copy on the share.
    """
    source = Path(__file__).with_name(name)
    command = (*COMPILER, *LIBRARIES.get(name, ()))
    recipe = repr((root_folder().name, command)).encode() + source.read_bytes()
    digest = hashlib.sha256(recipe).hexdigest()[:12]
    binary = cache_folder() / f"{source.stem}-{digest}"
    with locked(source.stem):
        if not binary.exists():
            beside = binary.with_name(f"{binary.name}.new")
            libraries = command[len(COMPILER) :]
            with step(f"compiling {name}"):
                checked(peer_argv([*COMPILER, "-o", beside, source, *libraries]))
            beside.rename(binary)
    return binary
