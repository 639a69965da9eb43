"""The daemon as a service: readiness, watchdog, and a configuration that is read again."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.peers import blkio
from tests.peers.bridge import COMMAND, Bridge
from tests.peers.process import Process, eventually
from tests.peers.storage import StorageDaemon, make_image
from tests.rig.root import peer_argv

UNITS = sorted(Path(__file__).parents[2].joinpath("packaging/systemd").iterdir())


def table(name: str, listen: Path, backend: Path) -> str:
    return f'[[bridge]]\nname = "{name}"\nlisten = "{listen}"\nbackend = "vhost-user:{backend}"\n'


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The socket where a service manager listens."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(20)
        sock.bind(str(tmp_path / "notify"))
        yield sock


def serve(config: Path, tmp_path: Path, **environment: str) -> Process:
    argv: list[str | Path] = [
        COMMAND,
        "serve",
        "--config",
        config,
        "--control",
        tmp_path / "control",
    ]
    env = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify"), **environment}
    return Process(argv, name="vhost-bridge", env=env)


def test_manager_is_told_when_it_serves_reloads_and_stops(
    disk: StorageDaemon, manager: socket.socket, tmp_path: Path
) -> None:
    config = tmp_path / "many.toml"
    config.write_text(table("one", tmp_path / "one.sock", disk.socket))
    with serve(config, tmp_path) as daemon:
        assert manager.recv(4096) == b"READY=1\nSTATUS=serving 1 bridge"
        assert (tmp_path / "one.sock").is_socket()
        daemon.signal(signal.SIGHUP)
        first, _, stamp = manager.recv(4096).partition(b"\nMONOTONIC_USEC=")
        assert first == b"RELOADING=1" and stamp.isdigit()
        assert manager.recv(4096) == b"READY=1\nSTATUS=serving 1 bridge"
        daemon.signal(signal.SIGTERM)
        assert manager.recv(4096) == b"STOPPING=1"
        assert daemon.wait() == 0, daemon.output


def _said(manager: socket.socket) -> bytes:
    try:
        return manager.recv(4096)
    except TimeoutError:
        return b""


def test_watchdog_is_fed_twice_in_its_time(
    disk: StorageDaemon, manager: socket.socket, tmp_path: Path
) -> None:
    config = tmp_path / "many.toml"
    config.write_text(table("one", tmp_path / "one.sock", disk.socket))
    with serve(config, tmp_path, WATCHDOG_USEC="200000") as daemon:
        told = [manager.recv(4096) for _ in range(6)]
        assert told.count(b"WATCHDOG=1") == 5, told
        # One that stands still is not alive.
        daemon.signal(signal.SIGSTOP)
        manager.settimeout(0.5)
        while _said(manager):
            pass
        daemon.signal(signal.SIGCONT)
        manager.settimeout(20)
        assert manager.recv(4096) == b"WATCHDOG=1"


def test_reload_does_not_touch_bridges_that_did_not_change(
    disk: StorageDaemon, tmp_path: Path
) -> None:
    """One under load stays, one goes, one comes, one gets another back-end."""
    config, control = tmp_path / "many.toml", tmp_path / "control"
    options: dict[str, object] = {"size": 4 << 20, "state": tmp_path / "state", "seed": 21}
    image = make_image(tmp_path / "second")
    stay, go, change, come = (tmp_path / f"{name}.sock" for name in ("s", "g", "h", "c"))
    with (
        StorageDaemon(image, tmp_path / "a.sock") as a,
        StorageDaemon(image, tmp_path / "b.sock") as b,
        StorageDaemon(image, tmp_path / "d.sock") as d,
    ):
        same = table("stay", stay, disk.socket)
        config.write_text(same + table("go", go, a.socket) + table("change", change, b.socket))
        with Bridge(control=control, arguments=["--config", config]) as daemon:
            blkio.run(stay, "fill", **options)
            with blkio.start(stay, "write-read", depth=8, seconds=3, **options) as client:
                client.wait_for_output(blkio.RUNNING)
                config.write_text(
                    table("come", come, b.socket) + same + table("change", change, d.socket)
                )
                daemon.signal(signal.SIGHUP)
                daemon.wait_for_output("reloaded, serving 3 bridges")
                assert not go.exists()
                blkio.run(come, "randread", seconds=1, depth=1)
                blkio.run(change, "randread", seconds=1, depth=1)
                blkio.finish(client)
            told = subprocess.run(
                [COMMAND, "status", "-j", "--control", control],
                check=True,
                capture_output=True,
            )
            found = {one["name"]: one for one in json.loads(told.stdout)["bridges"]}
            assert set(found) == {"come", "stay", "change"}
            assert found["change"]["backend"] == f"vhost-user:{d.socket}"
    blkio.verify_file(disk.image, **options)


def test_file_with_a_mistake_changes_nothing_and_its_line_is_told(
    disk: StorageDaemon, tmp_path: Path
) -> None:
    config = tmp_path / "many.toml"
    listen = tmp_path / "one.sock"
    good = table("one", listen, disk.socket)
    config.write_text(good)
    arguments: list[str | Path] = ["--config", config]
    with Bridge(control=tmp_path / "control", arguments=arguments) as daemon:
        config.write_text(good + '\n[[bridge]]\nname = "two"\nlistne = "/x"\n')
        daemon.signal(signal.SIGHUP)
        daemon.wait_for_output(f"SIGHUP: nothing changed: {config}, line 8: bridge 2: unknown key")
        blkio.run(listen, "randread", seconds=1, depth=1)


def test_new_bridge_that_can_not_start_is_told_and_the_others_go_on(
    disk: StorageDaemon, tmp_path: Path
) -> None:
    config = tmp_path / "many.toml"
    listen = tmp_path / "one.sock"
    good = table("one", listen, disk.socket)
    config.write_text(good)
    arguments: list[str | Path] = ["--config", config]
    with Bridge(control=tmp_path / "control", arguments=arguments) as daemon:
        config.write_text(good + table("two", tmp_path / "two.sock", tmp_path / "nobody"))
        daemon.signal(signal.SIGHUP)
        daemon.wait_for_output("two: not started: there is no socket")
        daemon.wait_for_output("reloaded, serving 1 bridge")
        blkio.run(listen, "randread", seconds=1, depth=1)


def test_reload_waits_for_bridges_that_are_still_being_started(
    disk: StorageDaemon, tmp_path: Path
) -> None:
    """One would be started a second time, and fail at its own socket."""
    config, late = tmp_path / "many.toml", tmp_path / "late.sock"
    patient = 'backend-command = "sleep 600"\n'
    config.write_text(table("one", tmp_path / "one.sock", late) + patient)
    with serve(config, tmp_path) as daemon:
        eventually((tmp_path / "one.sock").is_socket, "it listens")
        daemon.signal(signal.SIGHUP)
        daemon.signal(signal.SIGHUP)
        time.sleep(0.3)
        with StorageDaemon(disk.image, late):
            daemon.wait_for_output("reloaded, serving 1 bridge")
            assert "not started" not in daemon.output
            blkio.run(tmp_path / "one.sock", "randread", seconds=1, depth=1)
            assert daemon.terminate() == 0, daemon.output


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_unit_is_one_that_systemd_takes(unit: Path, tmp_path: Path) -> None:
    for one in UNITS:  # a socket needs its service
        copy = tmp_path / one.name.replace("@", "@vm1")
        copy.write_text(one.read_text().replace("/usr/bin/vhost-bridge", "/bin/true"))
    chosen = tmp_path / unit.name.replace("@", "@vm1")
    told = subprocess.run(
        peer_argv(["systemd-analyze", "verify", "--man=no", chosen]),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (told.returncode, told.stderr) == (0, ""), told.stderr


@pytest.mark.parametrize(
    "unit", [one for one in UNITS if one.suffix == ".service"], ids=lambda unit: unit.name
)
def test_exposure_is_what_the_guide_says(unit: Path) -> None:
    analyze = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(unit)]
    told = subprocess.run(peer_argv(analyze), capture_output=True, text=True, timeout=60)
    assert "Overall exposure level for" in told.stdout and ": 1.0 OK" in told.stdout, told
