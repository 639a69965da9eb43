"""QEMU to QEMU: passt knows a guest's TCP connections, and they go along, through bridges."""

from __future__ import annotations

import os
import re
import shlex
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.peers import migration
from tests.peers.bridge import Bridge
from tests.peers.guest import Guest
from tests.peers.network import GUEST, PORT, SERVER, Network, Seat
from tests.peers.passt import copy_passt, keep_moving, passt_command
from tests.peers.process import Process
from vhostbridge.bridge.trace.reader import read

ROUNDS = 20 if os.environ.get("VHOST_BRIDGE_SOAK") else 2
MEMORY = 160
UNTIL = "for i in $(seq 300); do {} && exit 0; sleep 0.1; done; exit 1"
# One connection that lasts: random data goes out, must come back, and the next goes out. Nothing is
# ever half closed: passt (2025-05) may then close before all has come back.
STREAM = (
    "(i=0; while :; do head -c 100000 /dev/urandom >/tmp/sent; cat /tmp/sent; i=$((i + 1)); "
    "until [ $(cat /tmp/count) -ge $i ]; do sleep 0.05; done; done) | "
    f"nc {SERVER} {PORT} | "
    "(i=0; while dd bs=100000 count=1 iflag=fullblock status=none >/tmp/got; [ -s /tmp/got ]; do "
    "cmp /tmp/sent /tmp/got || break; "
    "i=$((i + 1)); echo $i >/tmp/new-count; mv /tmp/new-count /tmp/count; done; touch /tmp/done)"
)
# Another one, which begins and ends.
ONE = (
    ": >/tmp/back; (cat /tmp/block; for i in $(seq 300); do "
    "[ $(wc -c </tmp/back) -ge 100000 ] && break; sleep 0.1; done) | "
    f"nc {SERVER} {PORT} >/tmp/back; cmp /tmp/block /tmp/back"
)
# What passt says of each connection that it gives and takes.
CARRIED = re.compile(r"sequences (send \d+ receive \d+)|pending queues: (.*)")


class Host:
    """One side: a bridge that keeps a passt running, and its place on the network."""

    def __init__(
        self,
        stack: ExitStack,
        folder: Path,
        network: Network,
        port: str,
        *,
        helper: bool = True,
        debug: bool = False,
        program: str | Path = "passt",
    ) -> None:
        folder.mkdir()
        self.seat = stack.enter_context(Seat(network, port))
        keep_moving(self.seat)
        self.trace = folder / "trace"
        socket = folder / "passt.sock"
        argv = passt_command(socket, self.seat, helper=helper, debug=debug, program=program)
        more: list[str | Path] = ["--type", "net", "--trace", self.trace]
        self.bridge = stack.enter_context(
            Bridge(
                f"vhost-user:{socket}",
                listen=folder / "vm.sock",
                arguments=[*more, "--backend-command", shlex.join(argv)],
            )
        )

    def guest(self, *, incoming: bool = False, options: str = "") -> Guest:
        """A QEMU on this side's bridge."""
        argv = ["-chardev", f"socket,id=net,path={self.bridge.listen}{options}"]
        argv += ["-netdev", "vhost-user,id=net,chardev=net"]
        argv += ["-device", "virtio-net-pci,netdev=net,mac=52:54:00:77:00:02"]
        return Guest(argv, memory_mib=MEMORY, incoming=incoming)

    def signal_passt(self, number: signal.Signals) -> None:
        pid = self.bridge.status().backend_pid
        assert pid is not None
        os.kill(pid, number)

    def carried(self, start: int) -> list[tuple[str, ...]]:
        """Positions and lengths of the connections that passt gave or took since then."""
        return [found.groups("") for found in CARRIED.finditer(self.bridge.output[start:])]


@contextmanager
def two_hosts(
    folder: Path, *, helper: bool = True, debug: bool = False, second: str | Path = "passt"
) -> Iterator[tuple[Host, Host]]:
    """Two sides on one network; the first is plugged in, and `second` is the other one's passt."""
    with ExitStack() as stack:
        network = stack.enter_context(Network(["left", "right"]))
        here = Host(stack, folder / "a", network, "left", helper=helper, debug=debug)
        there = Host(
            stack, folder / "b", network, "right", helper=helper, debug=debug, program=second
        )
        here.seat.plug()
        yield here, there


