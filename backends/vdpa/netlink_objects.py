"""What vDPA management reports, as facts: built from netlink replies.

Field names of configurations are those of ``virtio_config``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from vhostbridge.backends.virtio import DeviceId

from .netlink_messages import Reply

# Attribute → the name that decode_config() gives the same field.
_CONFIG_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "DEV_NET_CFG_MACADDR": "mac",
        "DEV_NET_STATUS": "status",
        "DEV_NET_CFG_MAX_VQP": "max_virtqueue_pairs",
        "DEV_NET_CFG_MTU": "mtu",
        "DEV_BLK_CFG_CAPACITY": "capacity",
        "DEV_BLK_CFG_SIZE_MAX": "size_max",
        "DEV_BLK_CFG_BLK_SIZE": "blk_size",
        "DEV_BLK_CFG_SEG_MAX": "seg_max",
        "DEV_BLK_CFG_NUM_QUEUES": "num_queues",
        "DEV_BLK_CFG_PHY_BLK_EXP": "physical_block_exp",
        "DEV_BLK_CFG_ALIGN_OFFSET": "alignment_offset",
        "DEV_BLK_CFG_MIN_IO_SIZE": "min_io_size",
        "DEV_BLK_CFG_OPT_IO_SIZE": "opt_io_size",
        "DEV_BLK_CFG_MAX_DISCARD_SEC": "max_discard_sectors",
        "DEV_BLK_CFG_MAX_DISCARD_SEG": "max_discard_seg",
        "DEV_BLK_CFG_DISCARD_SEC_ALIGN": "discard_sector_alignment",
        "DEV_BLK_CFG_MAX_WRITE_ZEROES_SEC": "max_write_zeroes_sectors",
        "DEV_BLK_CFG_MAX_WRITE_ZEROES_SEG": "max_write_zeroes_seg",
        "DEV_BLK_READ_ONLY": "read_only",
        "DEV_BLK_FLUSH": "flush",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MgmtDevice:
    """A management device: what creates vDPA devices.

    ``features`` are those it can provision, None when it doesn't say; ``max_vqs`` likewise.
    """

    name: str
    bus: str | None
    device_ids: tuple[int, ...]
    max_vqs: int | None
    features: int | None

    @property
    def handle(self) -> str:
        """What ``create`` and iproute2's ``vdpa`` call it: ``bus/name``, or the name alone."""
        return f"{self.bus}/{self.name}" if self.bus else self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class VdpaDeviceInfo:
    """A vDPA device as its management sees it; ``max_vq_size`` counts ring entries."""

    name: str
    mgmtdev: str | None
    device_id: int
    vendor_id: int
    max_vqs: int
    max_vq_size: int
    min_vq_size: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class VdpaDeviceConfig:
    """Device configuration by field, named as in ``virtio_config``.

    ``features`` are the device's, None when the kernel doesn't say; ``negotiated_features`` are
    None before FEATURES_OK.
    """

    name: str
    device_id: int
    features: int | None
    negotiated_features: int | None
    fields: Mapping[str, int | str | bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueStatistics:
    """Vendor statistics of one vring; ``counters`` keep the driver's names and order."""

    name: str
    device_id: int
    queue_index: int
    negotiated_features: int
    max_queue_pairs: int | None
    counters: tuple[tuple[str, int], ...]


def _handle(reply: Reply) -> str | None:
    name, bus = reply.text("MGMTDEV_DEV_NAME"), reply.text("MGMTDEV_BUS_NAME")
    return f"{bus}/{name}" if bus else name


def mgmt_device_from(reply: Reply) -> MgmtDevice:
    """Read a reply to MGMTDEV_GET."""
    classes = reply.number("MGMTDEV_SUPPORTED_CLASSES") or 0
    return MgmtDevice(
        name=reply.text("MGMTDEV_DEV_NAME") or "",
        bus=reply.text("MGMTDEV_BUS_NAME"),
        device_ids=tuple(bit for bit in range(64) if classes >> bit & 1),
        max_vqs=reply.number("DEV_MGMTDEV_MAX_VQS"),
        features=reply.number("DEV_SUPPORTED_FEATURES"),
    )


def device_info_from(reply: Reply) -> VdpaDeviceInfo:
    """Read a reply to DEV_GET."""
    return VdpaDeviceInfo(
        name=reply.text("DEV_NAME") or "",
        mgmtdev=_handle(reply),
        device_id=reply.number("DEV_ID") or 0,
        vendor_id=reply.number("DEV_VENDOR_ID") or 0,
        max_vqs=reply.number("DEV_MAX_VQS") or 0,
        max_vq_size=reply.number("DEV_MAX_VQ_SIZE") or 0,
        min_vq_size=reply.number("DEV_MIN_VQ_SIZE"),
    )


def device_config_from(reply: Reply) -> VdpaDeviceConfig:
    """Read a reply to DEV_CONFIG_GET."""
    device_id = reply.number("DEV_ID") or 0
    values = dict(reply.attributes)
    if device_id == DeviceId.NET and "DEV_BLK_CFG_CAPACITY" in values:
        # Linux 6.1 had its device features at the number that is the disk's capacity since 6.2.
        values.setdefault("DEV_FEATURES", values.pop("DEV_BLK_CFG_CAPACITY"))
    fields: dict[str, int | str | bool] = {
        name: values[attribute] for attribute, name in _CONFIG_NAMES.items() if attribute in values
    }
    fields.update({flag: bool(fields[flag]) for flag in ("read_only", "flush") if flag in fields})
    if isinstance(status := fields.get("status"), int):
        fields.update(link_up=bool(status & 1), announce=bool(status & 2))
    features = values.get("DEV_FEATURES")
    return VdpaDeviceConfig(
        name=reply.text("DEV_NAME") or "",
        device_id=device_id,
        features=features if isinstance(features, int) else None,
        negotiated_features=reply.number("DEV_NEGOTIATED_FEATURES"),
        fields=MappingProxyType(fields),
    )


def queue_statistics_from(reply: Reply) -> QueueStatistics:
    """Read a reply to DEV_VSTATS_GET."""
    counters: list[tuple[str, int]] = []
    label = ""
    # Names and values are separate attributes, each value right behind its name.
    for name, value in reply.attributes:
        if name == "DEV_VENDOR_ATTR_NAME":
            label = str(value)
        elif name == "DEV_VENDOR_ATTR_VALUE" and isinstance(value, int):
            counters.append((label, value))
    return QueueStatistics(
        name=reply.text("DEV_NAME") or "",
        device_id=reply.number("DEV_ID") or 0,
        queue_index=reply.number("DEV_QUEUE_INDEX") or 0,
        negotiated_features=reply.number("DEV_NEGOTIATED_FEATURES") or 0,
        max_queue_pairs=reply.number("DEV_NET_CFG_MAX_VQP"),
        counters=tuple(counters),
    )
