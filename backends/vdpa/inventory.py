"""Everything that exists of vDPA on this host, as one report: management, bus and nodes joined."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vhostbridge.backends.errors import BridgeError, KernelRefused, Unsupported
from vhostbridge.backends.virtio import device_name, feature_names

from .discovery import DEV_ROOT, SYSFS_ROOT, BusDevice, bus_devices
from .netlink import MgmtDevice, NetlinkRefused, VdpaDeviceConfig, VdpaDeviceInfo, VdpaNetlink

Report = dict[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class InventoryEntry:
    """One vDPA device; what a source didn't tell is None."""

    name: str
    bus: BusDevice | None
    info: VdpaDeviceInfo | None
    config: VdpaDeviceConfig | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """The host's vDPA. ``problem`` says why management data is missing, None when it isn't."""

    management: tuple[MgmtDevice, ...]
    devices: tuple[InventoryEntry, ...]
    problem: BridgeError | None = None


def take_inventory(sysfs_root: Path = SYSFS_ROOT) -> Inventory:
    """Collect management devices and devices; needs no privilege and opens no device.

    Blocks shortly. Without the netlink family there is still what sysfs tells.
    """
    on_bus = {device.name: device for device in bus_devices(sysfs_root)}
    try:
        with VdpaNetlink(sysfs_root=sysfs_root) as netlink:
            management = tuple(netlink.management_devices())
            infos = {info.name: info for info in netlink.devices()}
            configs = {name: _config(netlink, name) for name in infos}
    except (Unsupported, KernelRefused) as error:
        return Inventory(management=(), devices=join(on_bus, {}, {}), problem=error)
    return Inventory(management=management, devices=join(on_bus, infos, configs))


def join(
    on_bus: Mapping[str, BusDevice],
    infos: Mapping[str, VdpaDeviceInfo],
    configs: Mapping[str, VdpaDeviceConfig | None],
) -> tuple[InventoryEntry, ...]:
    """Join what the sources say, by name; in sysfs's order, then what only netlink knows."""
    names = [*on_bus, *(name for name in infos if name not in on_bus)]
    return tuple(
        InventoryEntry(
            name=name, bus=on_bus.get(name), info=infos.get(name), config=configs.get(name)
        )
        for name in names
    )


def device_report(entry: InventoryEntry, dev_root: Path = DEV_ROOT) -> Report:
    """Return a device as plain values for tables and JSON; unknown ones are left out.

    Keys that iproute2's ``vdpa`` also has are called the same.
    """
    report: Report = {}
    if info := entry.info:
        report |= {
            "type": device_name(info.device_id),
            "mgmtdev": info.mgmtdev,
            "vendor_id": info.vendor_id,
            "max_vqs": info.max_vqs,
            "max_vq_size": info.max_vq_size,
        }
    if bus := entry.bus:
        report["driver"] = bus.driver
        if bus.char_device:
            report["node"] = str(dev_root / bus.char_device)
        if bus.interfaces:
            report["interfaces"] = list(bus.interfaces)
    if config := entry.config:
        if config.features is not None:
            report["features"] = feature_names(config.features, config.device_id)
        if config.negotiated_features is not None:
            report["negotiated_features"] = feature_names(
                config.negotiated_features, config.device_id
            )
        report["config"] = dict(config.fields)
    return report


def management_report(mgmtdev: MgmtDevice) -> Report:
    """Return a management device as plain values for tables and JSON.

    Its feature names are those of its device type; with several types only the transport's.
    """
    only = mgmtdev.device_ids[0] if len(mgmtdev.device_ids) == 1 else None
    report: Report = {"supported_classes": [device_name(one) for one in mgmtdev.device_ids]}
    if mgmtdev.max_vqs is not None:
        report["max_supported_vqs"] = mgmtdev.max_vqs
    if mgmtdev.features is not None:
        report["dev_features"] = feature_names(mgmtdev.features, only)
    return report


def _config(netlink: VdpaNetlink, name: str) -> VdpaDeviceConfig | None:
    # One by one: a type without a configuration reply would end a dump before the others.
    try:
        return netlink.device_config(name)
    except NetlinkRefused:
        return None
