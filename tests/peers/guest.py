"""A small Linux guest in QEMU: the tree's kernel, a busybox in memory, a shell on a serial port."""

from __future__ import annotations

import hashlib
import lzma
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.rig.accel import ACCELERATORS, accelerator
from tests.rig.kernel import kernel_release
from tests.rig.report import cache_folder, locked
from tests.rig.root import ensure_root, peer_argv, root_folder

from .process import Process
from .qmp import Qmp

BOOT_SECONDS = 60.0
COMMAND_SECONDS = 60.0
READY = b"guest ready\n"
END = b"\x01"  # goes before a command's status
MODULES = (
    *("drivers/block/virtio_blk", "net/core/failover", "drivers/net/net_failover"),
    "drivers/net/virtio_net",
)
KERNEL_COMMAND_LINE = (
    *("console=ttyS0", "quiet", "panic=-1", "tsc=reliable", "no_timer_check", "mitigations=off"),
    *("random.trust_cpu=on", "rcupdate.rcu_expedited=1", "nokaslr", "audit=0", "init_on_alloc=0"),
)
INIT = """\
#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev; mount -t proc proc /proc; mount -t sysfs sys /sys
mount -t tmpfs tmp /tmp
for module in MODULES; do insmod /modules/$module.ko; done
stty raw -echo </dev/ttyS1
exec </dev/ttyS1 >/dev/ttyS1 2>&1
echo guest ready
while read -r line; do
    (eval "$line") </dev/null
    printf '\\001%d\\n' $?
done
"""
# Random data to a place on a device, and back from the device itself, not from the page cache.
RW = """\
#!/bin/sh
# rw DEVICE MIB SKIP [FOLDER]: at SKIP MiB; prints the SHA-256 of what was written and read
set -e
at=$((($3) * 16)); data=${4:-/tmp}/rw.$$
dd if=/dev/urandom of=$data.w bs=64k count=$((($2) * 16)) status=none
dd if=$data.w of=$1 bs=64k seek=$at oflag=direct conv=notrunc,fsync status=none
echo 1 >/proc/sys/vm/drop_caches
dd if=$1 of=$data.r bs=64k skip=$at count=$((($2) * 16)) iflag=direct status=none
cmp $data.w $data.r
sha256sum <$data.r | cut -c1-64
rm $data.w $data.r
"""


class GuestError(Exception):
    """A command in the guest failed or did not end, or the guest is gone."""


class Guest(Process):
    """A guest with shared memory; on entry it is waited for until it takes commands.

    `arguments` are QEMU's for the devices under test, or for the whole machine if they say which.
    Its console is the process's output. With `incoming` it does not boot but waits for a migration
    of another one. `launch` tells the command that runs that of QEMU; `tree` is where another QEMU
    than the rig's is.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        memory_mib: int = 256,
        cpus: int = 2,
        incoming: bool = False,
        launch: Callable[[Sequence[str]], list[str]] | None = None,
        tree: Path | None = None,
    ) -> None:
        self._incoming = incoming or "-incoming" in arguments
        if incoming:
            arguments = [*arguments, "-incoming", "defer"]
        self.qmp = Qmp()
        self._agent, agent = socket.socketpair()
        with agent:
            inherited = (self.qmp.remote.fileno(), agent.fileno())
            argv = _qemu_argv(arguments, inherited, memory_mib=memory_mib, cpus=cpus)
            command = launch(argv) if launch else peer_argv(argv, die_with_parent=True, root=tree)
            children = launch is not None  # QEMU may be one
            super().__init__(command, name="qemu", pass_fds=inherited, children=children)

    def __enter__(self) -> Self:
        try:
            self.qmp.start()
            if not self._incoming:
                self.wait_ready()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)
        self.qmp.close()
        self._agent.close()

    def wait_ready(self) -> None:
        """Wait until the guest has booted (again)."""
        self._read_until(READY, BOOT_SECONDS)

    def run(self, command: str, timeout: float = COMMAND_SECONDS) -> str:
        """Run one line of shell in the guest and return what it printed, less space at its ends.

        Raises:
            GuestError: it ended with another status than 0, or not in time.
        """
        self.begin(command)
        return self.end(timeout)

    def begin(self, command: str) -> None:
        """Start a command; `end` must come before the next one."""
        assert "\n" not in command
        self._agent.sendall(command.encode() + b"\n")

    def end(self, timeout: float = COMMAND_SECONDS) -> str:
        """Wait for the command that was begun, and return as `run` does."""
        output = self._read_until(END, timeout)
        status = int(self._read_until(b"\n", timeout))
        text = output.decode(errors="replace").strip()
        if status:
            raise GuestError(f"status {status} in the guest: {text}")
        return text

    def read_write(self, mib: int, skip: int, device: str = "/dev/vda", folder: str = "") -> str:
        """Write random data to a device, read it back, and return its SHA-256.

        Raises:
            GuestError: it could not be written or read, or differs.
        """
        return self.run(f"rw {device} {mib} {skip} {folder}")

    def _read_until(self, mark: bytes, timeout: float) -> bytes:
        self._agent.settimeout(timeout)
        data = b""
        while not data.endswith(mark):
            try:
                byte = self._agent.recv(1)
            except TimeoutError:
                raise GuestError(f"nothing in {timeout:g} s after {data[-500:]!r}") from None
            if not byte:
                raise GuestError(f"the guest is gone after {data[-500:]!r}")
            data += byte
        return data.removesuffix(mark)


def vhost_user_blk(
    socket: Path,
    *,
    queues: int = 1,
    server: bool = False,
    reconnect: bool = False,
    more: str = "",
) -> list[str]:
    """QEMU's arguments for one vhost-user-blk device; with `server` QEMU is who listens, with
    `reconnect` it connects again."""
    listening = ",server=on,wait=on" if server else ""
    listening += ",reconnect-ms=100" if reconnect else ""
    device = f"vhost-user-blk-pci,id=blk,chardev=blk,num-queues={queues}{more}"
    return ["-chardev", f"socket,id=blk,path={socket}{listening}", "-device", device]


def vhost_user_fs(socket: Path, tag: str) -> list[str]:
    """QEMU's arguments for one vhost-user-fs device."""
    device = f"vhost-user-fs-pci,id=fs,chardev=fs,tag={tag}"
    return ["-chardev", f"socket,id=fs,path={socket}", "-device", device]


