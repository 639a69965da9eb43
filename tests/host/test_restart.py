"""The daemon is restarted under its front-ends: they see a pause, and no request is lost."""

from __future__ import annotations

import os
import random
import signal
import socket
import time
from pathlib import Path

import pytest

from tests.host.restarts import status, stop
from tests.peers import blkio
from tests.peers.manager import Manager
from tests.peers.storage import StorageDaemon, make_image
from tests.peers.vmm import RustVmm
from vhostbridge.bridge.control_client import ControlClient

ROUNDS = 100 if os.environ.get("VHOST_BRIDGE_SOAK") else 10
SIZE = 4 << 20
BRIDGE = '[[bridge]]\nname = "{}"\nlisten = "{}"\nbackend = "vhost-user:{}"\n'


@pytest.mark.soak
def test_restart_at_any_moment_is_a_pause(
    disk: StorageDaemon, manager: Manager, arguments: list[str | Path], tmp_path: Path
) -> None:
    """Again and again under a verified load; every block is right, and the client never knew."""
    chance = random.Random(20261126)
    options: dict[str, object] = {"size": SIZE, "state": tmp_path / "state", "seed": 31}
    daemon = manager.start(*arguments)
    blkio.run(tmp_path / "vm.sock", "fill", **options)
    with blkio.start(
        tmp_path / "vm.sock", "write-read", depth=16, seconds=600, **options
    ) as client:
        client.wait_for_output(blkio.RUNNING)
        pid = status(tmp_path).front_end
        for _ in range(ROUNDS):
            time.sleep(chance.uniform(0, 0.1))
            log = stop(daemon)
            assert "handed over" in log and "cut off" not in log, log
            daemon = manager.start(*arguments)
            daemon.wait_for_output("taken over, pause ")
            assert client.poll() is None, client.output
            (pause,) = status(tmp_path).pauses.items()
            assert pause[0] == "restart" and pause[1].count == 1 and pause[1].seconds > 0.01
        assert status(tmp_path).front_end == pid
        client.kill()
    blkio.run(tmp_path / "vm.sock", "verify", **options)
    stop(daemon)
    blkio.verify_file(disk.image, **options)


def test_device_whose_front_end_paused_it_stays_so(
    disk: StorageDaemon, manager: Manager, arguments: list[str | Path], tmp_path: Path
) -> None:
    daemon = manager.start(*arguments)
    with RustVmm(tmp_path / "vm.sock") as vmm:
        time.sleep(0.1)
        vmm.tell("pause")
        stop(daemon)
        before = disk.image.read_bytes()
        daemon = manager.start(*arguments)
        daemon.wait_for_output("taken over")
        time.sleep(0.1)
        assert (status(tmp_path).state, status(tmp_path).held) == ("suspended", False)
        assert disk.image.read_bytes() == before
        vmm.tell("resume")
        assert vmm.finish()["verified"] > 0
    stop(daemon)


def test_device_that_was_suspended_stays_so(
    disk: StorageDaemon, manager: Manager, arguments: list[str | Path], tmp_path: Path
) -> None:
    options: dict[str, object] = {"size": SIZE, "state": tmp_path / "state", "seed": 32}
    daemon = manager.start(*arguments)
    blkio.run(tmp_path / "vm.sock", "fill", **options)
    with blkio.start(tmp_path / "vm.sock", "write-read", depth=8, seconds=2, **options) as client:
        client.wait_for_output(blkio.RUNNING)
        with ControlClient(tmp_path / "control") as control:
            control.operate("Suspend", "vm1")
        stop(daemon)
        before = disk.image.read_bytes()
        daemon = manager.start(*arguments)
        daemon.wait_for_output("taken over")
        assert (status(tmp_path).state, status(tmp_path).held) == ("suspended", True)
        time.sleep(0.05)
        assert disk.image.read_bytes() == before
        with ControlClient(tmp_path / "control") as control:
            control.operate("Resume", "vm1")
        assert status(tmp_path).pauses["operator"].seconds > 0.05
        blkio.finish(client)
    stop(daemon)
    blkio.verify_file(disk.image, **options)


def test_front_end_that_comes_meanwhile_waits(
    disk: StorageDaemon, manager: Manager, arguments: list[str | Path], tmp_path: Path
) -> None:
    daemon = manager.start(*arguments)
    stop(daemon)
    with blkio.start(tmp_path / "vm.sock", "fill", size=1 << 20, seed=33) as client:
        # It is connected to a socket that nobody reads.
        with pytest.raises(AssertionError):
            blkio.finish(client, timeout=0.3)
        daemon = manager.start(*arguments)
        blkio.finish(client)
    stop(daemon)
    blkio.verify_file(disk.image, size=1 << 20, seed=33)


