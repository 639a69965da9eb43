"""Devices and nodes found in a made-up sysfs tree."""

from __future__ import annotations

from pathlib import Path

import pytest

from vhostbridge.backends.errors import TargetError, Unsupported
from vhostbridge.backends.vdpa.discovery import (
    BusDevice,
    NodeMissing,
    NoSuchDevice,
    NotBound,
    VdpaNode,
    bus_devices,
    rebind_commands,
    resolve,
)

# /dev/null and /dev/zero stand for character devices: making new ones would need privilege.
NULL = (1, 3)
ZERO = (1, 5)


class Tree:
    """A sysfs and a /dev in a temporary folder, with the kernel's layout."""

    def __init__(self, root: Path) -> None:
        self.sysfs = root / "sys"
        self.dev = root / "dev"
        self.dev.mkdir()
        (self.sysfs / "bus/vdpa/devices").mkdir(parents=True)

    def add(self, name: str, driver: str | None = None, override: str = "(null)") -> Path:
        device = self.sysfs / "devices" / name
        device.mkdir(parents=True)
        (device / "driver_override").write_text(override + "\n")
        if driver:
            home = self.sysfs / "bus/vdpa/drivers" / driver
            home.mkdir(parents=True, exist_ok=True)
            (device / "driver").symlink_to(home)
        (self.sysfs / "bus/vdpa/devices" / name).symlink_to(device)
        return device

    def add_vhost(self, name: str, char_device: str, number: tuple[int, int]) -> None:
        folder = self.add(name, "vhost_vdpa") / char_device
        folder.mkdir()
        (folder / "dev").write_text("{}:{}\n".format(*number))

    def node(self, char_device: str, target: str) -> Path:
        path = self.dev / char_device
        path.symlink_to(target)
        return path

    def resolve(self, target: str) -> VdpaNode:
        return resolve(target, sysfs_root=self.sysfs, dev_root=self.dev)

    def devices(self) -> list[BusDevice]:
        return bus_devices(self.sysfs)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_devices_are_listed_in_counting_order(tree: Tree) -> None:
    for name in ("blk10", "blk2", "net0"):
        tree.add(name)
    assert [device.name for device in tree.devices()] == ["blk2", "blk10", "net0"]


def test_a_host_without_vdpa_has_no_devices(tmp_path: Path) -> None:
    assert bus_devices(tmp_path) == []


def test_a_device_with_vhost_vdpa_has_a_character_device(tree: Tree) -> None:
    tree.add_vhost("blk0", "vhost-vdpa-3", NULL)
    assert tree.devices() == [
        BusDevice(name="blk0", driver="vhost_vdpa", char_device="vhost-vdpa-3", number=NULL)
    ]


def test_a_device_with_virtio_vdpa_has_the_hosts_interfaces(tree: Tree) -> None:
    folder = tree.add("net0", "virtio_vdpa", override="virtio_vdpa")
    (folder / "virtio4/net/eth1").mkdir(parents=True)
    assert tree.devices() == [
        BusDevice(
            name="net0",
            driver="virtio_vdpa",
            virtio_device="virtio4",
            interfaces=("eth1",),
            driver_override="virtio_vdpa",
        )
    ]


@pytest.mark.parametrize("prefix", ["", "vdpa:"])
def test_a_device_resolves_by_name(tree: Tree, prefix: str) -> None:
    tree.add_vhost("blk0", "vhost-vdpa-0", NULL)
    node = tree.node("vhost-vdpa-0", "/dev/null")
    assert tree.resolve(f"{prefix}blk0") == VdpaNode(
        name="blk0", node=node, driver="vhost_vdpa", number=NULL
    )


@pytest.mark.parametrize("prefix", ["", "vdpa:"])
def test_a_device_resolves_by_its_node(tree: Tree, prefix: str) -> None:
    tree.add_vhost("blk0", "vhost-vdpa-0", NULL)
    tree.add_vhost("blk1", "vhost-vdpa-1", ZERO)
    tree.node("vhost-vdpa-0", "/dev/null")
    node = tree.node("vhost-vdpa-1", "/dev/zero")
    found = tree.resolve(f"{prefix}{node}")
    assert (found.name, found.node) == ("blk1", node)


def test_a_link_to_a_node_elsewhere_resolves_to_the_same_device(tree: Tree) -> None:
    tree.add_vhost("blk0", "vhost-vdpa-0", NULL)
    link = tree.dev / "my-disk"
    link.symlink_to(tree.node("vhost-vdpa-0", "/dev/null"))
    found = tree.resolve(str(link))
    assert (found.name, found.node) == ("blk0", link)


