"""vDPA management: list, inspect, create and delete devices through the ``vdpa`` netlink family.

Calls block, shortly, in the kernel: from trio use ``trio.to_thread.run_sync``, with one
``VdpaNetlink`` a call. The family sends no events and doesn't know ``/dev/vhost-vdpa-N``;
``discovery`` finds the node through sysfs.

Messages are pyroute2's. The socket is ours: pyroute2's runs an asyncio loop for each call and
writes to the root logger when the family is missing.
"""

from __future__ import annotations

import errno
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from vhostbridge.backends.closing import Closing
from vhostbridge.backends.errors import ConfigError, KernelRefused, Unsupported

from .netlink_messages import (
    GENL_ID_CTRL,
    Attributes,
    Command,
    End,
    Reply,
    decode,
    encode_family_lookup,
    encode_request,
)
from .netlink_objects import (
    MgmtDevice,
    QueueStatistics,
    VdpaDeviceConfig,
    VdpaDeviceInfo,
    device_config_from,
    device_info_from,
    mgmt_device_from,
    queue_statistics_from,
)

__all__ = [
    "FamilyMissing",
    "MgmtDevice",
    "NetlinkRefused",
    "QueueStatistics",
    "VdpaDeviceConfig",
    "VdpaDeviceInfo",
    "VdpaNetlink",
]

_NETLINK_GENERIC = 16  # the socket module names the other ones only
_SOL_NETLINK = 270
_NETLINK_CAP_ACK = 10
_NETLINK_EXT_ACK = 11
_LARGEST_DATAGRAM = 65536  # the kernel fills dump buffers of 32 KiB at most

_MAC = re.compile(r"^[0-9a-f]{2}(:[0-9a-f]{2}){5}$")
_LOWEST_MTU = 68

_HINTS: Mapping[int, str] = MappingProxyType(
    {
        errno.EPERM: "this needs CAP_NET_ADMIN: run it as root",
        errno.EACCES: "this needs CAP_NET_ADMIN: run it as root",
        errno.ENODEV: "`vhost-bridge list` shows the devices and management devices that exist",
        errno.EEXIST: "choose another name or delete that device first",
        errno.EAGAIN: "it answers once a driver or VM has negotiated features",
        errno.EOPNOTSUPP: "the device's driver does not support this",
        errno.EBUSY: "something holds the device open",
    }
)


class FamilyMissing(Unsupported):
    """The kernel has no ``vdpa`` netlink family, or not in this network namespace."""


class NetlinkRefused(KernelRefused):
    """The kernel refused a vdpa netlink request; nothing was changed. ``extack`` is its reason."""

    def __init__(self, operation: str, code: int, extack: str = "") -> None:
        super().__init__(operation, code, _HINTS.get(code, ""))
        self.extack = extack
        if extack:
            self.message += f": {extack}"
            self.args = (self.message,)


