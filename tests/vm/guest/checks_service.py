"""The Debian package under a real systemd: installed, started, restarted, upgraded, removed.

The checks are one story, in this order; each begins with what those before it left.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

from . import libblkio, survivor
from .devices import SYSFS, block_device, node_of, sh, wait_until
from .libblkio import USER
from .systemd import System, systemd

PACKAGES = Path(__file__).parents[2] / "packages"
COMPILED = f"#!/bin/sh\ncp -r {PACKAGES}/compiled/. /usr/lib/python3/dist-packages/\n"
DEVICES, SYSTEM = contextlib.ExitStack(), contextlib.ExitStack()
COMMAND = "/usr/bin/vhost-bridge"
SOCKETS = Path("/run/vhost-bridge")
MAIN, UNIT = "vhost-bridge.service", "vhost-bridge@vm1.service"
FRONT, CONTROL = SOCKETS / "vm1.vhost-user", SOCKETS / "vm1.sock"
MAIN_CONFIG, CONFIG = Path("/etc/vhost-bridge.toml"), Path("/etc/vhost-bridge/vm1.toml")
BRIDGE = '[[bridge]]\nname = "{name}"\nlisten = "{listen}"\nbackend = "vdpa:{device}"\n'
LIST = "io.vhostbridge.Control.List"
WATCHDOG = Path(f"/run/systemd/system/{UNIT}.d/watchdog.conf")
MEMORY, SEEN = Path("/dev/shm/service"), Path("/tmp/service.state")
NOBODY, OURS = 65534, ("vhost-bridge", 0o660)


@functools.cache
def started() -> System:
    """systemd and a device, until this process ends: it goes before its devices."""
    atexit.register(DEVICES.close)
    atexit.register(SYSTEM.close)
    DEVICES.enter_context(block_device("blk0"))
    return SYSTEM.enter_context(systemd())


@functools.cache
def machine() -> System:
    """The same with the package installed and another device."""
    system = started()
    # What it would do takes long in an emulated machine, and was done on the host.
    Path("/usr/bin/py3compile").write_text(COMPILED)
    WATCHDOG.parent.mkdir()
    WATCHDOG.write_text("[Service]\nWatchdogSec=4\n")
    install("old")
    DEVICES.enter_context(block_device("blk1"))
    CONFIG.write_text(BRIDGE.format(name="vm1", listen=FRONT, device="blk0"))
    for path in (MEMORY, SEEN):
        path.unlink(missing_ok=True)
    return system


def install(name: str) -> None:
    """Install the package of that name, as apt has dpkg do it."""
    (found,) = (PACKAGES / name).glob("*.deb")
    started().run("dpkg", "--force-unsafe-io", "--install", str(found), timeout=180)


def is_ours(node: Path) -> bool:
    return (node.group(), node.stat().st_mode & 0o777) == OURS


def process() -> int:
    """The pid of vm1's daemon, as it is known here; 0 if there is none."""
    inside = machine().show(UNIT, "MainPID")
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
            if lines["NSpid"].split()[1:] == [inside]:
                return int(status.parent.name)
    return 0


@contextlib.contextmanager
def load() -> Iterator[None]:
    """A front-end under a verified load for the block's length. It stays connected all the time.

    It gets processor time that nobody else wants: emulated, this machine has little. Afterwards all
    that was ever written is compared.
    """
    options = {"size": 1 << 20, "depth": 2, "seed": 5, "state": SEEN}
    client = libblkio.start(USER, str(FRONT), "write-read", seconds=90, **options)
    try:
        assert client.stdout is not None
        assert client.stdout.readline() == "running\n"
        for thread in Path(f"/proc/{client.pid}/task").iterdir():
            os.sched_setscheduler(int(thread.name), os.SCHED_IDLE, os.sched_param(0))
        yield
        assert client.poll() is None, client.communicate()
        client.send_signal(signal.SIGTERM)
        output, _ = client.communicate(timeout=120)
        assert client.returncode == 0, output
        result = json.loads(output.splitlines()[-1])
        assert result["writes"] > 0 and result["verified"] > 0, result
    finally:
        if client.poll() is None:
            libblkio.kill(client)


def check_systemd_runs_without_the_package() -> None:
    assert started().show("rig.target", "ActiveState") == "active"
    assert left("/usr", "/etc", "/var") == ""


