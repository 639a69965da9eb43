"""One Debian trixie tree that holds every peer, and the way to run a program from it.

The host stays what it is (a plain Debian 12): peers run with the tree as their root, in a mount
namespace of their own where /dev, /proc, /sys, /tmp, the repository and the cache have the same
paths as outside. Sockets, memory and process ids are therefore shared with the host.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from . import kernel
from .report import REPOSITORY, RigError, cache_folder, checked, locked, step

FORMAT = 1  # raise when the tree must be made anew though nothing below has changed

SUITE = "trixie"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
SUITE_KEY = Path(f"/usr/share/keyrings/debian-archive-{SUITE}-stable.gpg")

HOST_PACKAGES = (
    *("debian-archive-keyring", "e2fsprogs", "iproute2", "jq", "mmdebstrap", "util-linux"),
)

PACKAGES = (
    # front-ends and back-ends
    *("qemu-system-x86", "qemu-utils", "qemu-block-extra", "virtiofsd", "passt"),
    *("libblkio1", "libblkio-dev", "nbdkit", "libnbd-bin", "fio"),
    *("dpdk", "dpdk-dev", "librte-mempool-ring25", "librte-net-vhost25", "librte-net-virtio25"),
    # the virtual machine
    *("linux-image-cloud-amd64", "busybox-static", "e2fsprogs", "iproute2", "kmod", "procps"),
    *("python3", "python3-venv", "socat", "strace"),
    # what builds kernel modules and small C peers
    *("linux-headers-cloud-amd64", "linux-source", "gcc", "libc6-dev", "make", "patch", "xz-utils"),
    # what builds the Debian package, what it depends on, and what starts it
    *("debhelper", "dh-python", "pybuild-plugin-pyproject", "python3-dev", "python3-cffi"),
    *("python3-cbor2", "python3-click", "python3-pyroute2", "python3-setuptools", "python3-trio"),
    *("systemd", "udev"),
)
# No initrd is wanted, and static libraries and texts are most of what DPDK and others install.
EXCLUDED = (
    *("/etc/kernel/postinst.d/*", "/usr/share/doc/*", "/usr/share/info/*", "/usr/share/man/*"),
    *("/usr/share/locale/*", "/usr/lib/x86_64-linux-gnu/librte_*.a"),
)
SHARED_PATHS = ("/dev", "/proc", "/sys", "/tmp")

PRIVATE = ("unshare", "--mount", "--propagation", "private")
# The host's half, then the tree's. `exec` all the way: the process started becomes the program.
ENTER = 'mount -n -a -T "$1" && shift && exec "$@"'
# A program that makes namespaces of users or mounts can't do so from a chroot: the tree becomes the
# root of this namespace of mounts, with the host's taken off it.
PIVOT = (
    'mount -n --bind "$1" "$1" && mount -n -a -T "$2" && cd "$1" && pivot_root . . && '
    'umount -n -l . && shift 2 && exec "$@"'
)
INSIDE = 'export PATH="$0" LC_ALL=C.UTF-8; cd "$1" 2>/dev/null; shift; exec "$@"'
INSIDE_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/usr/libexec"


def install_host_packages() -> None:
    """Install what the rig needs of the host itself; does nothing when all of it is there."""
    query = ["dpkg-query", "--show", "--showformat=${db:Status-Status} ${Package}\n"]
    shown = subprocess.run([*query, *HOST_PACKAGES], capture_output=True, text=True, check=False)
    missing = set(HOST_PACKAGES) - {
        line.split()[1] for line in shown.stdout.splitlines() if line.startswith("installed ")
    }
    if not SUITE_KEY.exists():
        missing.add("debian-archive-keyring")  # an old one: updated by installing it again
    if not missing:
        return
    install = ["apt-get", "install", "--yes", "--no-install-recommends", *sorted(missing)]
    quiet = {"DEBIAN_FRONTEND": "noninteractive"}
    with step(f"installing on the host: {' '.join(sorted(missing))}"):
        try:
            checked(install, env=quiet)
        except RigError:  # the lists are missing or old
            checked(["apt-get", "update"])
            checked(install, env=quiet)
    if not SUITE_KEY.exists():
        raise RigError(
            f"{SUITE_KEY} is missing, so {SUITE}'s packages can't be verified: "
            "enable bookworm-updates in the apt sources, then `apt-get install --only-upgrade "
            "debian-archive-keyring`"
        )


def debian_mirror() -> str:
    """Return the address this machine's apt takes Debian from."""
    targets = ["apt-get", "indextargets", "--format", "$(LABEL)|$(COMPONENT)|$(REPO_URI)"]
    for _ in range(2):
        for line in checked(targets).splitlines():
            label, component, address = line.split("|")
            if (label, component) == ("Debian", "main"):
                return address
        checked(["apt-get", "update"])  # apt knows labels only once it has the lists
    raise RigError("apt has no source of Debian's main component: see /etc/apt/sources.list.d")


