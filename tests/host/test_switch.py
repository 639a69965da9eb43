"""A running front-end's device moves between storage daemons that share an image."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.peers import blkio
from tests.peers.bridge import Bridge
from tests.peers.cut import Cut
from tests.peers.process import eventually
from tests.peers.storage import StorageDaemon, make_image

ROUNDS = 200 if os.environ.get("VHOST_BRIDGE_SOAK") else 20
SIZE = 4 << 20


@pytest.fixture
def other(disk: StorageDaemon, tmp_path: Path) -> Iterator[StorageDaemon]:
    """A second storage daemon on the image of `disk`."""
    with StorageDaemon(disk.image, tmp_path / "other.sock", queues=4) as daemon:
        yield daemon


def uri(disk: StorageDaemon) -> str:
    return f"vhost-user:{disk.socket}"


# A back-end of libvhost-user may break at GET_VRING_BASE when it has requests in flight, and is
# connected to anew; the switch is refused then.
def switch(bridge: Bridge, backend: str) -> dict[str, object]:
    for _ in range(3):
        done = bridge.command("switch", backend, "-j", check=False)
        if done.returncode == 0:
            report: dict[str, object] = json.loads(done.stdout)
            return report
        eventually(lambda: bridge.status().state == "running", "the bridge recovers")
    raise AssertionError(f"three refusals in a row, at last: {done.stderr}")


@pytest.mark.soak
def test_switch_at_any_moment_loses_no_request(
    disk: StorageDaemon, other: StorageDaemon, bridge: Bridge, tmp_path: Path
) -> None:
    """There and back again under a verified load; every block is right."""
    chance = random.Random(20261125)
    options: dict[str, object] = {"size": SIZE, "state": tmp_path / "state", "seed": 12}
    blkio.run(bridge.listen, "fill", **options)
    with blkio.start(bridge.listen, "write-read", depth=16, seconds=600, **options) as client:
        client.wait_for_output(blkio.RUNNING)
        for number in range(ROUNDS):
            time.sleep(chance.uniform(0, 0.05))
            target = disk if number % 2 else other
            report = switch(bridge, uri(target))
            assert report["switched"], report
            assert bridge.status().backend == uri(target)
            assert client.poll() is None, client.output
        client.kill()
    blkio.run(bridge.listen, "verify", **options)
    blkio.verify_file(disk.image, **options)


def test_switch_tells_the_parts_of_its_pause(
    other: StorageDaemon, bridge: Bridge, tmp_path: Path
) -> None:
    with blkio.start(bridge.listen, "randread", seconds=60, depth=1) as client:
        client.wait_for_output(blkio.RUNNING)
        report = switch(bridge, uri(other))
        assert report["state"] == "running"
        phases = report["phases"]
        assert isinstance(phases, dict)
        assert list(phases) == ["suspend", "state", "resume"]
        assert report["pause"] == pytest.approx(sum(phases.values()))
        assert f"switched to {uri(other)}, pause " in bridge.output


def test_suspended_device_stays_suspended_over_a_switch(
    disk: StorageDaemon, other: StorageDaemon, bridge: Bridge, tmp_path: Path
) -> None:
    options: dict[str, object] = {"size": SIZE, "state": tmp_path / "state", "seed": 13}
    blkio.run(bridge.listen, "fill", **options)
    with blkio.start(bridge.listen, "write-read", depth=8, seconds=3, **options) as client:
        client.wait_for_output(blkio.RUNNING)
        bridge.operate("Suspend")
        bridge.command("switch", uri(other))
        assert (bridge.status().state, bridge.status().held) == ("suspended", True)
        before = disk.image.read_bytes()
        time.sleep(0.05)
        assert disk.image.read_bytes() == before
        bridge.operate("Resume")
        blkio.finish(client)
    blkio.verify_file(disk.image, **options)


def test_switch_without_a_front_end_is_for_the_next_one(
    other: StorageDaemon, disk: StorageDaemon, bridge: Bridge, tmp_path: Path
) -> None:
    options: dict[str, object] = {"size": SIZE, "state": tmp_path / "state", "seed": 14}
    bridge.command("switch", uri(other))
    disk.kill()
    blkio.run(bridge.listen, "fill", **options)
    blkio.verify_file(other.image, **options)


def test_back_end_that_does_not_fit_is_refused_with_the_reasons(
    disk: StorageDaemon, bridge: Bridge, tmp_path: Path
) -> None:
    """The same with --dry-run; the front-end's requests go on where they went."""
    image = make_image(tmp_path / "small", 8 << 20)
    with (
        StorageDaemon(image, tmp_path / "small.sock") as small,
        blkio.start(bridge.listen, "randread", seconds=60, depth=4) as client,
    ):
        client.wait_for_output(blkio.RUNNING)
        for options in ([], ["--dry-run"]):
            refused = bridge.command("switch", uri(small), *options, check=False)
            assert refused.returncode == 1
            assert "configuration differs from the state" in refused.stderr, refused.stderr
        assert bridge.status().backend == uri(disk)
        assert bridge.status().state == "running"
        assert client.poll() is None, client.output


def test_dry_run_changes_nothing(disk: StorageDaemon, other: StorageDaemon, bridge: Bridge) -> None:
    with blkio.start(bridge.listen, "randread", seconds=60, depth=4) as client:
        client.wait_for_output(blkio.RUNNING)
        told = bridge.command("switch", uri(other), "--dry-run").stdout
        assert told == f"{bridge.bridge_name}: {uri(other)} can take over\n"
        assert bridge.status().backend == uri(disk)
        assert client.poll() is None, client.output


def test_back_end_that_is_not_there_is_an_error_and_nothing_changes(
    disk: StorageDaemon, bridge: Bridge, tmp_path: Path
) -> None:
    with blkio.start(bridge.listen, "randread", seconds=60, depth=4) as client:
        client.wait_for_output(blkio.RUNNING)
        refused = bridge.command("switch", f"vhost-user:{tmp_path / 'nobody'}", check=False)
        assert refused.returncode != 0
        assert "nobody" in refused.stderr
        assert bridge.status().state == "running"
        assert client.poll() is None, client.output


def test_connection_lost_at_any_message_of_a_switch_costs_a_pause_only(
    disk: StorageDaemon, other: StorageDaemon, bridge: Bridge, tmp_path: Path
) -> None:
    """The other back-end is cut off at every message in turn, until a switch gets through."""
    options: dict[str, object] = {"size": SIZE, "state": tmp_path / "state", "seed": 15}
    blkio.run(bridge.listen, "fill", **options)
    failures = 0
    with blkio.start(bridge.listen, "write-read", depth=8, seconds=600, **options) as client:
        client.wait_for_output(blkio.RUNNING)
        for at in range(200):
            with Cut(tmp_path / f"cut{at}", other.socket, at) as cut:
                done = bridge.command("switch", f"vhost-user:{tmp_path / f'cut{at}'}", check=False)
                if done.returncode:
                    assert "Traceback" not in done.stderr
                    eventually(lambda: bridge.status().state == "running", "the old one goes on")
                    assert bridge.status().backend == uri(disk)
                    assert client.poll() is None, client.output
                    failures += cut.happened
                    continue
                cut.disarm()
                assert not cut.happened
                assert switch(bridge, uri(disk))["switched"]
                break
        assert failures > 15
        assert client.poll() is None, client.output
        client.kill()
    blkio.run(bridge.listen, "verify", **options)
    blkio.verify_file(disk.image, **options)