def test_stop_hangs_up(manager: Manager, arguments: list[str | Path], tmp_path: Path) -> None:
    """What is kept goes with the service; the next start replaces the dead socket."""
    daemon = manager.start(*arguments)
    with socket.socket(socket.AF_UNIX) as front_end:
        front_end.settimeout(20)
        front_end.connect(str(tmp_path / "vm.sock"))
        daemon.wait_for_output("front-end connected")
        stop(daemon)
        manager.release()
        assert front_end.recv(1) == b""
    daemon = manager.start(*arguments)
    blkio.run(tmp_path / "vm.sock", "fill", size=1 << 20)
    stop(daemon)


def test_half_a_message_is_waited_for(
    manager: Manager, arguments: list[str | Path], tmp_path: Path
) -> None:
    """The other half arrives during the stop, is answered then, and the next one after it."""
    get_features = bytes.fromhex("010000000100000000000000")
    daemon = manager.start(*arguments)
    with socket.socket(socket.AF_UNIX) as front_end:
        front_end.settimeout(20)
        front_end.connect(str(tmp_path / "vm.sock"))
        front_end.sendall(get_features[:5])
        daemon.wait_for_output("front-end connected")
        daemon.signal(15)
        daemon.wait_for_output("stopping: SIGTERM")
        front_end.sendall(get_features[5:])
        answer = front_end.recv(100)
        assert len(answer) == 20
        front_end.sendall(get_features)
        assert daemon.wait() == 0, daemon.output
        daemon.kill()
        daemon = manager.start(*arguments)
        assert front_end.recv(100) == answer
    stop(daemon)


def test_front_end_is_cut_off_where_its_session_can_not_go_on(
    disk: StorageDaemon, manager: Manager, arguments: list[str | Path], tmp_path: Path
) -> None:
    """Another disk is there: what connects anew has it, at once."""
    daemon = manager.start(*arguments)
    with blkio.start(tmp_path / "vm.sock", "randread", seconds=60, depth=4) as client:
        client.wait_for_output(blkio.RUNNING)
        stop(daemon)
        with StorageDaemon(make_image(tmp_path / "small", 8 << 20), tmp_path / "s.sock") as small:
            arguments[3] = f"vhost-user:{small.socket}"
            daemon = manager.start(*arguments)
            daemon.wait_for_output("can't be used: ")
            assert "configuration differs from the state" in daemon.output
            blkio.run(tmp_path / "vm.sock", "fill", size=1 << 20, seed=34)
            stop(daemon)
            blkio.verify_file(small.image, size=1 << 20, seed=34)


@pytest.mark.parametrize("more", [0, 2])
def test_front_end_waits_for_a_back_end_that_is_not_there_yet(
    disk: StorageDaemon, manager: Manager, arguments: list[str | Path], tmp_path: Path, more: int
) -> None:
    """Over more restarts too, in which the back-end never comes."""
    options: dict[str, object] = {"size": SIZE, "state": tmp_path / "state", "seed": 35}
    daemon = manager.start(*arguments)
    blkio.run(tmp_path / "vm.sock", "fill", **options)
    with blkio.start(tmp_path / "vm.sock", "write-read", depth=8, seconds=2, **options) as client:
        client.wait_for_output(blkio.RUNNING)
        stop(daemon)
        disk.kill()
        for _ in range(more):
            daemon = manager.start(*arguments)
            daemon.wait_for_output("waiting for the back-end")
            assert "front-end handed over as it came" in stop(daemon)
        daemon = manager.start(*arguments)
        daemon.wait_for_output("waiting for the back-end")
        with StorageDaemon(disk.image, disk.socket, queues=4):
            blkio.finish(client)
            stop(daemon)
    blkio.verify_file(disk.image, **options)


def test_front_end_goes_on_after_a_process_that_was_ended_before_it_was_ready(
    disk: StorageDaemon, manager: Manager, arguments: list[str | Path], tmp_path: Path
) -> None:
    """It waited for a back-end that does not answer."""
    options: dict[str, object] = {"size": SIZE, "state": tmp_path / "state", "seed": 37}
    hanging: list[str | Path] = [*arguments]
    hanging[3] = f"vhost-user:{tmp_path / 'hanging.sock'}"
    daemon = manager.start(*arguments)
    blkio.run(tmp_path / "vm.sock", "fill", **options)
    with blkio.start(tmp_path / "vm.sock", "write-read", depth=8, seconds=2, **options) as client:
        client.wait_for_output(blkio.RUNNING)
        stop(daemon)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(tmp_path / "hanging.sock"))
            listener.listen()
            listener.settimeout(20)
            daemon = manager.begin(*hanging)
            connection, _ = listener.accept()
            with connection:
                assert "front-end handed over as it came" in stop(daemon)
        daemon = manager.start(*arguments)
        daemon.wait_for_output("taken over, pause ")
        blkio.finish(client)
        stop(daemon)
    blkio.verify_file(disk.image, **options)


