"""A back-end's internal state of any size, and whoever is killed in the middle of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.peers import stateful
from tests.peers.bridge import COMMAND, Bridge
from tests.peers.process import Process, eventually
from tests.vm.guest.frontend import Frontend
from tests.vm.guest.memory import Memory
from tests.vm.guest.vring import SplitRing

MIB = 1 << 20
LARGE = 4096 * MIB if os.environ.get("VHOST_BRIDGE_SOAK") else 256 * MIB


def backend(socket: Path, size: int, *words: str) -> Process:
    argv: list[str | Path] = [sys.executable, stateful.__file__, socket, str(size), *words]
    return Process(argv, name="stateful back-end")


@contextmanager
def suspended(folder: Path, size: int, *words: str) -> Iterator[tuple[Bridge, Process]]:
    """A bridge whose device has run for a front-end and is suspended."""
    with backend(folder / "sock", size, *words) as server:
        server.wait_for_output("ready")
        with (
            Bridge(f"vhost-user:{folder / 'sock'}", listen=folder / "vm.sock") as bridge,
            Frontend(str(bridge.listen)) as front_end,
        ):
            front_end.negotiate(protocol=1 << 0 | 1 << 3)
            ring = SplitRing(Memory())
            front_end.set_memory([ring.memory])
            front_end.start([ring])
            eventually(lambda: bridge.status().state == "running", "the device runs")
            bridge.operate("Suspend")
            yield bridge, server
            ring.close()
            ring.memory.close()


@pytest.mark.soak
def test_large_state_streams_in_constant_memory(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with suspended(tmp_path, LARGE) as (bridge, server):
        before = bridge.footprint().resident_kib
        bridge.command("save", state)
        assert state.stat().st_size > LARGE
        bridge.command("load", state)
        server.wait_for_output(f"loaded {LARGE}\n")
        assert bridge.footprint().resident_kib < before + 24 * 1024
        assert bridge.operate("Resume") == "running"


def test_state_goes_through_pipes(tmp_path: Path) -> None:
    """As it does with ssh, and progress is for terminals only."""
    size = 40 * MIB + 17
    with suspended(tmp_path, size) as (bridge, server):
        with (tmp_path / "copy").open("wb") as copy:
            argv: list[str | Path] = [COMMAND, "save", "--control", bridge.control, "b", "-"]
            save = subprocess.Popen(argv, stdout=subprocess.PIPE)
            with save:
                assert save.stdout is not None
                while data := save.stdout.read(MIB):
                    copy.write(data)
            assert save.returncode == 0
        with (tmp_path / "copy").open("rb") as copy:
            load = subprocess.run(
                f"cat | {COMMAND} load --control {bridge.control} b -",
                shell=True,
                stdin=copy,
                check=True,
                capture_output=True,
            )
        assert load.stderr == b""
        server.wait_for_output(f"loaded {size}\n")


def start(bridge: Bridge, verb: str, file: Path) -> subprocess.Popen[bytes]:
    argv: list[str | Path] = [COMMAND, verb, "--control", bridge.control, "b", file]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_save_whose_command_is_killed_leaves_no_file(tmp_path: Path) -> None:
    """And the device as it was: the next save is whole."""
    kept = tmp_path / "states"
    kept.mkdir()
    (kept / "state").write_bytes(b"what was there")
    with suspended(tmp_path, 20 * MIB, "slow") as (bridge, server):
        with start(bridge, "save", kept / "state") as save:
            bridge.wait_for_output("save asked for")
            save.kill()
        eventually(lambda: bridge.status().state == "suspended", "the daemon answers")
        assert (kept / "state").read_bytes() == b"what was there"
        assert [path.name for path in kept.iterdir()] == ["state"]
        assert bridge.command("save", kept / "state").returncode == 0
        server.wait_for_output("saved")
        assert (kept / "state").stat().st_size > 20 * MIB


def test_save_whose_daemon_is_killed_leaves_no_file(tmp_path: Path) -> None:
    kept = tmp_path / "states"
    kept.mkdir()
    running = suspended(tmp_path, 20 * MIB, "slow")
    bridge, _ = running.__enter__()
    with start(bridge, "save", kept / "state") as save:
        bridge.wait_for_output("save asked for")
        bridge.kill()
        _, text = save.communicate()
    assert save.returncode == 3, text
    assert b"closed the connection before it answered" in text
    assert list(kept.iterdir()) == []
    running.__exit__(None, None, None)


def test_save_whose_back_end_is_killed_leaves_no_file(tmp_path: Path) -> None:
    kept = tmp_path / "states"
    kept.mkdir()
    with suspended(tmp_path, 20 * MIB, "slow") as (bridge, server):
        with start(bridge, "save", kept / "state") as save:
            bridge.wait_for_output("save asked for")
            server.kill()
            _, text = save.communicate()
        assert save.returncode in (1, 3)
        assert text.startswith(b"vhost-bridge: ")
        assert b"Traceback" not in text
        assert list(kept.iterdir()) == []


@pytest.mark.parametrize("victim", ["command", "back-end"])
def test_load_that_is_cut_short_leaves_no_half_loaded_device(tmp_path: Path, victim: str) -> None:
    """The back-end is left, and is taken up anew, without any state, by the next load."""
    state, size = tmp_path / "state", 20 * MIB
    with suspended(tmp_path, size, "slow") as (bridge, server):
        bridge.command("save", state)
        with start(bridge, "load", state) as load:
            server.wait_for_output("loading")
            if victim == "command":
                load.kill()
                bridge.wait_for_output("the back-end failed: ")
            else:
                server.kill()
                _, text = load.communicate()
                assert load.returncode in (1, 3), text
                assert b"Traceback" not in text
        assert "loaded " not in server.output
        if victim == "back-end":
            (tmp_path / "sock").unlink()
            server = backend(tmp_path / "sock", size)
        with server:
            eventually(lambda: bridge.status().state == "reset", "the back-end is there again")
            assert bridge.command("load", state).returncode == 0
            server.wait_for_output(f"loaded {size}\n")
            assert bridge.operate("Resume") == "running"


def test_load_whose_daemon_is_killed_leaves_nothing_loaded(tmp_path: Path) -> None:
    """The next daemon finds the device reset, and loads it whole."""
    state, size = tmp_path / "state", 20 * MIB
    running = suspended(tmp_path, size, "slow")
    bridge, server = running.__enter__()
    bridge.command("save", state)
    with start(bridge, "load", state) as load:
        server.wait_for_output("loading")
        bridge.kill()
        _, text = load.communicate()
    assert load.returncode == 3, text
    with Bridge(f"vhost-user:{tmp_path / 'sock'}", listen=tmp_path / "vm.sock") as second:
        assert "loaded " not in server.output
        assert second.status().state == "reset"
        assert second.command("load", state).returncode == 0
        server.wait_for_output(f"loaded {size}\n")
        assert second.status().state == "suspended"
    running.__exit__(None, None, None)