def ensure_root() -> Path:
    """Return the tree, made first if no tree of the same recipe is cached; others wait for it."""
    folder = root_folder()
    if folder.is_dir():
        return folder
    if os.geteuid() or platform.machine() != "x86_64":
        raise RigError("the rig makes a root tree and mount namespaces: run it as root, on x86-64")
    with locked("root"):
        if not folder.is_dir():
            install_host_packages()
            beside = folder.with_name(f"{folder.name}.new")
            checked(["rm", "-rf", "--one-file-system", str(beside)])
            with step(f"{SUITE} tree with all peers ({folder})"):
                _debootstrap(beside)
            with step("vDPA simulators for the tree's kernel"):
                checked(peer_argv(kernel.build_command(beside), root=beside))
            beside.rename(folder)
    return folder


def root_folder() -> Path:
    """Return where the tree of this recipe is, or will be."""
    recipe = repr((FORMAT, SUITE, PACKAGES, EXCLUDED))
    recipe += Path(kernel.__file__).read_text() + kernel.PATCH.read_text()
    return cache_folder() / f"root-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"


def _debootstrap(folder: Path) -> None:
    options = [f"--dpkgopt=path-exclude={pattern}" for pattern in EXCLUDED]
    _mmdebstrap("apt", options, PACKAGES, folder)


def extract(packages: Sequence[str], folder: Path, suite: str) -> None:
    """Unpack packages and what they depend on into a new folder, without setting them up.

    Whatever another suite than the tree's does not have comes from the tree's.
    """
    newer = [f'--aptopt=APT::Default-Release "{suite}"'] if suite != SUITE else []
    _mmdebstrap("extract", newer, packages, folder, sorted({suite, SUITE}))


def _mmdebstrap(
    variant: str,
    options: Sequence[str],
    packages: Sequence[str],
    folder: Path,
    suites: Sequence[str] = (SUITE,),
) -> None:
    # Proxies, certificates and clock settings of this machine's apt hold for the tree's too.
    own = re.findall(
        r'^(Acquire::(?:https?|Check-|Retries|ForceIPv)\S*) "(.+)";$',
        checked(["apt-config", "dump"]),
        flags=re.MULTILINE,
    )
    checked(
        [
            *PRIVATE,  # so that no mount is left if this ends early
            *("mmdebstrap", "--mode=root", f"--variant={variant}", "--format=directory"),
            *('--aptopt=APT::Install-Recommends "false"', *options),
            *(f'--aptopt={name} "{value}"' for name, value in own),
            *(f"--include={' '.join(packages)}", SUITE, str(folder)),
            *(f"deb [signed-by={KEYRING}] {debian_mirror()} {suite} main" for suite in suites),
        ]
    )


def peer_argv(
    argv: Sequence[str | Path],
    *,
    die_with_parent: bool = False,
    root: Path | None = None,
    pivot: bool = False,
) -> list[str]:
    """Return the command that runs `argv` on the host, from the tree.

    The process started becomes the program, so its pid is the program's. The working folder is
    kept where the tree has it. With `die_with_parent` the kernel kills the program when the
    *thread* that started it ends: don't start such a program from a thread that ends before it.
    With `pivot` the program may isolate itself further.
    """
    tree = root or ensure_root()
    table = _mount_table(tree)
    guard = ["setpriv", "--pdeathsig", "KILL"] if die_with_parent else []
    enter = ["sh", "-c", ENTER, "sh", str(table), *guard, "chroot", str(tree)]
    if pivot:
        enter = ["sh", "-c", PIVOT, "sh", str(tree), str(table), *guard]
    inside = ["/bin/sh", "-c", INSIDE, INSIDE_PATH, str(Path.cwd())]
    return [*PRIVATE, *enter, *inside, *map(str, argv)]


def _mount_table(tree: Path) -> Path:
    # One fstab for mount -a: a single process instead of one for each mount.
    shared = [*map(Path, SHARED_PATHS), REPOSITORY, cache_folder()]
    outermost = [path for path in shared if not any(p in path.parents for p in shared)]
    lines = []
    for path in outermost:
        inside = tree / path.relative_to("/")
        inside.mkdir(parents=True, exist_ok=True)
        pair = (str(name).replace(" ", "\\040") for name in (path, inside))
        lines.append(f"{' '.join(pair)} none rbind 0 0\n")
    text = "".join(lines)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    table = cache_folder() / f"mounts-{digest}.fstab"
    if not table.exists():
        beside = table.with_name(f"{table.name}.{os.getpid()}")
        beside.write_text(text)
        beside.rename(table)
    return table