def _qemu_argv(
    arguments: Sequence[str], inherited: tuple[int, int], *, memory_mib: int, cpus: int
) -> list[str]:
    monitor, agent = inherited
    root = ensure_root()
    machine = (
        *("-machine", "q35,memory-backend=mem", *ACCELERATORS[accelerator()]),
        *("-smp", str(cpus), "-m", f"{memory_mib}M,slots=4,maxmem=4G"),
        *("-object", f"memory-backend-memfd,id=mem,size={memory_mib}M,share=on"),
    )
    return [
        *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none"),
        *(() if "-machine" in arguments else machine),
        *("-kernel", str(root / "boot" / f"vmlinuz-{kernel_release(root)}")),
        *("-initrd", str(guest_archive()), "-append", " ".join(KERNEL_COMMAND_LINE)),
        *("-serial", "stdio", "-chardev", f"socket,id=agent,fd={agent}"),
        *("-serial", "chardev:agent"),
        *("-chardev", f"socket,id=monitor,fd={monitor}", "-mon", "chardev=monitor,mode=control"),
        *arguments,
    ]


def guest_archive() -> Path:
    """Return the guest's root file system in memory, packed if none of the same is cached."""
    recipe = repr((root_folder().name, INIT, RW, MODULES, "1")).encode()
    archive = cache_folder() / f"guest-{hashlib.sha256(recipe).hexdigest()[:12]}.cpio"
    with locked("guest"):
        if not archive.exists():
            beside = archive.with_name(f"{archive.name}.new")
            beside.write_bytes(b"".join(_cpio(ensure_root())))
            beside.rename(archive)
    return archive


def _cpio(root: Path) -> Iterator[bytes]:
    kernel = root / "lib/modules" / kernel_release(root) / "kernel"
    names = [Path(module).name for module in MODULES]
    for folder in ("bin", "dev", "proc", "sys", "tmp", "modules", "mnt"):
        yield _entry(folder, 0o40755)
    yield _entry("bin/busybox", 0o100755, (root / "usr/bin/busybox").read_bytes())
    yield _entry("init", 0o100755, INIT.replace("MODULES", " ".join(names)).encode())
    yield _entry("bin/rw", 0o100755, RW.encode())
    for module, name in zip(MODULES, names, strict=True):
        yield _entry(
            f"modules/{name}.ko",
            0o100644,
            lzma.decompress((kernel / f"{module}.ko.xz").read_bytes()),
        )
    yield _entry("TRAILER!!!", 0)


# The "newc" format, which is what the kernel unpacks.
def _entry(name: str, mode: int, data: bytes = b"") -> bytes:
    fields = (0, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
    head = b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0"
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)