def set_up(guest: Guest) -> None:
    guest.run(f"ip link set eth0 up; ip address add {GUEST}/24 dev eth0")
    guest.run("head -c 100000 /dev/urandom >/tmp/block")
    guest.run(ONE)


def goes_on(guest: Guest) -> None:
    """The connection still carries data."""
    here = int(guest.run("cat /tmp/count"))
    guest.run(UNTIL.format(f"[ $(cat /tmp/count) -gt {here + 1} ]"))


def begin_load(guest: Guest) -> None:
    set_up(guest)
    guest.run(f"echo 0 >/tmp/count; ({STREAM}) >/tmp/log 2>&1 &")
    goes_on(guest)


def check_load(guest: Guest) -> None:
    """It still goes on, and no byte was wrong."""
    goes_on(guest)
    assert guest.run("cat /tmp/log; [ ! -e /tmp/done ]") == ""


# The address moves as the guest does: whoever has it without the connection would reset that.
def move(source: Guest, destination: Guest, here: Host, there: Host, folder: Path) -> None:
    unplug = here.seat.unplug
    migration.migrate(
        source, destination, folder / "migration", bandwidth=64 << 20, at_pause=unplug
    )
    there.seat.plug()


@pytest.mark.soak
def test_connection_goes_on_there_and_back(tmp_path: Path) -> None:
    """It is the same one from the first host to the last, and no byte is wrong.

    passt ends with what it gave away, and each bridge has the next one.
    """
    with two_hosts(tmp_path, debug=True) as hosts, ExitStack() as stack:
        guest = stack.enter_context(hosts[0].guest())
        begin_load(guest)
        for turn in range(1, 1 + ROUNDS):
            here, there = hosts[1 - turn % 2], hosts[turn % 2]
            logs = [len(host.bridge.output) for host in (here, there)]
            destination = stack.enter_context(there.guest(incoming=True))
            move(guest, destination, here, there, tmp_path)
            here.bridge.wait_for_output("Migration complete, exiting", start=logs[0])
            guest = destination
            goes_on(guest)
            guest.run(ONE)
            given, taken = (h.carried(at) for h, at in zip((here, there), logs, strict=True))
            assert len(given) == 2 and given == taken
        check_load(guest)


def state_messages(trace: Path) -> list[tuple[str, str, object]]:
    """What QEMU and the bridge said to each other of the state: who, what, and with what."""
    return [
        (entry.sender, entry.name, entry.fields)
        for entry, _ in read(str(trace), note=lambda text: None)
        if entry.kind == "message" and "front-end" in (entry.sender, entry.receiver)
        if "DEVICE_STATE" in entry.name
    ]


def test_qemu_moves_the_state_and_is_told_that_it_went_well(tmp_path: Path) -> None:
    with two_hosts(tmp_path) as hosts, ExitStack() as stack:
        source = stack.enter_context(hosts[0].guest())
        set_up(source)
        destination = stack.enter_context(hosts[1].guest(incoming=True))
        move(source, destination, *hosts, tmp_path)
        destination.run(ONE)
    for host, direction in zip(hosts, ("save", "load"), strict=True):
        assert state_messages(host.trace) == [
            ("front-end", "SET_DEVICE_STATE_FD", {"direction": direction, "phase": 0}),
            ("bridge", "SET_DEVICE_STATE_FD", {"value": "0x100"}),
            ("front-end", "CHECK_DEVICE_STATE", {}),
            ("bridge", "CHECK_DEVICE_STATE", {"value": 0}),
        ]


def test_guest_whose_driver_has_not_come_yet_moves(tmp_path: Path) -> None:
    """It boots on the other host."""
    with two_hosts(tmp_path) as (here, there), ExitStack() as stack:
        source = stack.enter_context(here.guest())
        source.qmp.execute("stop")
        source.qmp.execute("system_reset")
        destination = stack.enter_context(there.guest(incoming=True))
        migration.begin(source, destination, tmp_path / "migration")
        migration.finish(source)
        here.seat.unplug()
        there.seat.plug()
        destination.qmp.execute("cont")
        destination.wait_ready()
        set_up(destination)


@pytest.mark.parametrize("how", ["cancelled", "failed"])
def test_connection_goes_on_after_a_migration_that_does_not_end(tmp_path: Path, how: str) -> None:
    """Somebody cancels it, or the destination dies, before passt is asked for anything."""
    with two_hosts(tmp_path) as hosts, ExitStack() as stack:
        source = stack.enter_context(hosts[0].guest())
        begin_load(source)
        with hosts[1].guest(incoming=True) as destination:
            migration.break_off(source, destination, tmp_path / "migration", how)
        check_load(source)


