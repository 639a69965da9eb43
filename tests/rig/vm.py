"""The virtual machine: one boot for a whole test session, commands by way of a virtio-serial port.

Only files under the share and results of commands leave it; its disk is a throw-away snapshot.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import termios
import threading
import time
import tty
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from .accel import ACCELERATORS, accelerator
from .image import python_image, root_image
from .job import CommandFailed, Completed, Job, VmLost
from .kernel import kernel_release
from .product import install_for_guest
from .report import say
from .root import ensure_root, peer_argv

BOOT_SECONDS = 120.0
ANSWER_SECONDS = 30.0  # for the guest to say that it has started a command
ENDED = "the virtual machine has ended by itself"
CONSOLE_TAIL = 60  # lines quoted when the machine is lost

KERNEL_COMMAND_LINE = (
    *("root=/dev/nvme0n1", "rootfstype=ext4", "rw", "console=ttyS0", "quiet", "panic=-1"),
    *("tsc=reliable", "no_timer_check", "mitigations=off", "random.trust_cpu=on"),
    *("rcupdate.rcu_expedited=1", "nokaslr", "audit=0"),
)
# The share holds the rest, so that no change of it needs another image.
INIT = (
    *("init=/bin/sh", "--", "-c"),
    '"mkdir -p /rig && mount -t virtiofs rig /rig && exec sh /rig/.boot/init.sh"',
)
TERMINAL_COMMAND = "stty rows {1} cols {0}; exec bash -i"


class Vm:
    """A running virtual machine with vhost-vdpa, the vDPA simulators and VDUSE.

    `share_host` on the host is `share_guest` in the guest. With a wheel the guest has the product
    importable and `vhost-bridge` on its PATH. `shared_backend` gives all block simulators one
    store. As a context manager it boots on entry and is ended on exit; everything blocks.
    """

    share_guest = "/rig"

    def __init__(
        self,
        *,
        wheel: Path | None = None,
        memory_mib: int = 2048,
        cpus: int = 2,
        shared_backend: bool = False,
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="vhost-bridge-vm-"))
        self.share_host = self.folder / "share"
        self.console_log = self.folder / "console.log"
        self.boot_seconds = 0.0
        self._wheel = wheel
        self._memory_mib = memory_mib
        self._cpus = cpus
        self._shared_backend = shared_backend
        self._jobs: dict[int, Job] = {}
        self._numbers = itertools.count(1)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._sockets: list[socket.socket] = []
        self._listener: threading.Thread | None = None
        self._ended = False
        self._keep = False  # the logs
        self._ready = threading.Event()
        self._sending = threading.Lock()

    def __enter__(self) -> Self:
        began = time.monotonic()
        try:
            self._prepare_share()
            self._launch()
            if not self._ready.wait(BOOT_SECONDS):
                raise self._lose(f"the guest didn't come up in {BOOT_SECONDS:g} s")
            if self._ended:
                raise self._lose(ENDED)
        except BaseException:
            self._end()
            raise
        self.boot_seconds = time.monotonic() - began
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    @property
    def qemu_pid(self) -> int:
        """The pid of QEMU itself on the host."""
        return self._processes[-1].pid

    def run(
        self,
        command: str | Sequence[str],
        *,
        timeout: float = 120,
        check: bool = True,
        env: Mapping[str, str] | None = None,
        memlock: bool = False,
    ) -> Completed:
        """Run a command (a string: by the guest's sh) and return its status and output.

        Raises CommandFailed on another status than 0 (with `check`), CommandTimeout over the
        deadline, when the command's process group is killed, and VmLost. `memlock` lifts the
        limit of locked memory, which vhost-vdpa counts the guest's memory against.
        """
        completed = self.start(command, env=env, memlock=memlock).wait(timeout)
        if check and completed.returncode:
            raise CommandFailed(completed)
        return completed

    def start(
        self,
        command: str | Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        memlock: bool = False,
    ) -> Job:
        """Start a command in the background, and return when the guest has started it."""
        argv = ("sh", "-c", command) if isinstance(command, str) else tuple(map(str, command))
        return self._start(argv, env=dict(env or {}), memlock=memlock)

    def shell(self) -> int:
        """Give the caller's terminal to a shell in the guest; return its exit status."""
        size = os.get_terminal_size() if sys.stdin.isatty() else os.terminal_size((80, 24))
        command = ("bash", "-c", TERMINAL_COMMAND.format(*size))
        job = self._start(command, env={"TERM": os.environ.get("TERM", "linux")}, tty="/dev/hvc0")
        terminal = self._terminal.fileno()
        with _raw_terminal():
            for ends in ((terminal, 1), (0, terminal)):
                threading.Thread(target=_pump, args=ends, daemon=True).start()
            return job.wait(timeout=threading.TIMEOUT_MAX / 2).returncode

    def _start(self, argv: tuple[str, ...], **request: Any) -> Job:
        number = next(self._numbers)
        job = self._jobs[number] = Job(number, argv, self._tell, self._lose)
        self._tell("start", id=number, argv=argv, **request)
        job.wait_started(ANSWER_SECONDS)
        return job

    def _tell(self, op: str, **values: Any) -> None:
        with self._sending:
            try:
                self._agent.sendall(json.dumps({"op": op, **values}).encode() + b"\n")
            except OSError:
                raise self._lose(ENDED) from None

    def _listen(self) -> None:
        # Runs in a thread of its own until QEMU closes the port.
        with contextlib.suppress(OSError), self._agent.makefile("rb") as lines:
            for line in lines:
                event = json.loads(line)
                if event["event"] == "ready":
                    self._ready.set()
                elif (job := self._jobs.get(event.get("id", 0))) is not None:
                    job.report(event, base64.b64decode(event.get("data", "")))
                    if event["event"] == "exit":
                        del self._jobs[event["id"]]
        self._ended = True
        self._ready.set()
        for job in list(self._jobs.values()):
            job.lose(ENDED)

    def _prepare_share(self) -> None:
        boot = self.share_host / ".boot"
        boot.mkdir(parents=True)
        here = Path(__file__).parent
        shutil.copy(here / "guest_init.sh", boot / "init.sh")
        shutil.copy(here / "guest_agent.py", boot / "guest_agent.py")
        if self._wheel is not None:
            install_for_guest(self._wheel, boot / "product")

    def _launch(self) -> None:
        argv = self._qemu_argv()
        self._agent, agent = socket.socketpair()
        self._terminal, terminal = socket.socketpair()
        self._sockets = [self._agent, self._terminal]
        share = socket.socket(socket.AF_UNIX)
        with agent, terminal, share:
            share.bind(str(self.folder / "share.sock"))
            share.listen()
            files = ["--fd", str(share.fileno()), "--shared-dir", str(self.share_host)]
            quiet = ["--sandbox", "none", "--cache", "never", "--log-level", "error"]
            self._spawn(["virtiofsd", *quiet, *files], share.fileno())
            ports = [
                *("-chardev", f"socket,id=agent,fd={agent.fileno()}"),
                *("-device", "virtserialport,chardev=agent,name=rig.agent"),
                *("-chardev", f"socket,id=terminal,fd={terminal.fileno()}"),
                *("-device", "virtconsole,chardev=terminal"),
            ]
            self._spawn([*argv, *ports], agent.fileno(), terminal.fileno())
        self._listener = threading.Thread(target=self._listen, name="rig agent", daemon=True)
        self._listener.start()

    def _spawn(self, argv: Sequence[str], *descriptors: int) -> None:
        with (self.folder / f"{Path(argv[0]).name}.log").open("wb") as log:
            process = subprocess.Popen(
                peer_argv(argv, die_with_parent=True),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=descriptors,
                env={**os.environ, "TMPDIR": str(self.folder)},
                start_new_session=True,  # a terminal's Ctrl-C is for us
            )
        self._processes.append(process)

    def _qemu_argv(self) -> list[str]:
        root = ensure_root()
        kernel = root / "boot" / f"vmlinuz-{kernel_release(root)}"
        options = [f"vdpa_sim_blk.shared_backend={int(self._shared_backend)}"]
        disk = "if=none,format=raw,cache=unsafe"
        return [
            *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-no-reboot"),
            *("-display", "none", "-machine", "q35,memory-backend=mem"),
            *ACCELERATORS[accelerator()],
            *("-smp", str(self._cpus), "-m", f"{self._memory_mib}M"),
            *("-object", f"memory-backend-memfd,id=mem,size={self._memory_mib}M,share=on"),
            *("-kernel", str(kernel)),
            *("-append", " ".join([*KERNEL_COMMAND_LINE, *options, *INIT])),
            *("-drive", f"{disk},id=root,file={root_image()},snapshot=on"),
            *("-drive", f"{disk},id=python,file={python_image()},readonly=on"),
            # Two NVMe namespaces would come up in either order; and root must need no module.
            *("-device", "nvme,serial=rig,drive=root"),
            *("-device", "virtio-blk-pci,drive=python"),
            *("-chardev", f"socket,id=share,path={self.folder / 'share.sock'}"),
            *("-device", "vhost-user-fs-pci,chardev=share,tag=rig"),
            *("-chardev", f"file,id=console,path={self.console_log}"),
            *("-device", "isa-serial,chardev=console", "-device", "virtio-serial-pci"),
        ]

    def _lose(self, why: str) -> VmLost:
        # Nothing can come of a machine that hangs: it is ended. Its console says why.
        self._stop_processes()
        self._keep = True
        tails = []
        for log in sorted(self.folder.glob("*.log")):
            lines = log.read_text(errors="replace").splitlines()[-CONSOLE_TAIL:]
            if lines:
                tails.append(f"--- the end of {log}\n" + "\n".join(lines))
        return VmLost("\n".join([why, *tails]))

    def _stop_processes(self) -> None:
        for process in reversed(self._processes):  # QEMU before what serves it
            process.kill()
            process.wait()
        if self._listener is not None:
            self._listener.join()

    def _end(self) -> None:
        self._stop_processes()
        for end in self._sockets:
            end.close()
        if self._keep:
            say(f"the virtual machine was lost; its logs and files are kept in {self.folder}")
        else:
            shutil.rmtree(self.folder, ignore_errors=True)


def _pump(source: int, sink: int) -> None:
    with contextlib.suppress(OSError):
        while data := os.read(source, 4096):
            os.write(sink, data)


@contextlib.contextmanager
def _raw_terminal() -> Iterator[None]:
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(0)
    tty.setraw(0)
    try:
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)
