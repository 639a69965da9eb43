"""``python -m tests.rig``: prepare the rig, look at it, work in the virtual machine by hand."""

from __future__ import annotations

import argparse
import subprocess
import sys

from .accel import accelerator
from .image import python_image, root_image
from .job import VmLost
from .kernel import kernel_release
from .layer import libvirt_layer, newer_qemu, open_vswitch_layer, rust
from .product import build_wheel
from .report import RigError, cache_folder, checked, say, step
from .root import ensure_root, install_host_packages, peer_argv, root_folder
from .vm import Vm

INTERRUPTED_STATUS = 130
LOST_STATUS = 128  # the machine was lost; a command's own status is passed on
PACKAGES = ("qemu-system-x86", "virtiofsd", "libblkio1", "nbdkit", "dpdk", "fio", "passt")


def setup() -> int:
    """Make all that is cached, and boot once."""
    install_host_packages()
    with step("the rig's cached parts"):
        ensure_root()
        accelerator()
        root_image()
        python_image()
        libvirt_layer()
        open_vswitch_layer()
        newer_qemu()
        rust()
        build_wheel()
    return run(["true"])


def run(command: list[str]) -> int:
    """Boot, run a command (or, without one, a shell on this terminal), return its status."""
    with Vm(wheel=build_wheel()) as vm:
        say(f"booted in {vm.boot_seconds:.1f} s; files are shared at {vm.share_host}")
        if not command:
            return vm.shell()
        done = vm.run(command, timeout=3600, check=False)
    sys.stdout.write(done.stdout)
    sys.stderr.write(done.stderr)
    return done.returncode


def doctor() -> int:
    """Print what the rig is made of."""
    root = ensure_root()
    print(f"cache: {cache_folder()}")
    print(f"tree: {root}")
    print(f"accelerator: {accelerator()}")
    print(f"guest kernel: {kernel_release(root)}", flush=True)
    query = ["dpkg-query", "--show", "--showformat=${Package}: ${Version}\n"]
    return subprocess.run(peer_argv([*query, *PACKAGES]), check=False).returncode


def clean() -> int:
    """Remove what the cache holds of other recipes than the current, and all wheels."""
    current = root_folder().name
    for path in [*cache_folder().glob("root-*"), *cache_folder().glob("wheel-*")]:
        if not path.name.startswith(current):
            say(f"removing {path}")
            checked(["rm", "-rf", "--one-file-system", str(path)])
    return 0


def main() -> int:
    """Parse the command line and do as it says."""
    parser = argparse.ArgumentParser(prog="python -m tests.rig", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("setup", help="make everything that is cached, and boot once")
    verbs.add_parser("shell", help="a shell in the virtual machine, on this terminal")
    verbs.add_parser("doctor", help="print the accelerator and the versions of the parts")
    verbs.add_parser("clean", help="remove cached parts of older recipes")
    one = verbs.add_parser("run", help="boot, run a command, end with its status")
    one.add_argument("command", nargs=argparse.REMAINDER)
    chosen = parser.parse_args()
    try:
        match chosen.verb:
            case "setup":
                return setup()
            case "doctor":
                return doctor()
            case "clean":
                return clean()
            case _:
                return run(getattr(chosen, "command", []))
    except KeyboardInterrupt:
        return INTERRUPTED_STATUS
    except RigError as error:
        say(str(error))
        return 1
    except VmLost as error:
        say(str(error))
        return LOST_STATUS


if __name__ == "__main__":
    sys.exit(main())
