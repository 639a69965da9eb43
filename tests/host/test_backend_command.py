"""Back-ends that the bridge starts itself: killed under load, ended with it, never left behind."""

from __future__ import annotations

import os
import random
import shlex
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.peers import blkio
from tests.peers.bridge import COMMAND, Bridge
from tests.peers.process import Process, eventually
from tests.peers.storage import StorageDaemon, make_image
from tests.rig.root import peer_argv

ROUNDS = 200 if os.environ.get("VHOST_BRIDGE_SOAK") else 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return make_image(tmp_path / "image")


def storage_command(image: Path, socket: Path, queues: int = 1) -> str:
    """A qemu-storage-daemon without a monitor."""
    export = f"{StorageDaemon.export_options(socket)},num-queues={queues}"
    disk = f"driver=file,node-name=disk,filename={image},locking=off"
    argv = ["qemu-storage-daemon", "--blockdev", disk, "--export", export]
    return shlex.join(map(str, peer_argv(argv)))


def starting(image: Path, folder: Path, *arguments: str) -> Bridge:
    socket = folder / "disk.sock"
    command = ["--backend-command", storage_command(image, socket)]
    return Bridge(
        f"vhost-user:{socket}", listen=folder / "vm.sock", arguments=[*command, *arguments]
    )


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@pytest.mark.soak
def test_back_end_killed_at_any_moment_is_started_again(image: Path, tmp_path: Path) -> None:
    """Under a verified load; the front-end sees a pause only."""
    chance = random.Random(20261128)
    options: dict[str, object] = {"size": 4 << 20, "state": tmp_path / "state", "seed": 33}
    with starting(image, tmp_path, "--shadow") as bridge:
        blkio.run(bridge.listen, "fill", **options)
        with blkio.start(bridge.listen, "write-read", depth=16, seconds=900, **options) as client:
            client.wait_for_output(blkio.RUNNING)
            for _ in range(ROUNDS):
                time.sleep(chance.uniform(0, 0.05))
                log = len(bridge.output)
                pid = bridge.status().backend_pid
                assert pid is not None
                os.kill(pid, signal.SIGKILL)
                bridge.wait_for_output("was ended by SIGKILL", start=log)
                bridge.wait_for_output("running vrings", start=log)
                assert client.poll() is None, client.output
            client.kill()
        blkio.run(bridge.listen, "verify", **options)
        last = bridge.status().backend_pid
    assert last is not None and not alive(last)
    blkio.verify_file(image, **options)


def test_back_end_that_hangs_is_killed_and_started_again(image: Path, tmp_path: Path) -> None:
    """Stopped under a verified load, and noticed when it is asked something."""
    options: dict[str, object] = {"size": 4 << 20, "state": tmp_path / "state", "seed": 35}
    with starting(image, tmp_path, "--shadow") as bridge:
        blkio.run(bridge.listen, "fill", **options)
        with blkio.start(bridge.listen, "write-read", depth=8, seconds=3, **options) as client:
            client.wait_for_output(blkio.RUNNING)
            bridge.wait_for_output("running vrings", start=bridge.output.rindex("connected"))
            pid = bridge.status().backend_pid
            assert pid is not None
            os.kill(pid, signal.SIGSTOP)
            bridge.command("suspend", check=False)
            log = bridge.wait_for_output(f"killing the back-end (pid {pid}): it hangs")
            bridge.wait_for_output("running vrings", start=log)
            blkio.finish(client)
        blkio.run(bridge.listen, "verify", **options)
    blkio.verify_file(image, **options)


def test_back_end_ends_after_its_device_has_stopped(image: Path, tmp_path: Path) -> None:
    """SIGTERM to the daemon: what was in flight is done, then the back-end is told to end."""
    options: dict[str, object] = {"size": 4 << 20, "state": tmp_path / "state", "seed": 34}
    with starting(image, tmp_path) as bridge:
        blkio.run(bridge.listen, "fill", **options)
        with blkio.start(bridge.listen, "write-read", depth=8, seconds=60, **options) as client:
            client.wait_for_output(blkio.RUNNING)
            pid = bridge.status().backend_pid
            assert pid is not None
            bridge.stop()
            client.kill()
    assert not alive(pid)
    assert "the back-end failed" not in bridge.output
    blkio.verify_file(image, **options)


def test_back_end_does_not_outlive_a_daemon_that_is_killed(image: Path, tmp_path: Path) -> None:
    pids: list[int] = []
    with suppress(AssertionError), starting(image, tmp_path) as bridge:  # of a daemon's bad end
        pids.append(bridge.status().backend_pid or 0)
        assert alive(pids[0])
        bridge.kill()
    eventually(lambda: not alive(pids[0]), "it is gone")


def test_back_end_that_does_not_start_is_told(tmp_path: Path) -> None:
    """Its own last words are in the log."""
    where: list[str | Path] = ["--name", "b", "--listen", tmp_path / "s", "--no-control"]
    backend = ["--backend", f"vhost-user:{tmp_path}/none"]
    command = ["--backend-command", "sh -c 'echo it is broken >&2; exit 4'"]
    with Process([COMMAND, "serve", *where, *backend, *command], name="vhost-bridge") as daemon:
        daemon.wait_for_output("INFO b: back-end: it is broken")
        daemon.wait_for_output("WARNING b: the back-end (pid ")
        daemon.wait_for_output("ended with status 4")
