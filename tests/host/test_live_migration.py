"""QEMU to QEMU: a running guest with a disk under verified load moves from bridge to bridge."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.peers import migration
from tests.peers.bridge import Bridge
from tests.peers.guest import Guest, vhost_user_blk
from tests.peers.qmp import QmpError
from tests.peers.storage import StorageDaemon, make_image
from tests.rig.layer import newer_qemu

MIB = 1 << 20
MEMORY = 160
SOAK = bool(os.environ.get("VHOST_BRIDGE_SOAK"))
ROUNDS = 20 if SOAK else 2
# Writes new data, reads it back and compares. Then it reads it into the page cache: the device
# writes to memory that stays, and has to be the same when it is read again, from the cache and then
# from the disk.
SUM = "dd if=/dev/vda bs=1M count=4 status=none {} | md5sum"
LOAD = (
    "i=0; while [ ! -e /tmp/stop ]; do rw /dev/vda 4 0 >/tmp/new || break; "
    f"mv /tmp/new /tmp/sum; all=$({SUM.format('')}); "
    f'for again in 1 2 3 4 5 6 7 8; do [ "$({SUM.format("")})" = "$all" ] || break 2; done; '
    f'[ "$({SUM.format("iflag=direct")})" = "$all" ] || break; '
    "i=$((i + 1)); echo $i >/tmp/new-count; mv /tmp/new-count /tmp/count; done; touch /tmp/done"
)
UNTIL = "for i in $(seq 300); do {} && exit 0; sleep 0.1; done; exit 1"


def digest_of(image: Path, mib: int, skip: int) -> str:
    with image.open("rb") as file:
        file.seek(skip * MIB)
        return hashlib.sha256(file.read(mib * MIB)).hexdigest()


class Host:
    """One side: a storage daemon on the shared image, and a bridge."""

    def __init__(
        self, stack: ExitStack, image: Path, folder: Path, options: list[str], *, newer: bool
    ) -> None:
        folder.mkdir()
        self.image = image
        self._tree = newer_qemu() if newer else None
        self.storage = stack.enter_context(StorageDaemon(image, folder / "disk.sock"))
        backend = f"vhost-user:{self.storage.socket}"
        self.bridge = stack.enter_context(
            Bridge(backend, listen=folder / "vm.sock", arguments=options)
        )

    def guest(self, *, incoming: bool) -> Guest:
        """A QEMU on this side's bridge."""
        more = ",inflight-migration=on" if self._tree else ""
        argv = vhost_user_blk(self.bridge.listen, more=more)
        return Guest(argv, memory_mib=MEMORY, incoming=incoming, tree=self._tree)


@pytest.fixture
def hosts(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Host, Host]]:
    """Two sides on one image, whose device logs by itself, or shadow vrings do, or nobody.

    Or shadow vrings are always there, and QEMU keeps what is in flight; a newer QEMU takes it along
    (GET_VRING_BASE_INFLIGHT), and the device logs too.
    """
    always = ["--shadow", "--dirty-log", "shadow"]
    options = {"auto": [], "always": always, "taken along": ["--shadow"]}.get(
        request.param, ["--dirty-log", request.param]
    )
    image = make_image(tmp_path / "image")
    with ExitStack() as stack:
        first, second = (
            Host(stack, image, tmp_path / name, options, newer=request.param == "taken along")
            for name in "ab"
        )
        yield first, second


def begin_load(guest: Guest) -> None:
    guest.run(f"rm -f /tmp/stop /tmp/done /tmp/sum /tmp/count; ({LOAD}) >/tmp/log 2>&1 &")
    guest.run(UNTIL.format("[ -e /tmp/count ]"))


def check_load(guest: Guest, image: Path) -> None:
    """The load still goes on, and all that it wrote and read is right."""
    here = int(guest.run("cat /tmp/count"))
    guest.run(UNTIL.format(f"[ $(cat /tmp/count) -gt {here} ]"))
    guest.run(f"[ ! -e /tmp/done ] && touch /tmp/stop && ({UNTIL.format('[ -e /tmp/done ]')})")
    assert guest.run("cat /tmp/log") == ""
    assert guest.run("cat /tmp/sum") == digest_of(image, 4, 0)


