"""KVM where a kernel truly boots under it, QEMU's own emulation (TCG) otherwise."""

from __future__ import annotations

import functools
import os
import subprocess
from pathlib import Path

from .kernel import kernel_release
from .report import RigError, cache_folder, say
from .root import ensure_root, peer_argv

# With ERMS the kernel clears and copies by `rep stosb`, which is emulated byte by byte.
ACCELERATORS = {
    "kvm": ("-accel", "kvm", "-cpu", "host"),
    "tcg": ("-accel", "tcg,thread=multi", "-cpu", "max,erms=off,fsrm=off"),
}
PROBE_SECONDS = 20
# A kernel that has no root file system comes this far, and ends.
PROBE_END = b"Kernel panic - not syncing: VFS"


@functools.cache
def accelerator() -> str:
    """Return "kvm" or "tcg": what VHOST_BRIDGE_ACCEL says, or else what works here."""
    chosen = os.environ.get("VHOST_BRIDGE_ACCEL", "")
    if chosen:
        if chosen not in ACCELERATORS:
            raise RigError(f"VHOST_BRIDGE_ACCEL is {chosen!r}: wanted is kvm or tcg")
        return chosen
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        say("no /dev/kvm: the virtual machine is emulated (TCG), which is slow")
        return "tcg"
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    answer = cache_folder() / f"accel-{boot}"
    if not answer.exists():
        beside = answer.with_name(f"{answer.name}.{os.getpid()}")
        beside.write_text("kvm" if _kvm_boots() else "tcg")
        beside.rename(answer)
    found = answer.read_text()
    if found == "tcg":
        say("KVM doesn't boot a kernel here: the virtual machine is emulated (TCG), which is slow")
    return found


def _kvm_boots() -> bool:
    kernel = ensure_root() / "boot" / f"vmlinuz-{kernel_release(ensure_root())}"
    argv: list[str | Path] = [
        *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-no-reboot"),
        *("-display", "none", "-machine", "q35", "-m", "512", *ACCELERATORS["kvm"]),
        *("-serial", "stdio", "-kernel", kernel, "-append", "console=ttyS0 panic=-1"),
    ]
    try:
        done = subprocess.run(
            peer_argv(argv, die_with_parent=True),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=PROBE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    return PROBE_END in done.stdout
