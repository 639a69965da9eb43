"""Front-ends that are killed while their vDPA device is kept for the next one, which goes on."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

from . import survivor
from .devices import BridgeProcess, block_device, serving

ROUNDS = 200 if os.environ.get("VHOST_BRIDGE_SOAK") else 10
MEMORY = Path("/dev/shm/survivor")
KEEP = ("--on-disconnect", "keep")
GOES_ON = "the front-end goes on where the device was kept"


def life(bridge: BridgeProcess, seed: int, seconds: str = "") -> tuple[int, int]:
    """Start a driver that goes on in the memory of the one before; its pid and its output."""
    output, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.dup2(theirs, 1)
            survivor.main(bridge.socket, str(MEMORY), str(seed), seconds)
            status = 0
        finally:
            os._exit(status)
    os.close(theirs)
    return pid, output


def check_front_end_killed_at_any_moment_goes_on() -> None:
    """Nothing is lost, done twice or altered; the kernel's device is only ever suspended."""
    chance = random.Random(22)
    MEMORY.unlink(missing_ok=True)
    try:
        with block_device(), serving(("keep", "vdpa:blk0"), more=KEEP) as bridge:
            for number in range(ROUNDS):
                pid, output = life(bridge, number)
                # Some die before that, in their set-up.
                if chance.random() < 0.8:
                    assert os.read(output, 100) == b"running\n", "it did not start"
                time.sleep(chance.uniform(0, 0.2))
                os.kill(pid, 9)
                _, status = os.waitpid(pid, 0)
                os.close(output)
                assert os.WIFSIGNALED(status), "the front-end had failed by itself"
            pid, output = life(bridge, ROUNDS, "0.5")
            _, status = os.waitpid(pid, 0)
            os.close(output)
            assert status == 0, "the last front-end failed"
            text = bridge.text()
            assert text.count(GOES_ON) > ROUNDS / 2, text
            assert "given up" not in text, text
    finally:
        MEMORY.unlink(missing_ok=True)
