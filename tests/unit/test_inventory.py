"""What sysfs and netlink tell of vDPA, joined and reported."""

from __future__ import annotations

from vhostbridge.backends.vdpa.discovery import BusDevice
from vhostbridge.backends.vdpa.inventory import (
    InventoryEntry,
    device_report,
    join,
    management_report,
)
from vhostbridge.backends.vdpa.netlink import MgmtDevice, VdpaDeviceConfig, VdpaDeviceInfo

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