def test_what_can_not_start_costs_front_ends_that_were_handed_over_nothing(
    disk: StorageDaemon, manager: Manager, tmp_path: Path
) -> None:
    """Whoever restarts has written something into the file, with a mistake in all of it."""
    options: dict[str, object] = {"size": SIZE, "state": tmp_path / "state", "seed": 41}
    config, missing = tmp_path / "bridges.toml", tmp_path / "missing"
    first = BRIDGE.format("vm1", tmp_path / "vm.sock", disk.socket)
    config.write_text(first)
    daemon = manager.start("--config", config, "--no-control")
    blkio.run(tmp_path / "vm.sock", "fill", **options)
    with blkio.start(tmp_path / "vm.sock", "write-read", depth=8, seconds=3, **options) as client:
        client.wait_for_output(blkio.RUNNING)
        stop(daemon)
        for name in ("control", "metrics", "trace"):
            first = f'{name} = "{missing / name}"\n{first}'
        config.write_text(first + BRIDGE.format("vm2", missing / "vm2.sock", disk.socket))
        daemon = manager.start("--config", config)
        daemon.wait_for_output("taken over, pause ")
        blkio.finish(client)
    for text in ("vm2: not started: ", "control: not started: ", "metrics: not started: "):
        assert text in daemon.output
    assert "no trace is written: " in daemon.output
    stop(daemon)
    blkio.verify_file(disk.image, **options)


def test_front_end_waits_until_its_bridge_can_start(
    disk: StorageDaemon, manager: Manager, tmp_path: Path
) -> None:
    """Alone it ends the new process, beside another bridge a reload is waited for."""
    options: dict[str, object] = {"size": SIZE, "state": tmp_path / "state", "seed": 43}
    config = tmp_path / "bridges.toml"
    right = BRIDGE.format("vm1", tmp_path / "vm.sock", disk.socket)
    wrong = BRIDGE.format("vm1", tmp_path / "missing" / "vm.sock", disk.socket)
    other = BRIDGE.format("vm2", tmp_path / "vm2.sock", disk.socket)
    config.write_text(right)
    daemon = manager.start("--config", config, "--no-control")
    blkio.run(tmp_path / "vm.sock", "fill", **options)
    with blkio.start(tmp_path / "vm.sock", "write-read", depth=8, seconds=6, **options) as client:
        client.wait_for_output(blkio.RUNNING)
        stop(daemon)
        config.write_text(wrong)
        with manager.begin("--config", config, "--no-control") as daemon:
            assert daemon.wait() == 1
            assert "vm1: not started: " in daemon.output
        config.write_text(wrong + other)
        daemon = manager.begin("--config", config, "--no-control")
        daemon.wait_for_output("vm1: not started: ")
        config.write_text(right)
        daemon.signal(signal.SIGHUP)
        daemon.wait_for_output("taken over, pause ")
        blkio.finish(client)
    stop(daemon)
    blkio.verify_file(disk.image, **options)


def test_the_same_ends_a_start_where_none_were(
    disk: StorageDaemon, manager: Manager, tmp_path: Path
) -> None:
    device: list[str | Path] = ["--name", "vm1", "--backend", f"vhost-user:{disk.socket}"]
    place = "--listen", tmp_path / "missing" / "vm1.sock", "--no-control"
    with manager.begin(*device, *place) as daemon:
        assert daemon.wait() == 1
        assert "missing" in daemon.output


def test_socket_unit_starts_with_the_first_front_end(
    disk: StorageDaemon, manager: Manager, arguments: list[str | Path], tmp_path: Path
) -> None:
    """What it listens on is used, is not kept twice, and stays when the daemon goes."""
    manager.listen(tmp_path / "vm.sock")
    manager.listen(tmp_path / "control")
    with blkio.start(tmp_path / "vm.sock", "fill", size=1 << 20, seed=36) as client:
        daemon = manager.start(*arguments)
        blkio.finish(client)
    assert status(tmp_path).name == "vm1"
    stop(daemon)
    assert manager.store == []
    assert (tmp_path / "vm.sock").is_socket() and (tmp_path / "control").is_socket()
    blkio.verify_file(disk.image, size=1 << 20, seed=36)


def test_socket_unit_that_no_bridge_has_is_told(
    manager: Manager, arguments: list[str | Path], tmp_path: Path
) -> None:
    manager.listen(tmp_path / "other.sock")
    daemon = manager.start(*arguments)
    daemon.wait_for_output(f"{tmp_path / 'other.sock'}: inherited, but no bridge listens there")
    daemon.terminate()
    daemon.kill()
