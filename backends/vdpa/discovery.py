"""Find vDPA devices and their character devices through sysfs.

netlink doesn't say which ``/dev/vhost-vdpa-N`` belongs to a device; sysfs does. Everything here
reads files only: no device is opened, because opening one resets it.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vhostbridge.backends.errors import TargetError

SYSFS_ROOT = Path("/sys")
DEV_ROOT = Path("/dev")

VHOST_VDPA = "vhost_vdpa"
VIRTIO_VDPA = "virtio_vdpa"

_CHAR_DEVICE = re.compile(r"^vhost-vdpa-\d+$")
_VIRTIO_DEVICE = re.compile(r"^virtio\d+$")


class NoSuchDevice(TargetError):
    """No vDPA device has that name or node."""


class NotBound(TargetError):
    """The device exists, but the driver ``vhost_vdpa`` doesn't have it, so there is no node."""


class NodeMissing(TargetError):
    """The kernel has the character device; /dev hasn't."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BusDevice:
    """A device on the vdpa bus, whichever driver has it.

    ``driver`` is ``vhost_vdpa``, ``virtio_vdpa`` or None for none. ``char_device`` and ``number``
    (major, minor) are there with the first; ``virtio_device`` and ``interfaces`` (``eth1``,
    ``vda``) with the second. ``driver_override`` is what binding is restricted to.
    """

    name: str
    driver: str | None
    char_device: str | None = None
    number: tuple[int, int] | None = None
    virtio_device: str | None = None
    interfaces: tuple[str, ...] = ()
    driver_override: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class VdpaNode:
    """A vDPA device that can be opened: its name and its character device."""

    name: str
    node: Path
    driver: str
    number: tuple[int, int]


def bus_devices(sysfs_root: Path = SYSFS_ROOT) -> list[BusDevice]:
    """List the devices on the vdpa bus by name; none when the module vdpa is not loaded."""
    folder = sysfs_root / "bus/vdpa/devices"
    names = sorted(_listed(folder), key=_natural)
    return [_bus_device(folder / name) for name in names]


def resolve(target: str, *, sysfs_root: Path = SYSFS_ROOT, dev_root: Path = DEV_ROOT) -> VdpaNode:
    """Find the device that ``target`` names: a vDPA name, a node's path, or ``vdpa:`` and either.

    A path may be a link to the node or the same node elsewhere. Nothing is opened. Raises
    NoSuchDevice, NotBound or NodeMissing, each with the command that helps.
    """
    wanted = target.removeprefix("vdpa:")
    devices = bus_devices(sysfs_root)
    path = Path(wanted) if "/" in wanted else None
    number = _device_number(path) if path else None
    for device in devices:
        if device.name == wanted or (number is not None and device.number == number):
            return _node(device, path if number is not None else None, dev_root)
    if path is not None:
        # A node that is gone, or left over from an earlier device, still has its name in sysfs.
        for device in devices:
            if device.char_device == path.name:
                return _node(device, path, dev_root)
    raise _no_such_device(wanted, path, devices, sysfs_root)


def rebind_commands(device: BusDevice) -> list[str]:
    """Return the shell commands that give the device to ``vhost_vdpa``, in order.

    The interfaces of a device that virtio_vdpa has vanish with the first of them.
    """
    folder = f"/sys/bus/vdpa/devices/{device.name}"
    commands = ["modprobe vhost_vdpa", f"echo {VHOST_VDPA} > {folder}/driver_override"]
    if device.driver is not None:
        commands.append(f"echo {device.name} > /sys/bus/vdpa/drivers/{device.driver}/unbind")
    commands.append(f"echo {device.name} > /sys/bus/vdpa/drivers_probe")
    return commands


def _listed(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _natural(name: str) -> list[tuple[int, str]]:
    # blk2 before blk10.
    return [
        (int(part) if part.isdecimal() else -1, part) for part in re.split(r"(\d+)", name) if part
    ]


def _bus_device(folder: Path) -> BusDevice:
    entries = _listed(folder)
    char_device = next((name for name in entries if _CHAR_DEVICE.match(name)), None)
    virtio = next((name for name in entries if _VIRTIO_DEVICE.match(name)), None)
    override = _read(folder / "driver_override")
    return BusDevice(
        name=folder.name,
        driver=_link_name(folder / "driver"),
        char_device=char_device,
        number=_parse_number(_read(folder / char_device / "dev")) if char_device else None,
        virtio_device=virtio,
        interfaces=_interfaces(folder / virtio) if virtio else (),
        # The kernel prints "(null)" for a string that isn't set.
        driver_override=None if override in ("", "(null)") else override,
    )


def _interfaces(virtio: Path) -> tuple[str, ...]:
    return tuple(
        name for kind in ("net", "block", "tty") for name in sorted(_listed(virtio / kind))
    )


def _link_name(link: Path) -> str | None:
    try:
        return link.readlink().name
    except OSError:
        return None


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _parse_number(text: str) -> tuple[int, int] | None:
    major, _, minor = text.partition(":")
    return (int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else None


def _device_number(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    if not stat.S_ISCHR(status.st_mode):
        return None
    return os.major(status.st_rdev), os.minor(status.st_rdev)


def _node(device: BusDevice, given: Path | None, dev_root: Path) -> VdpaNode:
    if device.driver != VHOST_VDPA:
        raise _not_bound(device)
    if device.char_device is None or device.number is None:
        raise NotBound(
            f"{device.name} has the driver {VHOST_VDPA} but no character device",
            "it is being removed or set up: try again",
        )
    node = given if given is not None else dev_root / device.char_device
    found = _device_number(node)
    if found != device.number:
        major, minor = device.number
        what = "is missing" if found is None else "is another device's old node"
        raise NodeMissing(
            f"{device.name}: {node} {what}",
            f"udev makes it; by hand: mknod {node} c {major} {minor}; "
            f"in a container: pass it in (--device {node})",
        )
    return VdpaNode(name=device.name, node=node, driver=VHOST_VDPA, number=device.number)


def _not_bound(device: BusDevice) -> NotBound:
    load, *rebind = rebind_commands(device)
    commands = "; ".join([load, *rebind])
    if device.driver is None:
        why = "no driver has it"
        if device.driver_override in (None, VHOST_VDPA):
            return NotBound(
                f"{device.name} has no character device: {why}",
                f"{load}; if that is not enough: {'; '.join(rebind)}",
            )
        return NotBound(
            f"{device.name} has no character device: {why}, "
            f"and driver_override wants {device.driver_override}",
            commands,
        )
    used = ", ".join(device.interfaces) or device.virtio_device
    as_what = f", as {used} of this host" if used else ""
    return NotBound(
        f"{device.name} has no character device: the driver {device.driver} has it{as_what}",
        commands,
    )


def _no_such_device(
    wanted: str, path: Path | None, devices: Iterable[BusDevice], sysfs_root: Path
) -> NoSuchDevice:
    if path is not None and path.exists() and _device_number(path) is None:
        return NoSuchDevice(f"{wanted} is no character device", _what_exists(devices))
    if not (sysfs_root / "bus/vdpa").exists():
        return NoSuchDevice(
            f"no vDPA device {wanted}: this kernel has no vDPA", "modprobe -a vdpa vhost_vdpa"
        )
    return NoSuchDevice(f"no vDPA device {wanted}", _what_exists(devices))


def _what_exists(devices: Iterable[BusDevice]) -> str:
    listed = [
        f"{device.name} (/dev/{device.char_device})" if device.char_device else device.name
        for device in devices
    ]
    if not listed:
        return "there is none: `vdpa dev add name NAME mgmtdev MGMTDEV` creates one"
    return f"there are: {', '.join(listed)}"
