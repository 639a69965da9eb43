"""Devices, nodes and holders found in made-up sysfs and proc trees, and in the real /proc."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from vhostbridge.backends.errors import TargetError, Unsupported
from vhostbridge.backends.holders import listening_at
from vhostbridge.backends.vdpa.discovery import (
    BusDevice,
    Holder,
    NodeMissing,
    NoSuchDevice,
    NotBound,
    VdpaNode,
    bus_devices,
    holders,
    rebind_commands,
    resolve,
    unix_listener,
)
from vhostbridge.backends.vdpa.inventory import (
    InventoryEntry,
    device_report,
    join,
    management_report,
)
from vhostbridge.backends.vdpa.netlink import MgmtDevice, VdpaDeviceConfig, VdpaDeviceInfo
from vhostbridge.backends.vhostuser.sockets import listen, unlisten

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


class Proc:
    """A /proc in a temporary folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "net").mkdir()

    def process(self, pid: int, comm: str, *cmdline: str, fds: tuple[str, ...] = ()) -> Path:
        folder = self.root / str(pid)
        (folder / "fd").mkdir(parents=True)
        (folder / "comm").write_text(comm + "\n")
        (folder / "cmdline").write_bytes(b"".join(word.encode() + b"\0" for word in cmdline))
        for number, target in enumerate(fds):
            (folder / "fd" / str(number)).symlink_to(target)
        return folder

    def sockets(self, *rows: tuple[str, int, str]) -> None:
        lines = ["Num       RefCount Protocol Flags    Type St Inode Path"]
        lines += [f"0000: 00000002 00000000 {flags} 0001 01 {i} {path}" for flags, i, path in rows]
        (self.root / "net/unix").write_text("\n".join(lines) + "\n")


LISTENING = "00010000"
CONNECTED = "00000000"


@pytest.fixture
def proc(tmp_path: Path) -> Proc:
    return Proc(tmp_path)


def test_holders_of_a_device_are_found_by_its_number(proc: Proc) -> None:
    proc.process(80, "qemu-system-x86", "qemu-system-x86_64", "-m", "1G", fds=("/dev/null",))
    proc.process(9, "cat", "cat", fds=("/dev/zero",))
    assert holders(Path("/dev/null"), proc.root) == [
        Holder(80, "qemu-system-x86", ("qemu-system-x86_64", "-m", "1G"))
    ]


def test_each_holder_is_listed_once_by_rising_pid(proc: Proc) -> None:
    proc.process(100, "b", "b", fds=("/dev/null", "/dev/null"))
    proc.process(20, "a", "a", fds=("/dev/null",))
    assert [holder.pid for holder in holders(Path("/dev/null"), proc.root)] == [20, 100]


def test_a_process_that_we_may_not_look_into_is_left_out(proc: Proc) -> None:
    folder = proc.root / "33"
    folder.mkdir()
    (folder / "fd").write_text("not a folder: listing it fails as for another user's process")
    proc.process(34, "mine", "mine", fds=("/dev/null",))
    assert [holder.pid for holder in holders(Path("/dev/null"), proc.root)] == [34]


def test_a_target_that_is_gone_has_no_holders(tmp_path: Path) -> None:
    assert holders(tmp_path / "gone") == []


def test_this_process_holds_what_it_has_open(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("w"):
        assert [holder.pid for holder in holders(path)] == [os.getpid()]
    assert holders(path) == []


@pytest.mark.parametrize(
    ("holder", "shown"),
    [
        (
            Holder(123, "qemu", ("qemu-system-x86_64", "-m", "1G")),
            "pid 123 (qemu-system-x86_64 -m 1G)",
        ),
        (Holder(2, "kthreadd"), "pid 2 (kthreadd)"),
        (Holder(5, "x", ("x" * 100,)), f"pid 5 ({'x' * 59}…)"),
        (Holder(None), "a process of another user"),
    ],
)
def test_a_holder_is_shown_on_one_line(holder: Holder, shown: str) -> None:
    assert str(holder) == shown


def test_a_listener_is_found_with_its_process(proc: Proc, tmp_path: Path) -> None:
    path = tmp_path / "with space.sock"
    proc.sockets((CONNECTED, 10, str(path)), (LISTENING, 11, str(path)))
    proc.process(50, "virtiofsd", "virtiofsd", fds=("socket:[11]",))
    assert unix_listener(path, proc.root) == Holder(50, "virtiofsd", ("virtiofsd",))


def test_a_connected_socket_of_that_path_is_no_listener(proc: Proc, tmp_path: Path) -> None:
    proc.sockets((CONNECTED, 10, str(tmp_path / "s")), (LISTENING, 11, str(tmp_path / "other")))
    assert unix_listener(tmp_path / "s", proc.root) is None


def test_a_listener_of_another_user_is_reported_without_its_pid(proc: Proc, tmp_path: Path) -> None:
    proc.sockets((LISTENING, 11, str(tmp_path / "s")))
    assert unix_listener(tmp_path / "s", proc.root) == Holder(None)


def test_a_listener_may_have_bound_a_relative_path(proc: Proc, tmp_path: Path) -> None:
    proc.sockets((LISTENING, 11, "run/s"), (LISTENING, 12, "run/s"))
    (tmp_path / "elsewhere").mkdir()
    (proc.process(50, "a", "a", fds=("socket:[11]",)) / "cwd").symlink_to(tmp_path / "elsewhere")
    (proc.process(51, "b", "b", fds=("socket:[12]",)) / "cwd").symlink_to(tmp_path)
    assert unix_listener(tmp_path / "run/s", proc.root) == Holder(51, "b", ("b",))


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "live.sock"))
        yield sock