def check_installed_package_waits_for_a_configuration() -> None:
    system = machine()
    assert system.systemctl("is-enabled", MAIN) == "enabled"
    assert system.show(MAIN, "ActiveState") == "inactive"
    assert SOCKETS.is_dir() and SOCKETS.owner() == "vhost-bridge"
    version = system.run("dpkg-query", "--show", "--showformat=${Version}", "vhost-bridge")
    assert system.run(COMMAND, "--version").split() == ["vhost-bridge", version]
    for name in ("blk0", "blk1"):  # one was there before the package
        wait_until(functools.partial(is_ours, Path(node_of(name))))


def check_first_front_end_starts_the_daemon() -> None:
    system = machine()
    system.systemctl("start", "vhost-bridge@vm1.socket")
    assert system.show(UNIT, "ActiveState") == "inactive"
    survivor.verified(survivor.start(str(FRONT), str(MEMORY), 1, 0.1))
    assert system.show(UNIT, "ActiveState") == "active"


def check_daemon_that_hangs_is_replaced() -> None:
    """Its front-end comes again, and finds all that was done; what was not is done then."""
    system = machine()
    system.systemctl("start", UNIT)
    hung, restarts = process(), int(system.show(UNIT, "NRestarts"))
    client = survivor.start(str(FRONT), str(MEMORY), 2)
    assert os.read(client.output, 100) == b"running\n"
    os.kill(hung, signal.SIGSTOP)
    wait_until(lambda: not Path(f"/proc/{hung}").exists(), timeout=40)
    survivor.kill(client)
    survivor.verified(survivor.start(str(FRONT), str(MEMORY), 3, 0.5))
    assert process() not in (0, hung)
    assert int(system.show(UNIT, "NRestarts")) == restarts + 1
    assert system.entries(f"UNIT={UNIT}", "--grep=[Ww]atchdog timeout"), "something else killed it"
    WATCHDOG.unlink()
    system.systemctl("daemon-reload")


