"""Front-ends that are killed while their vDPA device is kept for the next one, which goes on."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

from . import survivor
from .devices import block_device, serving

ROUNDS = 200 if os.environ.get("VHOST_BRIDGE_SOAK") else 10
MEMORY = Path("/dev/shm/survivor")
KEEP = ("--on-disconnect", "keep")
GOES_ON = "the front-end goes on where the device was kept"


def check_front_end_killed_at_any_moment_goes_on() -> None:
    """Nothing is lost, done twice or altered; the kernel's device is only ever suspended."""
    chance = random.Random(22)
    MEMORY.unlink(missing_ok=True)
    try:
        with block_device(), serving(("keep", "vdpa:blk0"), more=KEEP) as bridge:
            for number in range(ROUNDS):
                driver = survivor.start(bridge.socket, str(MEMORY), number)
                # Some die before that, in their set-up.
                if chance.random() < 0.8:
                    assert os.read(driver.output, 100) == b"running\n", "it did not start"
                time.sleep(chance.uniform(0, 0.2))
                survivor.kill(driver)
            survivor.verified(survivor.start(bridge.socket, str(MEMORY), ROUNDS, 0.5))
            text = bridge.text()
            assert text.count(GOES_ON) > ROUNDS / 2, text
            assert "given up" not in text, text
    finally:
        MEMORY.unlink(missing_ok=True)
