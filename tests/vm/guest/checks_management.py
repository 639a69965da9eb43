"""The product's netlink and sysfs against iproute2's `vdpa -j` and the kernel itself."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import struct
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

from vhostbridge.backends.errors import BridgeError
from vhostbridge.backends.holders import holders
from vhostbridge.backends.vdpa.discovery import bus_devices, resolve
from vhostbridge.backends.vdpa.inventory import (
    InventoryEntry,
    device_report,
    management_report,
    take_inventory,
)
from vhostbridge.backends.vdpa.netlink import FamilyMissing, NetlinkRefused, VdpaNetlink

from .devices import node_of, sh

FEATURES = 0x308830028  # the net simulator's
SET_FEATURES, SET_STATUS = 0x4008AF00, 0x4001AF72


def tool(*arguments: str) -> Any:
    """What `vdpa -j` prints."""
    done = subprocess.run(
        ["vdpa", "-j", *arguments], capture_output=True, text=True, check=True, timeout=20
    )
    return json.loads(done.stdout)


def refused(text: str, function: Callable[[], object], kind: type = NetlinkRefused) -> None:
    try:
        function()
    except BridgeError as error:
        told = error
    else:
        raise AssertionError(f"not refused: {text}")
    assert isinstance(told, kind) and text in str(told), repr(told)


@contextlib.contextmanager
def some_devices() -> Iterator[VdpaNetlink]:
    """net7, blk7 and blk10, made by the product."""
    names = ("net7", "blk7", "blk10")
    with VdpaNetlink() as netlink:
        try:
            mac = "52:54:00:11:22:33"
            netlink.create("net7", "vdpasim_net", mac=mac, mtu=1400, features=FEATURES)
            netlink.create("blk7", "vdpasim_blk")
            netlink.create("blk10", "vdpasim_blk")
            yield netlink
        finally:
            for name in names:
                with contextlib.suppress(NetlinkRefused):
                    netlink.delete(name)
        assert not set(names) & {device.name for device in netlink.devices()}


def check_management_devices_as_the_tool_has_them() -> None:
    with VdpaNetlink() as netlink:
        ours = {one.handle: management_report(one) for one in netlink.management_devices()}
    theirs = tool("mgmtdev", "show")["mgmtdev"]
    assert set(ours) == set(theirs)
    for handle, report in theirs.items():
        assert ours[handle]["supported_classes"] == report["supported_classes"]
        assert ours[handle].get("max_supported_vqs") == report.get("max_supported_vqs")
        if report.get("dev_features"):
            assert ours[handle]["dev_features"] == report["dev_features"]


def check_devices_as_the_tool_has_them() -> None:
    names = {"net": "network"}
    with some_devices() as netlink:
        ours = {}
        for info in netlink.devices():
            entry = InventoryEntry(name=info.name, bus=None, info=info, config=None)
            report = device_report(entry)
            report["type"] = names.get(str(report["type"]), report["type"])
            ours[info.name] = report
        assert ours == tool("dev", "show")["dev"]


def check_configuration_as_the_tool_has_it() -> None:
    with some_devices() as netlink:
        theirs = tool("dev", "config", "show")["config"]["net7"]
        fields = netlink.device_config("net7").fields
        assert {key: fields[key] for key in ("mac", "mtu")} == {
            key: theirs[key] for key in ("mac", "mtu")
        }
        assert fields["mac"] == "52:54:00:11:22:33" and fields["mtu"] == 1400
        assert netlink.device_config("blk7").fields["capacity"] == 0x40000


def check_mac_is_set() -> None:
    with some_devices() as netlink:
        netlink.set_mac("net7", "52:54:00:aa:bb:cc")
        assert netlink.device_config("net7").fields["mac"] == "52:54:00:aa:bb:cc"
        assert tool("dev", "config", "show", "net7")["config"]["net7"]["mac"] == "52:54:00:aa:bb:cc"


def check_statistics_as_the_tool_has_them() -> None:
    """They are there once features are negotiated."""
    with some_devices() as netlink:
        refused("(EAGAIN)", lambda: netlink.queue_statistics("net7", 0))
        node = os.open(node_of("net7"), os.O_RDWR)
        try:
            for status in (1, 3):
                fcntl.ioctl(node, SET_STATUS, struct.pack("B", status))
            fcntl.ioctl(node, SET_FEATURES, struct.pack("Q", FEATURES))
            fcntl.ioctl(node, SET_STATUS, struct.pack("B", 11))
            for index in range(3):
                shown = tool("dev", "vstats", "show", "net7", "qidx", str(index))["vstats"]["net7"]
                del shown["queue_type"]
                assert dict(netlink.queue_statistics("net7", index).counters) == shown
            assert netlink.device_config("net7").negotiated_features == FEATURES
            refused("vring 9", lambda: netlink.queue_statistics("net7", 9))
        finally:
            os.close(node)


def check_refusals_carry_the_kernels_words() -> None:
    with some_devices() as netlink:
        mac = "52:54:00:00:00:01"
        refused("(EEXIST)", lambda: netlink.create("blk7", "vdpasim_blk"))
        refused("(ENODEV)", lambda: netlink.create("x", "nosuch"))
        refused("(EOPNOTSUPP)", lambda: netlink.create("x", "vdpasim_blk", features=1))
        refused("(EINVAL)", lambda: netlink.create("x", "vdpasim_net", mac=mac, features=1 << 32))
        refused("(EOPNOTSUPP)", lambda: netlink.create("x", "vdpasim_net", max_queue_pairs=2))
        refused("vDPA device nosuch", lambda: netlink.device("nosuch"))
        refused("delete vDPA device nosuch", lambda: netlink.delete("nosuch"))
        refused("(EOPNOTSUPP)", lambda: netlink.queue_statistics("blk7", 0))
        refused("configuration of vDPA device nosuch", lambda: netlink.device_config("nosuch"))


def check_nodes_are_found_by_name_and_path() -> None:
    with some_devices():
        for name in ("net7", "blk7", "blk10"):
            node = node_of(name)
            for target in (name, f"vdpa:{name}", node, f"vdpa:{node}"):
                found = resolve(target)
                assert (found.name, str(found.node)) == (name, node)
                assert os.stat(node).st_rdev == os.makedev(*found.number)
        assert [device.name for device in bus_devices()] == ["blk7", "blk10", "net7"]


def check_holder_of_a_node_is_found() -> None:
    with some_devices():
        node = resolve("blk7").node
        assert holders(node) == []
        fd = os.open(node, os.O_RDWR)
        assert [holder.pid for holder in holders(node)] == [os.getpid()]
        os.close(fd)


def check_inventory_joins_both_sources() -> None:
    with some_devices():
        inventory = take_inventory()
        assert inventory.problem is None
        reports = {entry.name: device_report(entry) for entry in inventory.devices}
        assert reports["blk7"]["node"] == node_of("blk7")
        assert reports["blk7"]["driver"] == "vhost_vdpa"
        assert reports["net7"]["type"] == "net"


def _in_child(body: Callable[[], None]) -> None:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            body()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0


def check_unprivileged_user_may_look_but_not_change() -> None:
    def body() -> None:
        os.setgid(65534)
        os.setuid(65534)
        with VdpaNetlink() as netlink:
            assert len(netlink.devices()) == 3
            refused("CAP_NET_ADMIN", lambda: netlink.delete("blk10"))
            refused("CAP_NET_ADMIN", lambda: netlink.queue_statistics("net7", 0))

    with some_devices():
        _in_child(body)


def check_other_network_namespace_is_said() -> None:
    """Devices are still found: sysfs has them."""

    def body() -> None:
        os.unshare(os.CLONE_NEWNET)  # type: ignore[attr-defined]
        refused("can't be managed from this network namespace", VdpaNetlink, FamilyMissing)
        inventory = take_inventory()
        assert inventory.problem is not None
        assert [entry.name for entry in inventory.devices] == ["blk7", "blk10", "net7"]

    with some_devices():
        _in_child(body)


def check_kernel_without_vdpa() -> None:
    sh("modprobe -r vhost_vdpa vdpa_sim_net vdpa_sim_blk && modprobe -r vdpa_sim vduse vdpa")
    try:
        refused("module vdpa is not loaded (modprobe vdpa)", VdpaNetlink, FamilyMissing)
    finally:
        sh("modprobe vhost_vdpa && modprobe -a vdpa_sim_net vdpa_sim_blk vduse")
