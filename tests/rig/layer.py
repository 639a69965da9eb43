"""Packages that few tests need, unpacked into a folder that lies over the tree while those run.

In the tree itself they would bring services that start in the virtual machine.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from .report import cache_folder, checked, locked, step
from .root import SUITE, extract

LIBVIRT = ("libvirt-clients", "libvirt-daemon", "libvirt-daemon-driver-qemu")
FORMAT = 1


def libvirt_layer() -> Path:
    """Return libvirt's folder, made if need be."""
    digest = hashlib.sha256(repr((FORMAT, SUITE, LIBVIRT)).encode()).hexdigest()[:12]
    folder = cache_folder() / f"libvirt-{digest}"
    with locked("libvirt"):
        if not folder.is_dir():
            beside = folder.with_name(f"{folder.name}.new")
            checked(["rm", "-rf", "--one-file-system", str(beside)])
            with step(f"libvirt ({folder})"):
                extract(LIBVIRT, beside)
                # A link in the tree, which a folder would hide.
                checked(["rm", "-rf", str(beside / "var/run")])
            beside.rename(folder)
    return folder
