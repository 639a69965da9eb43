"""Back-ends that are killed under a verified load, with their requests in flight known."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from tests.peers import blkio
from tests.peers.bridge import Bridge
from tests.peers.process import eventually
from tests.peers.storage import StorageDaemon, make_image

ROUNDS = 200 if os.environ.get("VHOST_BRIDGE_SOAK") else 20


def kill(disk: StorageDaemon) -> None:
    disk.kill()
    disk.qmp.close()


@pytest.mark.soak
def test_back_end_killed_at_any_moment_loses_no_request(tmp_path: Path) -> None:
    """What it had not completed is given to the next one; the front-end sees a pause only."""
    chance = random.Random(20261126)
    image, socket = make_image(tmp_path / "image"), tmp_path / "disk.sock"
    options: dict[str, object] = {"size": 4 << 20, "state": tmp_path / "state", "seed": 31}
    disk = StorageDaemon(image, socket)
    with Bridge(
        f"vhost-user:{socket}", listen=tmp_path / "vm.sock", arguments=["--shadow"]
    ) as bridge:
        blkio.run(bridge.listen, "fill", **options)
        with blkio.start(bridge.listen, "write-read", depth=16, seconds=900, **options) as client:
            client.wait_for_output(blkio.RUNNING)
            for _ in range(ROUNDS):
                time.sleep(chance.uniform(0, 0.05))
                kill(disk)
                disk = StorageDaemon(image, socket)
                eventually(lambda: bridge.status().state == "running", "it goes on")
                assert client.poll() is None, client.output
            client.kill()
        blkio.run(bridge.listen, "verify", **options)
        kill(disk)
    blkio.verify_file(image, **options)
