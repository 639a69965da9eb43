"""Follows a guide on this machine, with a guest of its own once the guide starts QEMU."""

from __future__ import annotations

import os
import shlex
import signal
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.docs.blocks import Command
from tests.docs.follow import Follower
from tests.peers.guest import Guest
from tests.peers.place import Place
from tests.peers.process import Process, eventually
from tests.rig.accel import ACCELERATORS, accelerator
from tests.rig.report import REPOSITORY

# What libvirt would do with systemd, which is not there.
LIBVIRT = ("namespaces = []", "cgroup_controllers = []", 'security_driver = "none"')
LIBVIRT_USER = 64055
# What Debian's alternatives would do.
WITH_DPDK = "ln -s /usr/lib/openvswitch-switch-dpdk/ovs-vswitchd-dpdk $TREE/usr/sbin/ovs-vswitchd"
OVS_DATABASE = "/run/openvswitch/db.sock"
# What is not as it is written: this machine is smaller than the reader's, and the guest's kernel is
# given to QEMU.
SMALLER = {
    "-accel kvm -cpu host": " ".join(ACCELERATORS["tcg"]),
    "4G": "256M",
    "<memory unit='GiB'>4<": "<memory unit='MiB'>256<",
    "<domain type='kvm'>": "<domain type='qemu'>",
    "chgrp libvirt-qemu": f"chgrp {LIBVIRT_USER}",
    "-nographic -serial mon:stdio": "",
    ",bootindex=0": "",
}


class HostJob:
    """A command that goes on, in the place."""

    def __init__(self, process: Process) -> None:
        self.process = process

    def text(self) -> str:
        return self.process.output

    def ended(self) -> int | None:
        return self.process.poll()

    def stop(self) -> None:
        # nsenter and what it started
        os.killpg(self.process.pid, signal.SIGTERM)

    def wait(self) -> int:
        return self.process.wait(60)


class Reader(Follower[HostJob]):
    """A person at a host of their own, for the length of a `with` block.

    `here` is what else is not as it is written.
    """

    def __init__(self, layer: Path | None = None, *, here: Mapping[str, str] | None = None) -> None:
        super().__init__(REPOSITORY)
        self.place = Place(layer)
        self.guest: Guest | None = None
        self.running: list[Process] = []
        self._here = {**SMALLER, **(here or {})}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._stack.enter_context(self.place)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            for process in self.running:
                error.add_note(f"--- {process.name}\n{process.output[-3000:]}")
        self._stack.__exit__(kind, error, trace)

    def boot(self, command: Command, options: str = "") -> Guest:
        """Start a guest by the command line of a guide, and more options."""
        _, *arguments = shlex.split(f"{self.here(command.text)} {options}")
        launch = self.place.argv
        guest = Guest(arguments, launch=lambda argv: launch(list(argv)))
        self.guest = self._stack.enter_context(guest)
        return guest

    def write(self, name: str, text: str) -> None:
        """Write a file into the folder that the person works in, as this machine needs it."""
        self.place.path(f"/srv/{name}").write_text(self.here(text))

    def start_libvirt(self) -> None:
        """Start libvirt's daemons; QEMU runs as Debian's user for it."""
        files = {
            "passwd": f"libvirt-qemu:x:{LIBVIRT_USER}:{LIBVIRT_USER}::/:/usr/sbin/nologin",
            "group": f"libvirt-qemu:x:{LIBVIRT_USER}:",
            "libvirt/qemu.conf": "\n".join(LIBVIRT),
        }
        self.place.run("mkdir -p $TREE/etc/libvirt")
        # With a KVM that it can open and not use, libvirt asks QEMU what it can do all over again.
        self.place.run(
            "[ ! -e $TREE/dev/kvm ] || "
            "{ install -m 600 /dev/null /srv/no-kvm && mount --bind /srv/no-kvm $TREE/dev/kvm; }"
        )
        for name, text in files.items():
            self.place.run(f"echo {shlex.quote(text)} >>$TREE/etc/{name}")
        for name, socket in (("virtlogd", "virtlogd-sock"), ("libvirtd", "libvirt-sock")):
            self._begin_server(name, f"/run/libvirt/{socket}")

    def start_open_vswitch(self) -> None:
        """Start Open vSwitch's daemons, as its services do."""
        self.run(f"{WITH_DPDK} && mkdir /run/openvswitch && ovsdb-tool create")
        self._begin_server(f"ovsdb-server --remote=punix:{OVS_DATABASE}", OVS_DATABASE)
        self.run("ovs-vsctl --no-wait init")
        self.begin("ovs-vswitchd --pidfile")

    def here(self, text: str) -> str:
        for written, other in self._here.items():
            text = text.replace(written, other)
        return text.replace(" ".join(ACCELERATORS["tcg"]), " ".join(ACCELERATORS[accelerator()]))

    def run(self, text: str) -> str:
        return self.place.run(text)

    def begin(self, text: str) -> HostJob:
        process = self._stack.enter_context(self.place.start(f"exec {text}"))
        self.running.append(process)
        return HostJob(process)

    def exists(self, path: str) -> bool:
        return self.place.path(path).exists()

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        eventually(condition, what)

    def elsewhere(self, text: str, where: str) -> str:
        assert self.guest is not None, "no guest runs"
        if where == "guest":
            return self.guest.run(text)
        assert where == "qemu", where
        return str(self.guest.qmp.execute("human-monitor-command", **{"command-line": text}))

    def _begin_server(self, text: str, socket: str) -> None:
        job = self.begin(text)
        eventually(lambda: self.exists(socket) or job.ended() is not None, f"{socket} exists")