def move(stack: ExitStack, source: Guest, to: Host, socket: Path) -> tuple[Guest, dict[str, Any]]:
    destination = stack.enter_context(to.guest(incoming=True))
    return destination, migration.migrate(source, destination, socket, bandwidth=64 * MIB)


BOTH = pytest.mark.parametrize("hosts", ["auto", "shadow"], indirect=True)
ALL = pytest.mark.parametrize(
    "hosts", ["auto", "shadow", "all", "taken along", *["always"] * SOAK], indirect=True
)


@ALL
@pytest.mark.soak
def test_guest_moves_there_and_back_under_load(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    """The same bridges serve one QEMU after the other; every byte is right after each move."""
    with ExitStack() as stack:
        guest = stack.enter_context(hosts[0].guest(incoming=False))
        for turn in range(1, 1 + ROUNDS):
            begin_load(guest)
            guest, told = move(stack, guest, hosts[turn % 2], tmp_path / "migration")
            assert told["ram"]["dirty-sync-count"] >= 2
            check_load(guest, hosts[0].image)


@BOTH
def test_cancelled_migration_leaves_the_guest_running(
    hosts: tuple[Host, Host], tmp_path: Path
) -> None:
    """It goes on where it is with all data right, and can be migrated after that."""
    with ExitStack() as stack:
        source = stack.enter_context(hosts[0].guest(incoming=False))
        begin_load(source)
        with hosts[1].guest(incoming=True) as destination:
            migration.break_off(source, destination, tmp_path / "migration", "cancelled")
        check_load(source, hosts[0].image)
        begin_load(source)
        guest, _ = move(stack, source, hosts[1], tmp_path / "migration")
        check_load(guest, hosts[0].image)


@BOTH
def test_destination_that_dies_leaves_the_guest_running(
    hosts: tuple[Host, Host], tmp_path: Path
) -> None:
    with hosts[0].guest(incoming=False) as source:
        begin_load(source)
        with hosts[1].guest(incoming=True) as destination:
            migration.break_off(source, destination, tmp_path / "migration", "failed")
        check_load(source, hosts[0].image)


@pytest.mark.parametrize("hosts", ["refuse"], indirect=True)
def test_refused_migration_does_not_begin(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    """QEMU says why, and the guest has no pause."""
    with hosts[0].guest(incoming=False) as source:
        begin_load(source)
        with pytest.raises(QmpError, match=r"Migration disabled: .*LOG_SHMFD"):
            source.qmp.execute("migrate", uri=f"unix:{tmp_path / 'migration'}")
        assert source.qmp.execute("query-status")["status"] == "running"
        check_load(source, hosts[0].image)


@pytest.mark.parametrize("hosts", ["taken along"], indirect=True)
def test_guest_moves_away_from_a_back_end_that_is_dead(
    hosts: tuple[Host, Host], tmp_path: Path
) -> None:
    """Its requests in flight go along, and are done at the other side."""
    here, there = hosts
    with ExitStack() as stack:
        source = stack.enter_context(here.guest(incoming=False))
        begin_load(source)
        here.storage.signal(signal.SIGSTOP)
        time.sleep(1)  # what the guest still has in its cache is read by then
        here.storage.kill()
        here.bridge.wait_for_output("waiting for the back-end: ")
        destination = stack.enter_context(there.guest(incoming=True))
        migration.begin(source, destination, tmp_path / "migration", bandwidth=64 * MIB)
        migration.finish(source)
        # For a back-end that comes after all the state is not all.
        log = len(here.bridge.output)
        with StorageDaemon(here.image, here.storage.socket):
            here.bridge.wait_for_output("is ready", start=log)
            saved = here.bridge.command("save", tmp_path / "state", check=False)
        assert "in flight, which only the front-end's buffer has" in saved.stderr
        destination.qmp.wait_for_event("RESUME")
        source.qmp.execute("quit")
        check_load(destination, here.image)
