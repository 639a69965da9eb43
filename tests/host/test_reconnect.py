"""Front-ends and back-ends that come and go or are killed: nothing leaks, nothing is lost."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import time
from pathlib import Path

import pytest

from tests.peers import blkio
from tests.peers.bridge import Bridge
from tests.peers.process import Footprint
from tests.peers.storage import StorageDaemon

ROUNDS = 200 if os.environ.get("VHOST_BRIDGE_SOAK") else 20
WARM_UP = 5
# A process that allocates and frees is never back at the same page; a leak is in every round.
SLACK_KIB = 1024


def settled(bridge: Bridge, lefts: int) -> Footprint:
    """What the bridge holds once that many front-ends have gone and idle threads have ended."""
    deadline = time.monotonic() + 30
    gone = ("left", "cut off")
    while sum(any(word in line for word in gone) for line in bridge.output.splitlines()) < lefts:
        assert time.monotonic() < deadline, bridge.output[-2000:]
        time.sleep(0.01)
    # trio's idle worker threads end ten seconds after their last job.
    while (held := bridge.footprint()).threads > 1:
        assert time.monotonic() < deadline, held
        time.sleep(0.1)
    return held


def killed_at_random(bridge: Bridge, chance: random.Random, state: Path) -> None:
    """A client with verified I/O, ended by SIGKILL in its set-up or in the middle of its work."""
    client = blkio.start(
        bridge.listen, "write-read", depth=8, seconds=30, size=4 << 20, state=state, seed=7
    )
    with client:
        if chance.random() < 0.6:
            client.wait_for_output(blkio.RUNNING)
            time.sleep(chance.uniform(0, 0.1))
        else:
            time.sleep(chance.uniform(0, 0.03))
        client.kill()


@pytest.mark.soak
def test_killed_front_ends_leave_nothing_behind(
    disk: StorageDaemon, bridge: Bridge, tmp_path: Path
) -> None:
    chance = random.Random(20261123)
    state = tmp_path / "state"
    options: dict[str, object] = {"size": 4 << 20, "state": state, "seed": 7}
    blkio.run(bridge.listen, "fill", **options)
    for _ in range(WARM_UP):
        killed_at_random(bridge, chance, state)
    blkio.run(bridge.listen, "verify", **options)
    connected = bridge.output.count("front-end connected")
    before = settled(bridge, connected)
    for _ in range(ROUNDS):
        killed_at_random(bridge, chance, state)
    blkio.run(bridge.listen, "verify", **options)
    blkio.verify_file(disk.image, **options)
    connected = bridge.output.count("front-end connected")
    after = settled(bridge, connected)
    assert (after.fds, after.threads, after.mappings) == (
        before.fds,
        before.threads,
        before.mappings,
    )
    assert after.resident_kib < before.resident_kib + SLACK_KIB


def test_back_end_that_dies_idle_is_used_again_when_it_is_back(
    disk: StorageDaemon, bridge: Bridge
) -> None:
    options: dict[str, object] = {"size": 4 << 20, "seed": 3}
    blkio.run(bridge.listen, "fill", **options)
    disk.kill()
    bridge.wait_for_output("the back-end failed: ")
    bridge.wait_for_output("waiting for the back-end: ")
    with StorageDaemon(disk.image, disk.socket, queues=4):
        assert blkio.run(bridge.listen, "verify", **options)["verified"] == 1024


def test_back_end_that_dies_under_io_costs_no_data(
    disk: StorageDaemon, bridge: Bridge, tmp_path: Path
) -> None:
    """Only the back-end knew which requests it had begun: the front-end has to come again."""
    options: dict[str, object] = {"size": 4 << 20, "seed": 4, "state": tmp_path / "state"}
    blkio.run(bridge.listen, "fill", **options)
    with blkio.start(bridge.listen, "write-read", depth=8, seconds=60, **options) as client:
        client.wait_for_output(blkio.RUNNING)
        disk.kill()
        bridge.wait_for_output("the back-end failed: ")
        client.kill()
    with StorageDaemon(disk.image, disk.socket, queues=4):
        blkio.run(bridge.listen, "verify", **options)


def test_second_front_end_waits_for_the_first(bridge: Bridge) -> None:
    options: dict[str, object] = {"size": 1 << 20, "seed": 5}
    first = blkio.start(bridge.listen, "randread", seconds=60, depth=1)
    with first:
        first.wait_for_output(blkio.RUNNING)
        with blkio.start(bridge.listen, "fill", **options) as second:
            with pytest.raises(AssertionError):
                blkio.finish(second, timeout=0.5)
            first.kill()
            blkio.finish(second)
    blkio.run(bridge.listen, "verify", **options)


HEADERS = {
    "wrong version": struct.pack("=III", 1, 0x2, 0),
    "reply": struct.pack("=III", 1, 0x5, 0),
    "huge payload": struct.pack("=III", 2, 0x1, 0x7FFFFFFF),
    "short payload": struct.pack("=III", 2, 0x1, 4) + bytes(4),
    "unknown request": struct.pack("=III", 4711, 0x1, 0),
    "text": b"GET / HTTP/1.1\r\n\r\n",
}


@pytest.mark.parametrize("what", HEADERS)
def test_malformed_front_end_is_cut_off_in_one_line(bridge: Bridge, what: str) -> None:
    with socket.socket(socket.AF_UNIX) as rogue:
        rogue.connect(str(bridge.listen))
        rogue.sendall(HEADERS[what])
        rogue.settimeout(20)
        # Closing with unread bytes is a reset to the peer.
        with contextlib.suppress(ConnectionResetError):
            assert rogue.recv(100) == b""
    bridge.wait_for_output("cut off: the front-end ")
    assert bridge.output.count("ERROR") == 1
    assert blkio.run(bridge.listen, "fill", size=1 << 20, seed=6)
