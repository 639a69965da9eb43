"""Runs checks in the virtual machine: `python3 -m tests.vm.guest.harness FOLDER`, for ever.

Imports are slow there, so they are done once, and each request is served by a fork. Request number
N is the file FOLDER/N: a module and its checks, by name. Output goes to N.out and N.err, and the
exit status to N.status, when it is complete.

Where processors are emulated the machine has one of its two, as to wake the other one costs more
than it gives; but both while a check runs whose point is what happens at the same time.

A check is a function of the module called check_…; one JSON object a line says how it went.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import io
import itertools
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from types import FrameType

from .devices import SECOND_PROCESSOR, both_processors

SECONDS = 900 if os.environ.get("VHOST_BRIDGE_SOAK") else 400  # a check may take

# What every bridge and most checks need: they are forks of this process.
WARM = (
    *("vhostbridge.cli", "vhostbridge.bridge.daemon", "vhostbridge.backends.vdpa.opening"),
    *("vhostbridge.backends.vdpa.discovery", "vhostbridge.backends.vhostuser.connect"),
    *("tests.vm.guest.devices", "tests.vm.guest.blk", "tests.vm.guest.net"),
)


SOAK = (  # count rounds
    "check_front_ends_killed_at_any_point",
    "check_libblkio_killed_at_any_point",
    "check_front_end_killed_at_any_moment_goes_on",
    "check_daemon_killed_at_any_moment_loses_no_write",
    "check_libblkio_suspended_at_any_moment",
    "check_numbered_frames_over_suspends",
    "check_shadow_vrings_come_and_go_under_load",
    "check_numbered_frames_while_shadow_vrings_come_and_go",
    "check_block_between_vdpa_devices_on_one_store",
    "check_block_between_vdpa_and_vhost_user",
    "check_numbered_frames_between_vdpa_devices",
    "check_commands_suspended_at_any_moment",
    "check_guest_moves_between_vdpa_devices",
    "check_guest_moves_where_all_memory_is_sent_again",
    "check_guest_moves_from_vduse_to_vhost_user_and_back",
)
AT_ONCE = (
    *SOAK,
    "check_random_writes_read_back",
    "check_requests_run_while_memory_changes",
    "check_random_writes_and_reads",
    "check_queue_pairs_over_suspends",
    "check_memory_copied_by_the_log_alone",
)


def _too_long(number: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"the check is over its {SECONDS} s")


def main(module: str, names: list[str]) -> None:
    """Run the checks of those names, or all."""
    checks = importlib.import_module(f"tests.vm.guest.{module}")
    signal.signal(signal.SIGALRM, _too_long)
    for name in names or [name for name in vars(checks) if name.startswith("check_")]:
        faulthandler.dump_traceback_later(SECONDS + 60, exit=True)
        signal.alarm(SECONDS)
        began, problem, said = time.monotonic(), "", io.StringIO()
        try:
            together = both_processors() if name in AT_ONCE else contextlib.nullcontext()
            with contextlib.redirect_stderr(said), together:
                getattr(checks, name)()
        except BaseException:
            problem = traceback.format_exc() + said.getvalue()
        signal.alarm(0)
        seconds = round(time.monotonic() - began, 2)
        print(json.dumps({"check": name, "problem": problem, "seconds": seconds}), flush=True)


def serve(folder: Path) -> None:
    """Do what is asked, one request after the other."""
    if os.environ.get("EMULATED"):
        SECOND_PROCESSOR.write_text("0")
    for name in WARM:
        importlib.import_module(name)
    for number in itertools.count():
        asked = folder / str(number)
        while not asked.exists():
            time.sleep(0.05)
        module, *names = asked.read_text().split()
        pid = os.fork()
        if pid == 0:
            _become(module, names, asked)
        _, status = os.waitpid(pid, 0)
        said = asked.with_suffix(".new")
        said.write_text(str(abs(os.waitstatus_to_exitcode(status))))
        said.rename(asked.with_suffix(".status"))


def _become(module: str, names: list[str], asked: Path) -> None:
    status = 1
    try:
        for number, suffix in ((1, ".out"), (2, ".err")):
            fd = os.open(asked.with_suffix(suffix), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(fd, number)
            os.close(fd)
        main(module, names)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
