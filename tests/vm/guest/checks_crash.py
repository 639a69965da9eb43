"""Daemons that are killed while a vDPA device works for a front-end that comes again."""

from __future__ import annotations

import os
import random
import signal
import threading

from .devices import block_device, spawn
from .keeper import Keeper

ROUNDS = 200 if os.environ.get("VHOST_BRIDGE_SOAK") else 6
SOCKET = "/tmp/crash.sock"
SERVE = ("serve", "--name", "crash", "--listen", SOCKET, "--no-control")


def check_daemon_killed_at_any_moment_loses_no_write() -> None:
    """The front-end keeps what is in flight; the next daemon opens the device and does it again."""
    chance, keeper = random.Random(20261125), Keeper(1 << 17)
    with block_device():
        for last in [False] * ROUNDS + [True]:
            bridge = spawn([*SERVE, "--backend", "vdpa:blk0", "--shadow"], SOCKET)
            bridge.wait_for("serving 1 bridge", 60)
            keeper.connect(SOCKET)
            if last:
                keeper.finish()
                keeper.close()
                assert bridge.stop() == 0, bridge.text()
            else:
                # It goes on for a while with nobody there.
                seconds = chance.uniform(0.01, 0.1)
                killer = threading.Timer(seconds, os.kill, (bridge.pid, signal.SIGKILL))
                killer.start()
                keeper.work(seconds + 0.02)
                killer.join()
                assert bridge.wait() == -signal.SIGKILL
                keeper.lose()
    assert sum(map(bool, keeper.in_doubt)) > ROUNDS / 4
    assert keeper.sent > 10 * ROUNDS
