"""A daemon that is nobody in particular: no capability, not root, one device node of its own."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import libblkio
from .devices import BridgeProcess, block_device, serving, spawn
from .libblkio import USER

DAEMON, OTHER = 4711, 4712
MIB = 1 << 20


def as_user(number: int) -> tuple[str, ...]:
    """The prefix of a command that runs without any privilege."""
    ids = (f"--reuid={number}", f"--regid={number}", "--clear-groups")
    return ("setpriv", *ids, "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs")


@contextlib.contextmanager
def unprivileged(more: Sequence[str] = ()) -> Iterator[BridgeProcess]:
    """A daemon that may open its device's node, and nothing else that others may not."""
    with block_device() as node:
        os.chown(node, DAEMON, DAEMON)
        os.chmod(node, 0o600)
        with serving(("own", "vdpa:blk0"), prefix=as_user(DAEMON), more=more) as bridge:
            yield bridge


def credentials(pid: int) -> dict[str, str]:
    """What /proc says of a process, by field."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def told(number: int, *arguments: str, status: int = 0) -> str:
    """What a command says to a user without privileges."""
    process = spawn(arguments, prefix=as_user(number))
    assert process.wait() == status, process.text()
    return process.text()


def check_daemon_without_privileges_serves_verified_requests() -> None:
    """Straight from the guest; and its operator is its own user, and nobody else but root."""
    control = "/tmp/own.control"
    with unprivileged(["--control", control]) as bridge:
        found = credentials(bridge.pid)
        assert found["Uid"].split() == [str(DAEMON)] * 4, found
        assert found["Groups"] == "" and found["NoNewPrivs"] == "1", found
        assert {int(found[name], 16) for name in ("CapEff", "CapPrm", "CapBnd")} == {0}, found
        result = libblkio.run(USER, bridge.socket, "write-read", size=16 * MIB, depth=16)
        assert result["writes"] > 0 and result["verified"] > 0, result
        assert os.stat(control).st_mode & 0o777 == 0o600
        assert '"own"' in told(DAEMON, "status", "--control", control, "-j", "own")
        refused = told(OTHER, "status", "--control", control, "own", status=2)
        assert f"{control}' is not readable" in refused, refused


def check_shadow_vrings_need_no_privileges() -> None:
    with unprivileged(["--shadow"]) as bridge:
        result = libblkio.run(USER, bridge.socket, "write-read", size=16 * MIB, depth=16)
        assert result["writes"] > 0 and result["verified"] > 0, result


def check_what_a_user_without_privileges_is_told_of_devices() -> None:
    """All that the kernel tells everybody; of the rest, what is missing and why."""
    with block_device() as node:
        os.chown(node, DAEMON, DAEMON)
        os.chmod(node, 0o600)
        assert json.loads(told(DAEMON, "list", "-j"))["dev"]["blk0"]["type"] == "block"
        assert json.loads(told(DAEMON, "inspect", "-j", "blk0"))["node"] == node
        less = told(OTHER, "inspect", "blk0")
        assert f"not opened     no permission to open {node}" in less, less
        assert "what follows is what the kernel tells without opening it" in less, less
