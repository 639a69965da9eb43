"""`vhost-bridge list` and `inspect` against `vdpa -j` and the kernel."""

from __future__ import annotations

import json
from typing import Any

from .checks_management import tool
from .devices import block_device, net_device, serving, spawn
from .frontend import Frontend


def output(*arguments: str) -> str:
    process = spawn(arguments)
    assert process.wait() == 0, process.text()
    return process.text()


def printed(*arguments: str) -> Any:
    return json.loads(output(*arguments))


def check_list_has_what_the_tool_has() -> None:
    with block_device() as blk, net_device() as net:
        listed, theirs = printed("list", "-j"), tool("dev", "show")["dev"]
        assert listed["mgmtdev"].keys() == tool("mgmtdev", "show")["mgmtdev"].keys()
        assert listed["dev"].keys() == theirs.keys() == {"blk0", "net0"}
        for name, report in theirs.items():
            for key in ("mgmtdev", "vendor_id", "max_vqs", "max_vq_size"):
                assert listed["dev"][name][key] == report[key], (name, key)
        assert (listed["dev"]["blk0"]["node"], listed["dev"]["net0"]["node"]) == (blk, net)
        config = tool("dev", "config", "show")["config"]["net0"]
        assert listed["dev"]["net0"]["config"]["mac"] == config["mac"]


def check_list_names_the_bridge_that_has_a_device() -> None:
    with block_device(), serving(("x", "vdpa:blk0")) as bridge:
        (holder,) = printed("list", "-j")["dev"]["blk0"]["held_by"]
        assert str(bridge.pid) in json.dumps(holder)
        assert str(bridge.pid) in output("list")


def check_inspect_tells_what_the_kernel_does() -> None:
    with block_device() as node:
        told = printed("inspect", "-j", "vdpa:blk0")
        assert (told["node"], told["device_id"], told["opened"]) == (node, 2, True)
        assert told["features"]["mask"] == "0x308007646"
        assert set(told["features"]["hidden"]) == {"ACCESS_PLATFORM"}
        assert told["config"]["capacity"] == 0x40000
        assert [ring["max_size"] for ring in told["vrings"]] == [256]
        assert told["backend_features"]["mask"] == "0x17e"
        assert told["capabilities"]["suspend"]["how"] == "native"


def check_inspect_tells_the_groups_of_vrings() -> None:
    with net_device():
        told = printed("inspect", "-j", "net0")
        assert [ring["group"] for ring in told["vrings"]] == [0, 0, 1]
        assert (told["groups"], told["address_spaces"]) == (2, 2)


def check_inspect_leaves_a_busy_device_alone() -> None:
    """What can be known without opening it is told; the bridge goes on."""
    with (
        block_device(),
        serving(("x", "vdpa:blk0")) as bridge,
        Frontend(bridge.socket) as frontend,
    ):
        frontend.negotiate()
        told = printed("inspect", "-j", "blk0")
        assert told["opened"] is False and told["type"] == "block"
        assert str(bridge.pid) in json.dumps(told["held_by"])
        assert frontend.ask_u64("GET_QUEUE_NUM") == 1
