"""`vhost-bridge list` and `inspect` against `vdpa -j`, sysfs and the kernel's own ioctls."""

from __future__ import annotations

import json
from typing import Any

from .checks_management import tool
from .devices import SYSFS, block_device, net_device, node_of, serving, spawn
from .frontend import Frontend
from .raw import RawDevice

GET_FEATURES, GET_BACKEND_FEATURES = 0x8008AF00, 0x8008AF26
GET_DEVICE_ID, GET_CONFIG_SIZE = 0x8004AF70, 0x8004AF79
GET_CONFIG, GET_VRING_NUM, GET_VRING_GROUP = 0x8008AF73, 0x8002AF76, 0xC008AF7B
GET_AS_NUM, GET_VQS_COUNT, GET_GROUP_NUM = 0x8004AF7A, 0x8004AF80, 0x8004AF81

TYPES = {"network": "net"}  # iproute2's name of a type: ours, where it is another


def output(*arguments: str) -> str:
    process = spawn(arguments)
    assert process.wait() == 0, process.text()
    return process.text()


def printed(*arguments: str) -> Any:
    return json.loads(output(*arguments))


def devices_by_the_tool() -> dict[str, dict[str, Any]]:
    """What `vdpa dev show` has, with our names of types."""
    shown: dict[str, dict[str, Any]] = tool("dev", "show")["dev"]
    return {
        name: facts | {"type": TYPES.get(facts["type"], facts["type"])}
        for name, facts in shown.items()
    }


def config_by_the_tool(name: str) -> dict[str, Any]:
    """What `vdpa dev config show` has, with our names of fields."""
    shown = {
        key.strip(): value  # "link " is what iproute2 prints
        for key, value in tool("dev", "config", "show", name)["config"][name].items()
    }
    if "link" in shown:
        shown["link_up"] = shown.pop("link") == "up"
        shown["announce"] = shown.pop("link_announce")
    return shown


def in_sysfs(name: str) -> dict[str, str]:
    return {"driver": (SYSFS / name / "driver").resolve().name, "node": node_of(name)}


def assert_has(report: dict[str, Any], facts: dict[str, Any]) -> None:
    """Each of the facts is in the report."""
    told = {key: report.get(key) for key in facts}
    assert told == facts, f"{told} is not {facts}"


def check_list_has_the_management_devices_that_the_tool_has() -> None:
    theirs = tool("mgmtdev", "show")["mgmtdev"]
    assert {"vdpasim_blk", "vdpasim_net", "vduse"} <= theirs.keys()
    assert_has(printed("list", "-j"), {"mgmtdev": theirs})


def check_list_has_the_devices_that_the_tool_and_sysfs_have() -> None:
    with block_device(), net_device():
        listed, theirs = printed("list", "-j")["dev"], devices_by_the_tool()
        on_bus = {entry.name for entry in SYSFS.iterdir()}
        assert listed.keys() == theirs.keys() == on_bus == {"blk0", "net0"}
        for name, facts in theirs.items():
            assert_has(listed[name], facts | in_sysfs(name))
            assert_has(listed[name]["config"], config_by_the_tool(name))
        assert listed["net0"]["config"]["mac"] == "52:54:00:11:22:33"


def check_list_of_nothing() -> None:
    assert printed("list", "-j")["dev"] == devices_by_the_tool() == {}


def check_list_names_the_bridge_that_has_a_device() -> None:
    with block_device(), serving(("x", "vdpa:blk0")) as bridge:
        (holder,) = printed("list", "-j")["dev"]["blk0"]["held_by"]
        assert holder["pid"] == bridge.pid, holder
        assert str(bridge.pid) in output("list")


def check_inspect_has_what_the_tool_and_sysfs_have() -> None:
    with block_device(), net_device():
        for name, facts in devices_by_the_tool().items():
            told = printed("inspect", "-j", f"vdpa:{name}")
            sizes = [ring["max_size"] for ring in told["vrings"]]
            assert sizes == [facts.pop("max_vq_size")] * facts.pop("max_vqs")
            assert_has(told, facts | in_sysfs(name) | {"name": name, "held_by": []})
            assert_has(told["config"], config_by_the_tool(name))


def check_inspect_has_what_the_kernel_answers() -> None:
    """Of a block device, of which the tool tells little, and of one with groups of vrings."""
    with block_device() as blk, net_device() as net:
        for node in (blk, net):
            told = printed("inspect", "-j", node)
            with RawDevice(node) as raw:
                assert_has(told, {"opened": True} | numbers(raw))
                assert told["features"]["mask"] == hex(*raw.ioctl(GET_FEATURES, "Q", 0))
                backend = hex(*raw.ioctl(GET_BACKEND_FEATURES, "Q", 0))
                assert told["backend_features"]["mask"] == backend
                (count,) = raw.ioctl(GET_VQS_COUNT, "I", 0)
                rings = [(ring["max_size"], ring["group"]) for ring in told["vrings"]]
                (size,) = raw.ioctl(GET_VRING_NUM, "H", 0)
                group = [raw.ioctl(GET_VRING_GROUP, "II", n, 0)[1] for n in range(count)]
                assert rings == [(size, number) for number in group]
                if node == blk:
                    *_, capacity = raw.ioctl(GET_CONFIG, "IIQ", 0, 8, 0)  # its first field
                    assert told["config"]["capacity"] == capacity == 0x40000
                else:
                    assert group == [0, 0, 1]
            assert set(told["features"]["hidden"]) == {"ACCESS_PLATFORM"}


def numbers(raw: RawDevice) -> dict[str, int]:
    asked = {
        "device_id": GET_DEVICE_ID,
        "config_size": GET_CONFIG_SIZE,
        "groups": GET_GROUP_NUM,
        "address_spaces": GET_AS_NUM,
    }
    return {key: raw.ioctl(request, "I", 0)[0] for key, request in asked.items()}


def check_inspect_leaves_a_busy_device_alone() -> None:
    """What can be known without opening it is told; the bridge goes on."""
    with (
        block_device(),
        serving(("x", "vdpa:blk0")) as bridge,
        Frontend(bridge.socket) as frontend,
    ):
        frontend.negotiate()
        told = printed("inspect", "-j", "blk0")
        facts = devices_by_the_tool()["blk0"]
        sizes = [ring["max_size"] for ring in told["vrings"]]
        assert sizes == [facts.pop("max_vq_size")] * facts.pop("max_vqs")
        assert_has(told, facts | in_sysfs("blk0") | {"opened": False})
        assert [holder["pid"] for holder in told["held_by"]] == [bridge.pid]
        assert frontend.ask_u64("GET_QUEUE_NUM") == 1
