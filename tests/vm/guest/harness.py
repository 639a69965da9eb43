"""Runs a module's checks in the virtual machine: `python3 -m tests.vm.guest.harness MODULE [NAME]`.

A check is a function of the module called check_…; one JSON object a line says how it went.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import io
import json
import os
import signal
import sys
import time
import traceback
from types import FrameType

SECONDS = 900 if os.environ.get("VHOST_BRIDGE_SOAK") else 100  # a check may take

# What every bridge needs, imported once: they are forks of this process.
WARM = (
    *("vhostbridge.cli", "vhostbridge.bridge.daemon", "vhostbridge.backends.vdpa.opening"),
    *("vhostbridge.backends.vdpa.discovery", "vhostbridge.backends.vhostuser.connect"),
)


def _too_long(number: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"the check is over its {SECONDS} s")


def main(module: str, names: list[str]) -> None:
    """Run the checks of those names, or all."""
    for name in WARM:
        importlib.import_module(name)
    checks = importlib.import_module(f"tests.vm.guest.{module}")
    signal.signal(signal.SIGALRM, _too_long)
    for name in names or [name for name in vars(checks) if name.startswith("check_")]:
        faulthandler.dump_traceback_later(SECONDS + 60, exit=True)
        signal.alarm(SECONDS)
        began, problem, said = time.monotonic(), "", io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                getattr(checks, name)()
        except BaseException:
            problem = traceback.format_exc() + said.getvalue()
        signal.alarm(0)
        seconds = round(time.monotonic() - began, 2)
        print(json.dumps({"check": name, "problem": problem, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
