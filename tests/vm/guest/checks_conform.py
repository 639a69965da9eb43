"""`vhost-bridge conform` on the kernel's simulators and on a process behind VDUSE."""

from __future__ import annotations

import json
import os
from typing import Any

from vhostbridge.bridge.conform.contracts import CONTRACTS

from .blk import BLOCK, content
from .checks_commands import output
from .devices import block_device, net_device, serving, spawn
from .vduse import SIZE, vduse_block

NO_INTERNAL = {"internal-state-twice", "internal-state-loads", "config-change-held"}
# qemu-storage-daemon 10.0 aborts when its VDUSE device is reset with a request in flight: see
# docs/conformance.md.
VDUSE = [arg for c in CONTRACTS if c.name != "reset-running" for arg in ("-c", c.name)]
NEED_REQUESTS = {"requests-complete", "kick-kept", "call-after-resume"}


def results(*arguments: str) -> dict[str, Any]:
    """What conform said: all must have passed but what is returned under its contract's name."""
    report = json.loads(output("conform", "-j", *arguments))
    found = {one["name"]: one for one in report["contracts"] if one["result"] != "pass"}
    assert report["summary"]["fail"] == report["summary"]["not run"] == 0, found
    assert report["summary"]["left"] == "as found", report["summary"]
    assert report["transport"] == "vdpa"
    return found


def check_block_simulator_that_is_read() -> None:
    with block_device():
        assert set(results("blk0")) == NO_INTERNAL


def check_block_simulator_that_is_written() -> None:
    with block_device():
        assert set(results("--write", "vdpa:blk0")) == NO_INTERNAL


def check_network_simulator_with_traffic() -> None:
    with net_device():
        assert set(results("--traffic", "net0")) == NO_INTERNAL


def check_network_simulator_without_traffic() -> None:
    with net_device():
        found = results("net0")
        assert set(found) == NO_INTERNAL | NEED_REQUESTS
        assert "--traffic" in found["kick-kept"]["evidence"]


def check_vduse_that_is_read() -> None:
    with vduse_block() as device:
        with device.file.open("r+b") as image:
            os.pwrite(image.fileno(), content("conform", 0), 0)
            before = os.pread(image.fileno(), SIZE, 0)
        assert set(results("vd0", *VDUSE)) == NO_INTERNAL
        assert device.file.read_bytes() == before


def check_vduse_that_is_written_has_its_content_back() -> None:
    """The scratch area is the disk's end."""
    with vduse_block() as device:
        with device.file.open("r+b") as image:
            for block in range(SIZE // BLOCK - 70, SIZE // BLOCK):
                os.pwrite(image.fileno(), content("conform", block), block * BLOCK)
            before = os.pread(image.fileno(), SIZE, 0)
        assert set(results("vd0", "--write", *VDUSE)) == NO_INTERNAL
        assert device.file.read_bytes() == before


def check_device_in_use_is_not_touched() -> None:
    with block_device() as node, serving(("x", "vdpa:blk0")) as bridge:
        process = spawn(["conform", "blk0"])
        assert process.wait() == 1
        assert f"{node} is busy: held by" in process.text()
        assert str(bridge.pid) in process.text()