class VdpaNetlink(Closing):
    """A connection to the kernel's vDPA management; a context manager, for one thread.

    Raises FamilyMissing when the kernel has no vDPA, KernelRefused when sockets of this kind are
    forbidden. ``sock`` replaces the netlink socket and is closed in its place.
    """

    def __init__(
        self, sock: socket.socket | None = None, *, sysfs_root: Path = Path("/sys")
    ) -> None:
        self._sysfs_root = sysfs_root
        self._sequence = 0
        self._socket = sock if sock is not None else _open_socket()
        try:
            self._family = self._find_family()
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        """Close the socket; again is harmless."""
        self._socket.close()

    def management_devices(self) -> list[MgmtDevice]:
        """List the management devices, in the kernel's order."""
        return [mgmt_device_from(reply) for reply in self._dump(Command.MGMTDEV_GET)]

    def devices(self) -> list[VdpaDeviceInfo]:
        """List the vDPA devices, in the kernel's order."""
        return [device_info_from(reply) for reply in self._dump(Command.DEV_GET)]

    def device(self, name: str) -> VdpaDeviceInfo:
        """Return one device. Raises NetlinkRefused (ENODEV) when there is none of that name."""
        return device_info_from(
            self._get(f"vDPA device {name}", Command.DEV_GET, [("DEV_NAME", name)])
        )

    def device_config(self, name: str) -> VdpaDeviceConfig:
        """Return a device's configuration.

        Raises NetlinkRefused (EOPNOTSUPP) for types other than net and block.
        """
        operation = f"configuration of vDPA device {name}"
        return device_config_from(
            self._get(operation, Command.DEV_CONFIG_GET, [("DEV_NAME", name)])
        )

    def queue_statistics(self, name: str, queue_index: int) -> QueueStatistics:
        """Return the vendor's counters of one vring; needs CAP_NET_ADMIN.

        Raises NetlinkRefused: EAGAIN before features are negotiated, EOPNOTSUPP for a driver
        without statistics, EINVAL or ERANGE for a vring that doesn't exist.
        """
        attributes: Attributes = [("DEV_NAME", name), ("DEV_QUEUE_INDEX", queue_index)]
        operation = f"statistics of vring {queue_index} of vDPA device {name}"
        return queue_statistics_from(self._get(operation, Command.DEV_VSTATS_GET, attributes))

    def create(
        self,
        name: str,
        mgmtdev: str,
        *,
        mac: str | None = None,
        mtu: int | None = None,
        max_queue_pairs: int | None = None,
        features: int | None = None,
    ) -> None:
        """Create a device on a management device (its ``handle``); needs CAP_NET_ADMIN.

        ``features`` provisions exactly that feature word. Raises ConfigError for a value that
        can't be right, NetlinkRefused otherwise; no device exists after either.
        """
        bus, _, mgmtdev_name = mgmtdev.rpartition("/")
        attributes: list[tuple[str, int | str]] = [("DEV_NAME", name)]
        if bus:
            attributes.append(("MGMTDEV_BUS_NAME", bus))
        attributes.append(("MGMTDEV_DEV_NAME", mgmtdev_name))
        if mac is not None:
            attributes.append(("DEV_NET_CFG_MACADDR", _checked_mac(mac)))
        if mtu is not None:
            attributes.append(("DEV_NET_CFG_MTU", _checked("MTU", mtu, _LOWEST_MTU)))
        if max_queue_pairs is not None:
            pairs = _checked("number of queue pairs", max_queue_pairs, 1)
            attributes.append(("DEV_NET_CFG_MAX_VQP", pairs))
        if features is not None:
            attributes.append(("DEV_FEATURES", features))
        self._change(f"create vDPA device {name} on {mgmtdev}", Command.DEV_NEW, attributes)

    def delete(self, name: str) -> None:
        """Delete a device that was created through a management device; needs CAP_NET_ADMIN.

        Blocks, without a way to interrupt it, until nobody holds its /dev/vhost-vdpa-N open:
        look at ``holders`` first.
        """
        self._change(f"delete vDPA device {name}", Command.DEV_DEL, [("DEV_NAME", name)])

    def set_mac(self, name: str, mac: str) -> None:
        """Set the MAC that a net device offers (Linux 6.12 or newer); needs CAP_NET_ADMIN.

        A driver that runs doesn't notice.
        """
        attributes: Attributes = [("DEV_NAME", name), ("DEV_NET_CFG_MACADDR", _checked_mac(mac))]
        self._change(f"set the MAC of vDPA device {name}", Command.DEV_ATTR_SET, attributes)

    def _dump(self, command: Command) -> list[Reply]:
        replies, end = self._request(command, [], dump=True)
        if end.errno:
            raise NetlinkRefused("list vDPA devices", end.errno, end.text)
        return replies

    def _get(self, operation: str, command: Command, attributes: Attributes) -> Reply:
        replies, end = self._request(command, attributes)
        if end.errno or not replies:
            raise NetlinkRefused(operation, end.errno or errno.ENODATA, end.text)
        return replies[0]

    def _change(self, operation: str, command: Command, attributes: Attributes) -> None:
        _, end = self._request(command, attributes)
        if end.errno:
            raise NetlinkRefused(operation, end.errno, end.text)

    def _request(
        self, command: Command, attributes: Attributes, dump: bool = False
    ) -> tuple[list[Reply], End]:
        self._sequence += 1
        request = encode_request(
            self._family, command, attributes, sequence=self._sequence, dump=dump
        )
        return self._exchange(request, self._family)

    def _find_family(self) -> int:
        self._sequence += 1
        replies, end = self._exchange(encode_family_lookup(self._sequence), GENL_ID_CTRL)
        family = replies[0].number("FAMILY_ID") if replies else None
        if family is not None:
            return family
        if end.errno not in (0, errno.ENOENT):
            raise NetlinkRefused("look up the vdpa netlink family", end.errno, end.text)
        if (self._sysfs_root / "bus/vdpa").exists():
            raise FamilyMissing(
                "vDPA can't be managed from this network namespace",
                "only the initial one has it: nsenter --net=/proc/1/ns/net",
            )
        raise FamilyMissing("this kernel has no vDPA: module vdpa is not loaded", "modprobe vdpa")

    def _exchange(self, request: bytes, family: int) -> tuple[list[Reply], End]:
        self._socket.send(request)
        replies: list[Reply] = []
        while True:
            for item in decode(self._socket.recv(_LARGEST_DATAGRAM), family, self._sequence):
                if isinstance(item, End):
                    return replies, item
                replies.append(item)


def _open_socket() -> socket.socket:
    try:
        sock = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_GENERIC
        )
    except OSError as error:
        hint = "a sandbox may forbid it: allow AF_NETLINK in RestrictAddressFamilies="
        raise KernelRefused("open a netlink socket", error.errno or 0, hint) from error
    # Without extack text most refusals are a bare EINVAL; both options are as old as Linux 4.12.
    sock.setsockopt(_SOL_NETLINK, _NETLINK_EXT_ACK, 1)
    sock.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
    sock.bind((0, 0))
    return sock


def _checked_mac(mac: str) -> str:
    text = mac.lower().replace("-", ":")
    if not _MAC.match(text):
        raise ConfigError(f"{mac!r} is no MAC address", "write it as 52:54:00:12:34:56")
    if int(text[:2], 16) & 1:
        raise ConfigError(f"{mac} is a multicast address", "a device's own MAC is unicast")
    return text


def _checked(what: str, value: int, lowest: int) -> int:
    if not lowest <= value <= 0xFFFF:
        raise ConfigError(f"{value} is no {what}", f"it may be {lowest} to 65535")
    return value