def check_daemon_has_its_user_and_nothing_else() -> None:
    system = machine()
    system.systemctl("start", UNIT)
    folder = Path(f"/proc/{process()}")
    status = (folder / "status").read_text()
    user = sh("id -u vhost-bridge").strip()
    assert f"Uid:\t{user}\t{user}\t{user}\t{user}\n" in status, status
    for kind in ("CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert f"{kind}:\t0000000000000000\n" in status, status
    assert "NoNewPrivs:\t1\n" in status and "Seccomp:\t2\n" in status, status
    for name in ("usr", "etc", "var"):
        assert os.statvfs(folder / "root" / name).f_flag & os.ST_RDONLY, name
    assert not list((folder / "root/home").iterdir())
    assert not list((folder / "root/tmp").iterdir()) and list(Path("/tmp").iterdir())


def check_other_users_reach_neither_socket() -> None:
    machine().systemctl("start", UNIT)
    for path in (FRONT, CONTROL):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
                with socket.socket(socket.AF_UNIX) as sock:
                    sock.connect(str(path))
            except PermissionError:
                status = 0
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, path


def check_restart_is_a_pause() -> None:
    system = machine()
    system.systemctl("start", UNIT)
    with load():
        before = process()
        system.systemctl("restart", UNIT)
        assert process() not in (0, before)


def check_restart_with_a_mistake_waits_for_its_correction() -> None:
    """What front-ends left is kept while the new daemon can't start, however often it is tried."""
    system = machine()
    system.systemctl("start", UNIT)
    before, pid = CONFIG.read_text(), process()
    with load():
        CONFIG.write_text(f"{before}mistake")
        system.systemctl("restart", UNIT, check=False)
        wait_until(lambda: int(system.show(UNIT, "NRestarts")) > 1, timeout=60)
        CONFIG.write_text(before)
        wait_until(lambda: system.show(UNIT, "ActiveState") == "active", timeout=60)
        assert process() not in (0, pid)
    assert system.show(UNIT, "StartLimitIntervalUSec") == "0"


def check_journal_has_fields() -> None:
    """By the daemon's own socket: of standard error systemd makes text without them."""
    system = machine()
    system.systemctl("start", UNIT)
    with load():
        for command in ("suspend", "resume"):
            system.run(COMMAND, command, "vm1")
    of_bridge = f"--unit={UNIT}", "VHOST_BRIDGE=vm1"
    lines = {one["MESSAGE"]: one for one in system.entries(*of_bridge)}
    for line in ("vm1: suspended", "vm1: resumed"):  # of the control socket's tasks
        found = lines[line]
        assert found["PRIORITY"] == "6" and found["SYSLOG_IDENTIFIER"] == "vhost-bridge", found
        assert found["_TRANSPORT"] == "journal" and found["_SYSTEMD_UNIT"] == UNIT, found
    assert any(line.startswith("vm1: running vrings") for line in lines), lines
    came = system.entries(*of_bridge, "VHOST_BRIDGE_EVENT=front-end-connected")
    assert came and all(one["VHOST_BRIDGE_PID"].isdecimal() for one in came), came
    pauses = system.entries(*of_bridge, "VHOST_BRIDGE_EVENT=pause")
    (asked,) = [one for one in pauses if one["VHOST_BRIDGE_REASON"] == "operator"]
    assert float(asked["VHOST_BRIDGE_SECONDS"]) > 0, asked


def check_reload_leaves_the_other_bridge_alone() -> None:
    system = machine()
    system.systemctl("start", UNIT)
    second = SOCKETS / "vm2.vhost-user"
    before, pid = CONFIG.read_text(), process()
    with load():
        CONFIG.write_text(before + BRIDGE.format(name="vm2", listen=second, device="blk1"))
        system.systemctl("reload", UNIT)
        wait_until(second.is_socket)
        libblkio.run(USER, str(second), "fill", size=1 << 18, seed=6)
        CONFIG.write_text(before)
        system.systemctl("reload", UNIT)
        wait_until(lambda: not second.exists())
    assert process() == pid


def check_reload_begins_a_trace() -> None:
    """Where the guide has it: there is no other place on disk that the daemon may write to."""
    system = machine()
    system.systemctl("start", UNIT)
    before, trace = CONFIG.read_text(), Path("/var/log/vhost-bridge/trace")
    CONFIG.write_text(f'trace = "{trace}"\n{before}')
    system.systemctl("reload", UNIT)
    wait_until(trace.exists)
    assert (trace.owner(), trace.stat().st_mode & 0o777) == ("vhost-bridge", 0o600)
    CONFIG.write_text(before)
    system.systemctl("reload", UNIT)


def check_upgrade_is_a_pause() -> None:
    system = machine()
    system.systemctl("start", UNIT, "vhost-bridge@vm1.socket")
    with load():
        before = process()
        install("new")
        assert process() not in (0, before)
    told = system.run("varlinkctl", "info", str(CONTROL))
    version = system.run("dpkg-query", "--show", "--showformat=${Version}", "vhost-bridge")
    assert version.endswith("+new") and f"Version: {version}" in told, told
    assert system.systemctl("is-active", "vhost-bridge@vm1.socket") == "active"


def check_first_command_starts_the_daemon_with_many_bridges() -> None:
    system = machine()
    listen = SOCKETS / "vm3.vhost-user"
    MAIN_CONFIG.write_text(BRIDGE.format(name="vm3", listen=listen, device="blk1"))
    system.systemctl("start", "vhost-bridge.socket")
    assert system.show(MAIN, "ActiveState") == "inactive"
    told = system.run("varlinkctl", "call", str(SOCKETS / "vhost-bridge.sock"), LIST, "{}")
    assert json.loads(told) == {"bridges": ["vm3"]}, told
    assert system.show(MAIN, "ActiveState") == "active"
    assert listen.is_socket()


def check_removed_package_leaves_its_configuration() -> None:
    system = machine()
    system.systemctl("enable", "--no-reload", UNIT)
    system.run("dpkg", "--remove", "vhost-bridge")
    for unit in (UNIT, MAIN):
        assert system.systemctl("is-active", unit, check=False) == "inactive"
    assert process() == 0
    assert not SOCKETS.exists()
    assert CONFIG.exists()
    assert left("/usr") == ""
    assert SYSFS.is_dir()


def check_purged_package_leaves_nothing() -> None:
    machine().run("dpkg", "--purge", "vhost-bridge")
    assert left("/usr", "/etc", "/var") == ""


def left(*folders: str) -> str:
    """What there is that has the package's name, or the module's."""
    return sh(f"find {' '.join(folders)} -xdev -name '*vhost*bridge*'")
