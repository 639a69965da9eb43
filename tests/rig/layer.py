"""Packages that few tests need, unpacked into a folder beside the tree.

In the tree itself libvirt's would bring services that start in the virtual machine, and another
version of QEMU would take the place of the one there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from .report import cache_folder, checked, locked, step
from .root import SUITE, extract

BACKPORTS = f"{SUITE}-backports"
LIBVIRT = ("libvirt-clients", "libvirt-daemon", "libvirt-daemon-driver-qemu")
OPEN_VSWITCH = ("openvswitch-switch-dpdk",)
NEWER_QEMU = ("base-files", "dash", "qemu-system-x86")
RUST = ("base-files", "dash", "coreutils", "cargo", "gcc", "libc6-dev", "librust-vhost-dev")
FORMAT = 1


def libvirt_layer() -> Path:
    """Return libvirt's folder, made if need be; it lies over the tree while it is used."""
    return _folder("libvirt", LIBVIRT, SUITE)


def open_vswitch_layer() -> Path:
    """Return the folder of Open vSwitch with DPDK, made if need be, as libvirt's is."""
    return _folder("openvswitch", OPEN_VSWITCH, SUITE)


def newer_qemu() -> Path:
    """Return a tree of its own for the newest QEMU that is packaged for this suite (11.1 or later),
    made if need be.
    """
    return _folder("qemu", NEWER_QEMU, BACKPORTS)


def rust() -> Path:
    """Return a tree of its own that builds what speaks vhost-user by rust-vmm's library."""
    return _folder("rust", RUST, SUITE)


def _folder(name: str, packages: Sequence[str], suite: str) -> Path:
    digest = hashlib.sha256(repr((FORMAT, suite, packages)).encode()).hexdigest()[:12]
    folder = cache_folder() / f"{name}-{digest}"
    with locked(name):
        if not folder.is_dir():
            beside = folder.with_name(f"{folder.name}.new")
            checked(["rm", "-rf", "--one-file-system", str(beside)])
            with step(f"{name} from {suite} ({folder})"):
                extract(packages, beside, suite)
                # A link in the tree, which a folder would hide.
                checked(["rm", "-rf", str(beside / "var/run")])
            beside.rename(folder)
    return folder