def test_a_real_socket_counts_once_it_listens_and_no_longer_than_that(
    listener: socket.socket,
) -> None:
    path = Path(listener.getsockname())
    assert unix_listener(path) is None
    listener.listen(1)
    found = unix_listener(path)
    assert found is not None and found.pid == os.getpid()
    listener.close()
    assert path.exists()
    assert unix_listener(path) is None


def test_looking_for_a_listener_does_not_connect(listener: socket.socket) -> None:
    listener.listen(1)
    unix_listener(Path(listener.getsockname()))
    listener.setblocking(False)
    with pytest.raises(BlockingIOError):
        listener.accept()


NET0 = VdpaDeviceInfo(
    name="net0",
    mgmtdev="vdpasim_net",
    device_id=1,
    vendor_id=0,
    max_vqs=3,
    max_vq_size=256,
    min_vq_size=None,
)
NET0_CONFIG = VdpaDeviceConfig(
    name="net0", device_id=1, features=1 << 5, negotiated_features=None, fields={"mtu": 1500}
)


def test_the_inventory_joins_by_name_and_keeps_what_only_one_source_knows() -> None:
    blk0 = BusDevice(name="blk0", driver=None)
    assert join({"blk0": blk0}, {"net0": NET0}, {"net0": NET0_CONFIG}) == (
        InventoryEntry(name="blk0", bus=blk0, info=None, config=None),
        InventoryEntry(name="net0", bus=None, info=NET0, config=NET0_CONFIG),
    )


def test_a_device_report_has_plain_values_only() -> None:
    bus = BusDevice(name="net0", driver="vhost_vdpa", char_device="vhost-vdpa-1", number=(511, 1))
    assert device_report(InventoryEntry(name="net0", bus=bus, info=NET0, config=NET0_CONFIG)) == {
        "type": "net",
        "mgmtdev": "vdpasim_net",
        "vendor_id": 0,
        "max_vqs": 3,
        "max_vq_size": 256,
        "driver": "vhost_vdpa",
        "node": "/dev/vhost-vdpa-1",
        "features": ["MAC"],
        "config": {"mtu": 1500},
    }


def test_a_management_report_names_features_by_its_only_type() -> None:
    one = MgmtDevice(name="m", bus=None, device_ids=(1,), max_vqs=3, features=1 << 22)
    two = MgmtDevice(name="m", bus=None, device_ids=(1, 2), max_vqs=None, features=1 << 22)
    assert management_report(one) == {
        "supported_classes": ["net"],
        "max_supported_vqs": 3,
        "dev_features": ["MQ"],
    }
    assert management_report(two) == {
        "supported_classes": ["net", "block"],
        "dev_features": ["bit_22"],
    }


def test_path_that_was_taken_from_a_socket_has_two(tmp_path: Path) -> None:
    path = tmp_path / "s"
    assert listening_at(path) == set()
    with socket.socket(socket.AF_UNIX) as first, socket.socket(socket.AF_UNIX) as second:
        first.bind(str(path))
        assert listening_at(path) == set()
        first.listen()
        assert listening_at(path) == {os.fstat(first.fileno()).st_ino}
        path.unlink()
        second.bind(str(path))
        second.listen()
        assert listening_at(path) == {os.fstat(one.fileno()).st_ino for one in (first, second)}


async def test_path_is_removed_by_whom_it_still_belongs_to(tmp_path: Path) -> None:
    path = tmp_path / "s"
    first = listen(str(path))
    path.unlink()
    second = listen(str(path))
    unlisten(first, str(path))
    assert path.is_socket()
    unlisten(second, str(path))
    assert not path.exists()