@pytest.mark.parametrize("how", ["passt-dies", "QEMU-dies", "passt-refuses"])
def test_connection_comes_back_when_the_destination_fails_with_it(tmp_path: Path, how: str) -> None:
    """Of the destination something dies that has to load it, or does not take it. The source's
    passt has given all away and ended; the next one gets it back."""
    other = copy_passt(tmp_path, other_states=True) if how == "passt-refuses" else "passt"
    with two_hosts(tmp_path, debug=True, second=other) as (here, there), ExitStack() as stack:
        source = stack.enter_context(here.guest())
        begin_load(source)
        destination = stack.enter_context(there.guest(incoming=True))

        def at_pause() -> None:
            here.seat.unplug()
            if how != "passt-refuses":
                there.signal_passt(signal.SIGKILL if how == "passt-dies" else signal.SIGSTOP)

        log = len(here.bridge.output)
        migration.begin(source, destination, tmp_path / "migration", bandwidth=64 << 20, pause=True)
        migration.pass_pause(source, at_pause)
        given = here.bridge.wait_for_output("Migration complete, exiting", start=log)
        if how == "QEMU-dies":
            destination.kill()
        with pytest.raises(migration.MigrationError, match="failed"):
            migration.finish(source)
        here.bridge.wait_for_output("running vrings 0, 1", start=given)
        here.seat.plug()
        check_load(source)
        carried = here.carried(log)
        assert len(carried) == 4 and carried[:2] == carried[2:]
        refused = "failed to load its internal state (CHECK_DEVICE_STATE answered 22)"
        assert any(refused in line for line in there.bridge.lines("ERROR")) == (
            how == "passt-refuses"
        )


def test_guest_without_a_helper_loses_its_connections_only(tmp_path: Path) -> None:
    with two_hosts(tmp_path, helper=False, debug=True) as hosts, ExitStack() as stack:
        source = stack.enter_context(hosts[0].guest())
        begin_load(source)
        destination = stack.enter_context(hosts[1].guest(incoming=True))
        move(source, destination, *hosts, tmp_path)
        destination.run(ONE)
        assert hosts[0].carried(0) == hosts[1].carried(0) == []


def test_connection_goes_on_from_a_saved_state(tmp_path: Path) -> None:
    """Saved to a file, which ends passt; loaded into the next one; resumed."""
    with two_hosts(tmp_path) as (host, _), host.guest() as guest:
        begin_load(guest)
        host.bridge.operate("Suspend")
        host.seat.unplug()
        log = len(host.bridge.output)
        host.bridge.command("save", tmp_path / "state")
        host.bridge.wait_for_output("is ready", start=log)
        host.bridge.command("load", tmp_path / "state")
        host.seat.plug()
        assert host.bridge.operate("Resume") == "running"
        check_load(guest)


@pytest.mark.parametrize("build", ["same", "other"])
def test_connection_goes_on_in_another_passt(tmp_path: Path, build: str) -> None:
    """Switched over to it while the guest runs; also to a build for other processors, whose file is
    gone, as after an upgrade."""
    program = copy_passt(tmp_path) if build == "other" else Path("passt")
    with two_hosts(tmp_path) as (host, _), host.guest() as guest:
        begin_load(guest)
        socket = tmp_path / "other.sock"
        argv = passt_command(socket, host.seat, program=program)
        with Process(argv, name="passt", children=True) as other:
            other.wait_for_output("Accepted TCP_REPAIR helper")
            if build == "other":
                program.unlink()
            host.seat.unplug()
            host.bridge.command("switch", f"vhost-user:{socket}")
            host.seat.plug()
            check_load(guest)


def test_guest_whose_passt_dies_gets_another_one(tmp_path: Path) -> None:
    """QEMU is cut off, as only that passt knew its connections, and connects again."""
    with two_hosts(tmp_path) as (host, _), host.guest(options=",reconnect-ms=100") as guest:
        set_up(guest)
        log = len(host.bridge.output)
        host.signal_passt(signal.SIGKILL)
        host.bridge.wait_for_output("running vrings 0, 1", start=log)
        guest.run(ONE)
