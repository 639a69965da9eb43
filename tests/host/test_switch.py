"""A running front-end's device moves between storage daemons that share an image."""

from __future__ import annotations

import json
import os
import random
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.peers import blkio
from tests.peers.bridge import Bridge
from tests.peers.cut import Cut
from tests.peers.process import eventually
from tests.peers.storage import StorageDaemon, make_image
from tests.vm.guest.blk import BlockDriver
from tests.vm.guest.frontend import VERSION_1, Frontend
from tests.vm.guest.memory import Memory
from tests.vm.guest.vring import SplitRing

ROUNDS = 200 if os.environ.get("VHOST_BRIDGE_SOAK") else 20
SIZE = 4 << 20
MQ = 1 << 12
CONFIG_SIZE, QUEUES = 60, 34  # bytes, and where num_queues is
CONFIG_CHANGE_MSG = 2


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


@pytest.mark.parametrize("runs", [True, False])
def test_what_a_driver_has_read_stays_so_over_a_switch_and_back(
    disk: StorageDaemon, tmp_path: Path, runs: bool
) -> None:
    """Whether or not it has started the device. A disk of another number of queues is no hindrance
    on the way back, to where the driver has never seen more; the next driver sees what there is."""
    listen, typed = tmp_path / "vm.sock", ["--type", "block"]
    with (
        StorageDaemon(disk.image, tmp_path / "few.sock", queues=2) as few,
        Bridge(uri(few), listen=listen, arguments=typed) as bridge,
    ):
        driver = BlockDriver(SplitRing(Memory(SIZE)))
        with Frontend(str(listen)) as frontend:
            frontend.negotiate(wanted=VERSION_1 | MQ)
            if runs:
                frontend.set_memory([driver.ring.memory])
                frontend.start([driver.ring])
                driver.write_blocks("before", range(20))
            read = frontend.config(0, CONFIG_SIZE)
            assert read[QUEUES] == 2
            for target in (disk, few, disk):
                assert switch(bridge, uri(target))["switched"]
                assert frontend.config(0, CONFIG_SIZE) == read
            if runs:
                driver.check_blocks("before", range(20))
        with Frontend(str(listen)) as frontend:
            frontend.negotiate(wanted=VERSION_1 | MQ)
            assert frontend.config(0, CONFIG_SIZE)[QUEUES] == 4


def test_driver_is_told_of_a_disk_that_is_larger_after_a_switch(
    disk: StorageDaemon, tmp_path: Path
) -> None:
    listen, image = tmp_path / "vm.sock", make_image(tmp_path / "large", 64 << 20)
    with (
        StorageDaemon(image, tmp_path / "large.sock", queues=4) as large,
        Bridge(uri(disk), listen=listen, arguments=["--type", "block"]) as bridge,
        Frontend(str(listen)) as frontend,
    ):
        frontend.negotiate()
        with frontend.open_reverse_channel() as reverse:
            before = frontend.config(0, CONFIG_SIZE)
            assert switch(bridge, uri(large))["switched"]
            kind = struct.unpack("=I", reverse.recv(12)[:4])[0]
            assert kind == CONFIG_CHANGE_MSG
            capacities = [int.from_bytes(c[:8], "little") for c in (before, frontend.config(0, 60))]
            assert capacities == [(32 << 20) // 512, (64 << 20) // 512]
            again = bridge.command("switch", uri(disk), check=False)
            assert again.returncode == 1
            assert "capacity of the device is 65536" in again.stderr


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
