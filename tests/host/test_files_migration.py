"""QEMU to QEMU: a guest takes its files from one virtiofsd to another, through bridges."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.host.test_model_files import HALF_WRITTEN, virtiofsd, wait_for
from tests.peers import migration
from tests.peers.bridge import Bridge
from tests.peers.guest import Guest, vhost_user_fs

ROUNDS = 20 if os.environ.get("VHOST_BRIDGE_SOAK") else 2
MEMORY = 160
UNTIL = "for i in $(seq 300); do {} && exit 0; sleep 0.1; done; exit 1"
# Writes new data and reads it back, all the time; and one file stays open, with a line for each.
LOAD = (
    "exec 5>>/mnt/held; i=0; while [ ! -e /tmp/stop ]; do i=$((i + 1)); "
    "dd if=/dev/urandom of=/tmp/data bs=64k count=32 status=none; "
    "cp /tmp/data /mnt/load$((i % 4)) && cmp /tmp/data /mnt/load$((i % 4)) || break; "
    "echo $i >&5 || break; echo $i >/tmp/new-count; mv /tmp/new-count /tmp/count; done; "
    "exec 5>&-; touch /tmp/done"
)


class Host:
    """One side: a virtiofsd for the shared folder, and a bridge."""

    def __init__(
        self, stack: ExitStack, shared: Path, folder: Path, mode: str = "file-handles"
    ) -> None:
        folder.mkdir()
        self.shared = shared
        server = stack.enter_context(virtiofsd(shared, folder / "fs.sock", mode))
        server.wait_for_output("Waiting for vhost-user socket connection")
        backend = f"vhost-user:{folder / 'fs.sock'}"
        self.bridge = stack.enter_context(
            Bridge(backend, listen=folder / "vm.sock", arguments=["--type", "fs"])
        )

    def guest(self, *, incoming: bool = False) -> Guest:
        """A QEMU on this side's bridge."""
        argv = vhost_user_fs(self.bridge.listen, "shared")
        return Guest(argv, memory_mib=MEMORY, incoming=incoming)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "kept").write_text("kept\n")
    with ExitStack() as stack:
        first, second = (Host(stack, shared, tmp_path / name) for name in "ab")
        yield first, second


def begin_load(hosts: tuple[Host, Host], stack: ExitStack) -> Guest:
    guest = stack.enter_context(hosts[0].guest())
    guest.run("mount -t virtiofs shared /mnt")
    guest.run(f"({LOAD}) >/tmp/log 2>&1 &")
    guest.run(UNTIL.format("[ -e /tmp/count ]"))
    return guest


def goes_on(guest: Guest) -> None:
    here = int(guest.run("cat /tmp/count"))
    guest.run(UNTIL.format(f"[ $(cat /tmp/count) -gt {here + 1} ]"))


def check_load(guest: Guest, shared: Path) -> None:
    """It still goes on, and all that it wrote is there, in the file that was open as well."""
    goes_on(guest)
    guest.run(f"[ ! -e /tmp/done ] && touch /tmp/stop && ({UNTIL.format('[ -e /tmp/done ]')})")
    assert guest.run("cat /tmp/log") == ""
    count = int(guest.run("cat /tmp/count"))
    assert (shared / "held").read_text().split() == [str(i) for i in range(1, count + 1)]
    last = guest.run(f"md5sum </mnt/load{count % 4}; md5sum </tmp/data").split()
    assert last[0] == last[2]
    assert guest.run("cat /mnt/kept") == "kept"


@pytest.mark.soak
def test_files_under_load_there_and_back(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    """The same bridges and the same virtiofsd serve one QEMU after the other."""
    with ExitStack() as stack:
        guest = begin_load(hosts, stack)
        for turn in range(1, 1 + ROUNDS):
            destination = stack.enter_context(hosts[turn % 2].guest(incoming=True))
            migration.migrate(guest, destination, tmp_path / "migration", bandwidth=64 << 20)
            guest = destination
            goes_on(guest)
        check_load(guest, hosts[0].shared)


@pytest.mark.parametrize("how", ["cancelled", "failed"])
def test_files_stay_after_a_migration_that_does_not_end(
    hosts: tuple[Host, Host], tmp_path: Path, how: str
) -> None:
    """Somebody cancels it, or the destination dies."""
    with ExitStack() as stack:
        source = begin_load(hosts, stack)
        with hosts[1].guest(incoming=True) as destination:
            migration.break_off(source, destination, tmp_path / "migration", how)
        check_load(source, hosts[0].shared)


def test_state_that_the_destination_refuses_leaves_the_guest_where_it_is(tmp_path: Path) -> None:
    """Its virtiofsd shares another folder, and does not find the file that is open."""
    shared, other = tmp_path / "shared", tmp_path / "other"
    for folder in (shared, other):
        folder.mkdir()
    (shared / "kept").write_text("kept\n")
    with ExitStack() as stack:
        here = Host(stack, shared, tmp_path / "a", "find-paths")
        there = Host(stack, other, tmp_path / "b", "find-paths")
        source = begin_load((here, there), stack)
        destination = stack.enter_context(there.guest(incoming=True))
        migration.begin(source, destination, tmp_path / "migration", bandwidth=64 << 20)
        with pytest.raises(migration.MigrationError, match="failed"):
            migration.finish(source)
        there.bridge.wait_for_output("could not load the state: ")
        check_load(source, shared)


def test_open_file_goes_along(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    """Half written before the move, the other half after it: one file, with both."""
    shared = hosts[0].shared
    with ExitStack() as stack:
        source = stack.enter_context(hosts[0].guest())
        source.run("mount -t virtiofs shared /mnt")
        script = HALF_WRITTEN.replace("rm /mnt/half; ", "")
        source.run(f"({script}) >/dev/null 2>&1 & {wait_for('/tmp/half')}")
        destination = stack.enter_context(hosts[1].guest(incoming=True))
        migration.migrate(source, destination, tmp_path / "migration")
        destination.run(f"touch /tmp/go; {wait_for('/tmp/whole')}")
        assert (shared / "half").read_bytes() == b"first\nsecond\n"
        assert destination.run("cat /mnt/kept; echo new >/mnt/new") == "kept"
    assert (shared / "new").read_text() == "new\n"
