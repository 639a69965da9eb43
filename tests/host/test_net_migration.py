"""QEMU to QEMU: a running guest with TCP connections moves from bridge to bridge, DPDK behind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.peers import migration
from tests.peers.bridge import Bridge
from tests.peers.guest import Guest
from tests.peers.network import GUEST, PORT, SERVER, Network
from tests.peers.testpmd import Uplink

ROUNDS = 20 if os.environ.get("VHOST_BRIDGE_SOAK") else 2
MEMORY = 160
UNTIL = "for i in $(seq 300); do {} && exit 0; sleep 0.1; done; exit 1"
# Sends random data in one connection after the other, and compares what comes back.
LOAD = (
    "while [ ! -e /tmp/stop ]; do head -c 500000 /dev/urandom >/tmp/sent; "
    f"nc {SERVER} {PORT} </tmp/sent >/tmp/got || break; cmp /tmp/sent /tmp/got || break; "
    "i=$((i + 1)); echo $i >/tmp/new-count; mv /tmp/new-count /tmp/count; done; touch /tmp/done"
)
# Nothing here computes checksums for the guest, or cuts its segments.
PLAIN = ",".join(
    f"{name}=off"
    for name in (
        *("csum", "gso", "guest_csum", "guest_tso4", "guest_tso6", "guest_ecn", "guest_ufo"),
        *("host_tso4", "host_tso6", "host_ecn", "host_ufo"),
    )
)


class Host:
    """One side: DPDK between a port of the network and a vhost-user socket, and a bridge."""

    def __init__(
        self, stack: ExitStack, folder: Path, network: Network, port: str, options: list[str]
    ) -> None:
        folder.mkdir()
        vdev = f"net_vhost0,iface={folder / 'net.sock'},queues=1"
        self.uplink = stack.enter_context(Uplink(vdev, port, network.place, processor=1))
        self.bridge = stack.enter_context(
            Bridge(
                f"vhost-user:{folder / 'net.sock'}", listen=folder / "vm.sock", arguments=options
            )
        )

    def guest(self, *, incoming: bool) -> Guest:
        """A QEMU on this side's bridge."""
        argv = ["-chardev", f"socket,id=net,path={self.bridge.listen}"]
        argv += ["-netdev", "vhost-user,id=net,chardev=net"]
        argv += ["-device", f"virtio-net-pci,netdev=net,mac=52:54:00:77:00:02,{PLAIN}"]
        return Guest(argv, memory_mib=MEMORY, incoming=incoming)


@contextmanager
def two_hosts(folder: Path, options: list[str]) -> Iterator[tuple[Host, Host]]:
    """Two sides on one network."""
    with ExitStack() as stack:
        network = stack.enter_context(Network(["left", "right"]))
        yield (
            Host(stack, folder / "a", network, "left", options),
            Host(stack, folder / "b", network, "right", options),
        )


def goes_on(guest: Guest) -> None:
    """Connections still begin, carry all their data, and end."""
    here = int(guest.run("cat /tmp/count"))
    guest.run(UNTIL.format(f"[ $(cat /tmp/count) -gt {here + 1} ]"))


def begin_load(hosts: tuple[Host, Host], stack: ExitStack) -> Guest:
    hosts[0].uplink.tell("start")
    guest = stack.enter_context(hosts[0].guest(incoming=False))
    guest.run(f"ip link set eth0 up; ip address add {GUEST}/24 dev eth0")
    guest.run(f"i=0; echo 0 >/tmp/count; ({LOAD}) >/tmp/log 2>&1 &")
    goes_on(guest)
    return guest


def check_load(guest: Guest) -> None:
    """It still goes on, and no byte was wrong."""
    goes_on(guest)
    guest.run(f"[ ! -e /tmp/done ] && touch /tmp/stop && ({UNTIL.format('[ -e /tmp/done ]')})")
    assert guest.run("cat /tmp/log") == ""


@pytest.mark.soak
@pytest.mark.parametrize("dirty_log", ["auto", "shadow"])
def test_connections_go_on_there_and_back(tmp_path: Path, dirty_log: str) -> None:
    """The same bridges and the same DPDK serve one QEMU after the other; no byte is wrong.

    DPDK logs by itself, or shadow vrings do.
    """
    with two_hosts(tmp_path, ["--dirty-log", dirty_log]) as hosts, ExitStack() as stack:
        guest = begin_load(hosts, stack)
        for turn in range(1, 1 + ROUNDS):
            here, there = hosts[1 - turn % 2], hosts[turn % 2]
            there.uplink.tell("start")
            destination = stack.enter_context(there.guest(incoming=True))
            told = migration.migrate(guest, destination, tmp_path / "migration", bandwidth=64 << 20)
            assert told["ram"]["dirty-sync-count"] >= 2
            here.uplink.tell("stop")
            guest = destination
            goes_on(guest)
        check_load(guest)


@pytest.mark.parametrize("how", ["cancelled", "failed"])
def test_connections_go_on_after_a_migration_that_does_not_end(tmp_path: Path, how: str) -> None:
    """Somebody cancels it, or the destination dies."""
    with two_hosts(tmp_path, ["--dirty-log", "shadow"]) as hosts, ExitStack() as stack:
        source = begin_load(hosts, stack)
        with hosts[1].guest(incoming=True) as destination:
            migration.break_off(source, destination, tmp_path / "migration", how)
        check_load(source)
