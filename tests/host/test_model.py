"""Suspend, resume, save and load under running front-ends of real back-ends."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from tests.peers import blkio
from tests.peers.bridge import Bridge
from tests.peers.process import eventually
from tests.peers.storage import StorageDaemon
from vhostbridge.backends.errors import InvalidTransition, TransportLost, Unsupported

ROUNDS = 500 if os.environ.get("VHOST_BRIDGE_SOAK") else 50
SIZE = 4 << 20


# A back-end of libvhost-user may break at GET_VRING_BASE when it has requests in flight, and is
# connected to anew; the suspend is refused then.
def suspend(bridge: Bridge) -> None:
    for _ in range(3):
        try:
            assert bridge.operate("Suspend") == "suspended"
        except (Unsupported, TransportLost):
            eventually(lambda: bridge.status().state == "running", "the bridge recovers")
        else:
            return
    raise AssertionError("three refusals in a row")


@pytest.mark.soak
def test_suspend_at_any_moment_loses_no_request(
    disk: StorageDaemon, bridge: Bridge, tmp_path: Path
) -> None:
    """While it is suspended the image stands still; all that the front-end reads is right."""
    chance = random.Random(20261124)
    options: dict[str, object] = {"size": SIZE, "state": tmp_path / "state", "seed": 9}
    blkio.run(bridge.listen, "fill", **options)
    with blkio.start(bridge.listen, "write-read", depth=16, seconds=600, **options) as client:
        client.wait_for_output(blkio.RUNNING)
        for round_ in range(ROUNDS):
            time.sleep(chance.uniform(0, 0.02))
            suspend(bridge)
            (vring,) = bridge.status().vrings
            assert (vring.base, vring.problem) == (vring.used, "")
            if round_ % 10 == 0:
                before = disk.image.read_bytes()
                time.sleep(0.02)
                assert disk.image.read_bytes() == before
            assert bridge.operate("Resume") == "running"
        assert client.poll() is None, client.output
        client.kill()
    blkio.run(bridge.listen, "verify", **options)
    blkio.verify_file(disk.image, **options)


def test_save_and_load_between_suspend_and_resume(
    disk: StorageDaemon, bridge: Bridge, tmp_path: Path
) -> None:
    """Saving twice gives the same bytes, and what was saved is where it goes on."""
    options: dict[str, object] = {"size": SIZE, "state": tmp_path / "state", "seed": 10}
    first, second = tmp_path / "first", tmp_path / "second"
    blkio.run(bridge.listen, "fill", **options)
    with blkio.start(bridge.listen, "write-read", depth=8, seconds=6, **options) as client:
        client.wait_for_output(blkio.RUNNING)
        bridge.operate("Suspend")
        bridge.command("save", first)
        bridge.command("save", second)
        assert first.read_bytes() == second.read_bytes()
        assert first.stat().st_mode & 0o777 == 0o600
        assert bridge.command("load", first, "--dry-run").returncode == 0
        bridge.command("load", first)
        bridge.operate("Resume")
        blkio.finish(client)
    blkio.verify_file(disk.image, **options)


def test_back_end_that_dies_while_suspended_goes_on_where_it_was(
    disk: StorageDaemon, bridge: Bridge, tmp_path: Path
) -> None:
    """The front-end stays connected and notices nothing but the time."""
    options: dict[str, object] = {"size": SIZE, "state": tmp_path / "state", "seed": 11}
    blkio.run(bridge.listen, "fill", **options)
    with blkio.start(bridge.listen, "write-read", depth=8, seconds=4, **options) as client:
        client.wait_for_output(blkio.RUNNING)
        bridge.operate("Suspend")
        disk.kill()
        bridge.wait_for_output("waiting for the back-end: ")
        log = len(bridge.output)
        with StorageDaemon(disk.image, disk.socket, queues=4):
            bridge.wait_for_output("is ready", start=log)
            assert bridge.operate("Resume") == "running"
            blkio.finish(client)
    blkio.verify_file(disk.image, **options)


@pytest.mark.parametrize("verb", ["save", "resume"])
def test_what_needs_a_suspended_device_is_refused_while_it_runs(bridge: Bridge, verb: str) -> None:
    with blkio.start(bridge.listen, "randread", seconds=60, depth=1) as client:
        client.wait_for_output(blkio.RUNNING)
        if verb == "resume":
            assert bridge.operate("Resume") == "running"
            return
        refused = bridge.command("save", "-", check=False)
        assert refused.returncode == 1
        assert "cannot save a device that is running" in refused.stderr
        assert "Traceback" not in refused.stderr


def test_nothing_runs_without_a_front_end(bridge: Bridge) -> None:
    with pytest.raises(InvalidTransition, match="cannot suspend a device that is reset"):
        bridge.operate("Suspend")
