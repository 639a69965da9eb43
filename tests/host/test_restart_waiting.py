"""A state that waits for a front-end, over restarts of the daemon."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from tests.host.restarts import status, stop
from tests.peers import blkio, stateful
from tests.peers.bridge import COMMAND, Bridge
from tests.peers.manager import Manager
from tests.peers.process import Process, eventually
from tests.peers.storage import StorageDaemon
from tests.vm.guest.frontend import Frontend
from tests.vm.guest.memory import Memory
from tests.vm.guest.vring import SplitRing


def command(verb: str, tmp_path: Path, *arguments: Path) -> None:
    subprocess.run(
        [COMMAND, verb, "--control", tmp_path / "control", "vm1", *arguments],
        check=True,
        timeout=60,
    )


def base(tmp_path: Path) -> int | None:
    return status(tmp_path).vrings[0].base


def test_state_that_waits_for_a_front_end_waits_over_restarts(
    disk: StorageDaemon, manager: Manager, arguments: list[str | Path], tmp_path: Path
) -> None:
    """One that was loaded: also while the back-end is not there."""
    daemon = manager.start(*arguments)
    with blkio.start(tmp_path / "vm.sock", "randread", seconds=60, depth=1) as client:
        client.wait_for_output(blkio.RUNNING)
        time.sleep(0.1)
        command("suspend", tmp_path)
        command("save", tmp_path, tmp_path / "saved")
        client.kill()
    daemon.wait_for_output("left")
    command("load", tmp_path, tmp_path / "saved")
    before = base(tmp_path)
    assert before
    assert "vm1: the waiting state is handed over" in stop(daemon)
    daemon = manager.start(*arguments)
    assert (status(tmp_path).incoming, status(tmp_path).kept) == (True, False)
    assert (status(tmp_path).state, base(tmp_path)) == ("suspended", before)
    stop(daemon)
    disk.kill()
    daemon = manager.start(*arguments)
    assert "the waiting state is handed over" in stop(daemon)
    daemon = manager.start(*arguments)
    with StorageDaemon(disk.image, disk.socket, queues=4):
        daemon.wait_for_output("is ready")
        assert (status(tmp_path).incoming, base(tmp_path)) == (True, before)
        # It is another guest's.
        with blkio.start(tmp_path / "vm.sock", "randread", seconds=60, depth=1):
            daemon.wait_for_output("does not go on where the loaded state stopped")
        daemon.terminate()
        assert "the waiting state is handed over" in daemon.output
    daemon.kill()
    assert [name for name, _ in manager.store if name.startswith("state")] == ["state.LOADED.vm1"]


def test_front_end_goes_on_where_its_device_was_kept_before_a_restart(
    disk: StorageDaemon, manager: Manager, arguments: list[str | Path], tmp_path: Path
) -> None:
    keep: list[str | Path] = [*arguments, "--on-disconnect", "keep"]
    memory = Path(f"/dev/shm/vhost-bridge-{os.getpid()}-restart")
    survivor: list[str | Path] = [
        sys.executable,
        "-m",
        "tests.vm.guest.survivor",
        tmp_path / "vm.sock",
        memory,
    ]
    try:
        daemon = manager.start(*keep)
        with Process([*survivor, "1"], name="survivor") as front_end:
            front_end.wait_for_output("running")
            time.sleep(0.1)
            front_end.kill()
        daemon.wait_for_output("kept suspended")
        stop(daemon)
        daemon = manager.start(*keep)
        assert status(tmp_path).kept
        with Process([*survivor, "2", "0.1"], name="survivor") as last:
            assert last.wait() == 0, last.output
        assert "the front-end goes on where the device was kept" in stop(daemon)
    finally:
        memory.unlink(missing_ok=True)


def test_internal_state_that_waits_goes_along(
    manager: Manager, arguments: list[str | Path], tmp_path: Path
) -> None:
    """Also while the back-end is not there."""
    size = 3 << 20
    state, socket_path = tmp_path / "saved", tmp_path / "stateful.sock"
    arguments[3] = f"vhost-user:{socket_path}"
    back_end: list[str | Path] = [sys.executable, stateful.__file__, socket_path, str(size)]
    with Process(back_end, name="s") as server:
        server.wait_for_output("ready")
        daemon = manager.start(*arguments)
        with Frontend(str(tmp_path / "vm.sock")) as front_end:
            front_end.negotiate(protocol=1 << 0 | 1 << 3)
            ring = SplitRing(Memory())
            front_end.set_memory([ring.memory])
            front_end.start([ring])
            eventually(lambda: status(tmp_path).state == "running", "the device runs")
            command("suspend", tmp_path)
            command("save", tmp_path, state)
            ring.close()
            ring.memory.close()
        daemon.wait_for_output("left")
        command("load", tmp_path, state)
        told = server.wait_for_output(f"loaded {size}\n")
        stop(daemon)
        daemon = manager.start(*arguments)
        server.wait_for_output(f"loaded {size}\n", start=told)
        assert status(tmp_path).incoming
        stop(daemon)
    assert "the waiting state is handed over" in stop(manager.start(*arguments))
    socket_path.unlink()
    with Process(back_end, name="s") as server:
        daemon = manager.start(*arguments)
        server.wait_for_output(f"loaded {size}\n")
        stop(daemon)


def test_state_that_waits_where_nothing_is_kept_is_told(
    disk: StorageDaemon, tmp_path: Path
) -> None:
    with Bridge(f"vhost-user:{disk.socket}", listen=tmp_path / "vm.sock") as bridge:
        with blkio.start(bridge.listen, "randread", seconds=60, depth=1) as client:
            client.wait_for_output(blkio.RUNNING)
            bridge.command("suspend")
            bridge.command("save", tmp_path / "saved")
            client.kill()
        bridge.wait_for_output("left")
        bridge.command("load", tmp_path / "saved")
        bridge.stop()
        assert bridge.lines("WARNING") == [
            "WARNING b: the waiting state is given up: the bridge ends"
        ]
