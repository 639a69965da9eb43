"""Back-ends that are away or hang while a guest runs: QEMU does not hang with them."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.peers import blkio
from tests.peers.bridge import Bridge
from tests.peers.guest import Guest, vhost_user_blk
from tests.peers.process import eventually
from tests.peers.storage import StorageDaemon
from vhostbridge.bridge.saved import read_saved

# What a monitor command may take on a busy machine; a hang lasts until the back-end is back.
SOON = 20.0


@pytest.fixture
def bridge(disk: StorageDaemon, tmp_path: Path) -> Iterator[Bridge]:
    options = ["--shadow"]
    with Bridge(
        f"vhost-user:{disk.socket}", listen=tmp_path / "vm.sock", arguments=options
    ) as running:
        yield running


@pytest.fixture
def guest(bridge: Bridge) -> Iterator[Guest]:
    with Guest(vhost_user_blk(bridge.listen, queues=2)) as running:
        running.qmp.timeout(SOON)
        yield running


def take_away(disk: StorageDaemon, bridge: Bridge) -> None:
    log = len(bridge.output)
    disk.kill()
    disk.qmp.close()
    bridge.wait_for_output("waiting for the back-end: ", start=log)


def back(disk: StorageDaemon, bridge: Bridge) -> StorageDaemon:
    log = len(bridge.output)
    again = StorageDaemon(disk.image, disk.socket, queues=4)
    bridge.wait_for_output("is ready", start=log)
    return again


def base_in(state: Path) -> int:
    with state.open("rb") as file:
        (vring,) = read_saved(file, lambda count: None).state.vrings
    return vring.base


def test_qemu_does_what_it_is_told_while_its_back_end_is_away(
    disk: StorageDaemon, bridge: Bridge, guest: Guest
) -> None:
    """Stop, cont, system_reset and quit are done at once; what the guest wrote is right."""
    guest.read_write(2, 0)
    take_away(disk, bridge)
    guest.begin("rw /dev/vda 2 4")
    for _ in range(2):
        guest.qmp.execute("stop")
        assert guest.qmp.execute("query-status")["status"] == "paused"
        guest.qmp.execute("cont")
        assert guest.qmp.execute("query-status")["status"] == "running"
    with back(disk, bridge) as second:
        assert len(guest.end()) == 64
        take_away(second, bridge)
    guest.qmp.execute("system_reset")
    assert guest.qmp.execute("query-status")["status"] == "running"
    with back(disk, bridge) as third:
        guest.wait_ready()
        assert len(guest.read_write(2, 8)) == 64
        guest.begin("rw /dev/vda 2 4")
        take_away(third, bridge)
    assert "cut off" not in bridge.output
    guest.qmp.execute("quit")
    assert guest.wait(SOON) == 0


def test_migration_that_is_cancelled_while_the_back_end_is_away_loses_no_request(
    disk: StorageDaemon, tmp_path: Path
) -> None:
    """Shadow vrings are not wanted any more, and know alone what is in flight."""
    with (
        Bridge(
            f"vhost-user:{disk.socket}",
            listen=tmp_path / "vm.sock",
            arguments=["--dirty-log", "shadow"],
        ) as bridge,
        Guest(vhost_user_blk(bridge.listen, queues=2)) as guest,
        socket.socket(socket.AF_UNIX) as destination,
    ):
        guest.qmp.timeout(SOON)
        destination.bind(str(tmp_path / "migration"))
        destination.listen()  # and reads nothing
        guest.qmp.execute("migrate", uri=f"unix:{tmp_path / 'migration'}")
        bridge.wait_for_output("requests pass through shadow vrings now")
        guest.read_write(2, 0)
        guest.begin("for i in 1 2 3 4; do rw /dev/vda 8 8 || exit; done")
        time.sleep(0.3)
        take_away(disk, bridge)
        guest.qmp.execute("migrate_cancel")
        with back(disk, bridge):
            assert len(guest.end().splitlines()) == 4
        assert "requests go straight to the device now" in bridge.output


def test_qemu_comes_anew_while_the_back_end_is_away(
    disk: StorageDaemon, bridge: Bridge, guest: Guest
) -> None:
    """It is served from what the bridge knows; its guest waits for the disk, not QEMU."""
    take_away(disk, bridge)
    guest.kill()
    with ExitStack() as stack:
        second = Guest(vhost_user_blk(bridge.listen))
        stack.push(second)  # it does not boot yet
        second.qmp.start()
        second.qmp.timeout(SOON)
        assert second.qmp.execute("query-status")["status"] == "running"
        with back(disk, bridge):
            second.wait_ready()
            assert len(second.read_write(2, 0)) == 64


def test_back_end_that_is_away_too_long_costs_the_front_end_its_connection(
    disk: StorageDaemon, tmp_path: Path
) -> None:
    with Bridge(
        f"vhost-user:{disk.socket}",
        listen=tmp_path / "vm.sock",
        arguments=["--shadow", "--backend-timeout", "1.5"],
    ) as bridge:
        client = blkio.start(bridge.listen, "randread", seconds=60, depth=4)
        with client:
            client.wait_for_output(blkio.RUNNING)
            take_away(disk, bridge)
            bridge.wait_for_output("another one was not there within 1.5 s")
        with back(disk, bridge):
            assert blkio.run(bridge.listen, "fill", size=1 << 20, seed=6)


def test_state_that_was_loaded_outlives_its_back_end(
    disk: StorageDaemon, bridge: Bridge, tmp_path: Path
) -> None:
    """The next one goes on from there, not from where the operator had suspended the one before."""
    with blkio.start(bridge.listen, "randread", seconds=60, depth=1) as client:
        client.wait_for_output(blkio.RUNNING)
        bridge.command("suspend")
        bridge.command("save", tmp_path / "first")
        bridge.command("resume")
        time.sleep(0.2)
        bridge.command("suspend")
        bridge.command("save", tmp_path / "second")
        bridge.command("load", tmp_path / "first")
        take_away(disk, bridge)
        with back(disk, bridge):
            bridge.command("save", tmp_path / "third")
    assert (
        base_in(tmp_path / "third") == base_in(tmp_path / "first") != base_in(tmp_path / "second")
    )


def test_back_end_that_hangs_and_comes_to_life_again(
    disk: StorageDaemon, bridge: Bridge, tmp_path: Path
) -> None:
    """SIGSTOP under a verified load, noticed at a message, then SIGCONT: nothing is lost."""
    options: dict[str, object] = {"size": 4 << 20, "state": tmp_path / "state", "seed": 41}
    blkio.run(bridge.listen, "fill", **options)
    with blkio.start(bridge.listen, "write-read", depth=8, seconds=5, **options) as client:
        client.wait_for_output(blkio.RUNNING)
        time.sleep(0.2)
        disk.signal(signal.SIGSTOP)
        suspended = bridge.command("suspend", check=False)
        assert suspended.returncode != 0 and "did not answer" in suspended.stderr
        bridge.wait_for_output("the back-end failed: ")
        log = len(bridge.output)
        disk.signal(signal.SIGCONT)
        bridge.wait_for_output("running vrings", start=log, timeout=60)
        blkio.finish(client)
    blkio.run(bridge.listen, "verify", **options)
    blkio.verify_file(disk.image, **options)


def test_another_back_end_waits_until_the_one_that_hangs_has_ended(
    disk: StorageDaemon, bridge: Bridge, tmp_path: Path
) -> None:
    """Both would write to the guest's memory."""
    options: dict[str, object] = {"size": 4 << 20, "state": tmp_path / "state", "seed": 42}
    blkio.run(bridge.listen, "fill", **options)
    with blkio.start(bridge.listen, "write-read", depth=8, seconds=5, **options) as client:
        client.wait_for_output(blkio.RUNNING)
        disk.signal(signal.SIGSTOP)
        bridge.command("suspend", check=False)
        bridge.wait_for_output("the back-end failed: ")
        os.unlink(disk.socket)
        with StorageDaemon(disk.image, disk.socket, queues=4):
            log = bridge.wait_for_output(f"process {disk.pid}, which hangs, can still write")
            assert "running vrings" not in bridge.output[log:]
            disk.kill()
            disk.qmp.close()
            bridge.wait_for_output("running vrings", start=log, timeout=60)
            blkio.finish(client)
            blkio.run(bridge.listen, "verify", **options)
    eventually(lambda: bridge.status().front_end is None, "it has left")