def test_an_unknown_name_is_answered_with_what_exists(tree: Tree) -> None:
    tree.add_vhost("blk0", "vhost-vdpa-0", NULL)
    tree.add("net0")
    with pytest.raises(NoSuchDevice, match="no vDPA device blk1") as caught:
        tree.resolve("blk1")
    assert caught.value.hint == "there are: blk0 (/dev/vhost-vdpa-0), net0"


def test_without_any_device_the_hint_is_how_to_make_one(tree: Tree) -> None:
    with pytest.raises(NoSuchDevice) as caught:
        tree.resolve("blk0")
    assert "vdpa dev add" in caught.value.hint


def test_without_the_module_the_hint_is_to_load_it(tmp_path: Path) -> None:
    with pytest.raises(NoSuchDevice, match="no vDPA") as caught:
        resolve("blk0", sysfs_root=tmp_path, dev_root=tmp_path)
    assert caught.value.hint == "modprobe -a vdpa vhost_vdpa"


def test_a_character_device_that_is_no_vdpa_is_refused(tree: Tree) -> None:
    tree.add_vhost("blk0", "vhost-vdpa-0", NULL)
    with pytest.raises(NoSuchDevice, match="no vDPA device /dev/zero"):
        tree.resolve("/dev/zero")


def test_an_ordinary_file_is_called_what_it_is(tree: Tree) -> None:
    (tree.dev / "disk.img").touch()
    with pytest.raises(NoSuchDevice, match="is no character device"):
        tree.resolve(str(tree.dev / "disk.img"))


def test_a_device_that_the_host_uses_comes_with_the_commands_to_take_it(tree: Tree) -> None:
    (tree.add("net0", "virtio_vdpa") / "virtio4/net/eth1").mkdir(parents=True)
    with pytest.raises(NotBound, match="virtio_vdpa has it, as eth1 of this host") as caught:
        tree.resolve("net0")
    assert caught.value.hint == (
        "modprobe vhost_vdpa; "
        "echo vhost_vdpa > /sys/bus/vdpa/devices/net0/driver_override; "
        "echo net0 > /sys/bus/vdpa/drivers/virtio_vdpa/unbind; "
        "echo net0 > /sys/bus/vdpa/drivers_probe"
    )


def test_a_device_that_no_driver_has_needs_the_module(tree: Tree) -> None:
    tree.add("blk0")
    with pytest.raises(NotBound, match="no driver has it") as caught:
        tree.resolve("blk0")
    assert caught.value.hint == (
        "modprobe vhost_vdpa; if that is not enough: "
        "echo vhost_vdpa > /sys/bus/vdpa/devices/blk0/driver_override; "
        "echo blk0 > /sys/bus/vdpa/drivers_probe"
    )


def test_an_override_for_another_driver_is_named(tree: Tree) -> None:
    tree.add("blk0", override="virtio_vdpa")
    with pytest.raises(NotBound, match="driver_override wants virtio_vdpa"):
        tree.resolve("blk0")


def test_an_unbound_device_is_probed_without_unbinding_it() -> None:
    commands = rebind_commands(BusDevice(name="blk0", driver=None))
    assert not any("unbind" in command for command in commands)
    assert commands[-1] == "echo blk0 > /sys/bus/vdpa/drivers_probe"


@pytest.mark.parametrize("by_path", [False, True])
def test_a_node_that_dev_lacks_comes_with_its_numbers(tree: Tree, by_path: bool) -> None:
    tree.add_vhost("blk0", "vhost-vdpa-0", (511, 7))
    node = tree.dev / "vhost-vdpa-0"
    with pytest.raises(NodeMissing, match="is missing") as caught:
        tree.resolve(str(node) if by_path else "blk0")
    assert f"mknod {node} c 511 7" in caught.value.hint


@pytest.mark.parametrize("by_path", [False, True])
def test_a_node_left_over_from_an_earlier_device_is_not_used(tree: Tree, by_path: bool) -> None:
    tree.add_vhost("blk0", "vhost-vdpa-0", (511, 7))
    node = tree.node("vhost-vdpa-0", "/dev/null")
    with pytest.raises(NodeMissing, match="another device's old node"):
        tree.resolve(str(node) if by_path else "blk0")


def test_every_refusal_is_a_target_error() -> None:
    assert all(issubclass(kind, TargetError) for kind in (NoSuchDevice, NotBound, NodeMissing))
    assert not issubclass(NotBound, Unsupported)
