"""Device configuration space by field: offsets, when each is valid, who may write it.

Everything is little-endian, as VERSION_1 has it. Layouts are those of virtio 1.4 section 5 and of
``linux/virtio_*.h``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

from .virtio_features import (
    BalloonFeature,
    BlockFeature,
    ConsoleFeature,
    DeviceId,
    FeatureBit,
    FsFeature,
    IommuFeature,
    MemFeature,
    NetFeature,
    SoundFeature,
    TransportFeature,
)

ConfigValue = int | str | bool


class Writable(Enum):
    """Whether a driver may write a field."""

    NO = "no"
    YES = "yes"
    LEGACY = "legacy"  # only without VERSION_1


def _text(data: bytes) -> str:
    # A name that fills its field has no NUL behind it.
    return data.split(b"\0", 1)[0].decode("utf-8", "replace")


def _uint(data: bytes) -> int:
    return int.from_bytes(data, "little")


@dataclass(frozen=True, slots=True)
class Kind:
    """A field's size in bytes (0: all that follows) and how its bytes become a value."""

    size: int
    decode: Callable[[bytes], ConfigValue]


U8 = Kind(1, _uint)
U16 = Kind(2, _uint)
U32 = Kind(4, _uint)
U64 = Kind(8, _uint)
BOOL = Kind(1, lambda data: data[0] != 0)
MAC = Kind(6, lambda data: data.hex(":"))
TAG = Kind(36, _text)
TEXT = Kind(0, _text)
LINK_UP = Kind(2, lambda data: bool(data[0] & 1))
ANNOUNCE = Kind(2, lambda data: bool(data[0] & 2))


@dataclass(frozen=True, slots=True)
class Field:
    """One field: it is valid when any of ``needs`` is offered, or always when that is empty."""

    name: str
    offset: int
    kind: Kind
    needs: tuple[FeatureBit, ...] = ()
    writable: Writable = Writable.NO

    def valid(self, features: int) -> bool:
        """Say whether the field means anything on a device with these features."""
        return not self.needs or any(features & bit.mask for bit in self.needs)


_RSS_KEY = (NetFeature.RSS, NetFeature.HASH_REPORT)
_PAIRS = (NetFeature.MQ, NetFeature.RSS)
_GEOMETRY = (BlockFeature.GEOMETRY,)
_TOPOLOGY = (BlockFeature.TOPOLOGY,)
_DISCARD = (BlockFeature.DISCARD,)
_WRITE_ZEROES = (BlockFeature.WRITE_ZEROES,)
_SECURE_ERASE = (BlockFeature.SECURE_ERASE,)
_ZONED = (BlockFeature.ZONED,)

_NET = (
    Field("mac", 0, MAC, (NetFeature.MAC,), Writable.LEGACY),
    Field("status", 6, U16, (NetFeature.STATUS,)),
    Field("link_up", 6, LINK_UP, (NetFeature.STATUS,)),
    Field("announce", 6, ANNOUNCE, (NetFeature.STATUS,)),
    Field("max_virtqueue_pairs", 8, U16, _PAIRS),
    Field("mtu", 10, U16, (NetFeature.MTU,)),
    Field("speed", 12, U32, (NetFeature.SPEED_DUPLEX,)),
    Field("duplex", 16, U8, (NetFeature.SPEED_DUPLEX,)),
    Field("rss_max_key_size", 17, U8, _RSS_KEY),
    Field("rss_max_indirection_table_length", 18, U16, (NetFeature.RSS,)),
    Field("supported_hash_types", 20, U32, _RSS_KEY),
    Field("supported_tunnel_types", 24, U32, (NetFeature.HASH_TUNNEL,)),
)

_BLOCK = (
    Field("capacity", 0, U64),
    Field("size_max", 8, U32, (BlockFeature.SIZE_MAX,)),
    Field("seg_max", 12, U32, (BlockFeature.SEG_MAX,)),
    Field("cylinders", 16, U16, _GEOMETRY),
    Field("heads", 18, U8, _GEOMETRY),
    Field("sectors", 19, U8, _GEOMETRY),
    Field("blk_size", 20, U32, (BlockFeature.BLK_SIZE,)),
    Field("physical_block_exp", 24, U8, _TOPOLOGY),
    Field("alignment_offset", 25, U8, _TOPOLOGY),
    Field("min_io_size", 26, U16, _TOPOLOGY),
    Field("opt_io_size", 28, U32, _TOPOLOGY),
    Field("writeback", 32, BOOL, (BlockFeature.CONFIG_WCE,), Writable.YES),
    Field("num_queues", 34, U16, (BlockFeature.MQ,)),
    Field("max_discard_sectors", 36, U32, _DISCARD),
    Field("max_discard_seg", 40, U32, _DISCARD),
    Field("discard_sector_alignment", 44, U32, _DISCARD),
    Field("max_write_zeroes_sectors", 48, U32, _WRITE_ZEROES),
    Field("max_write_zeroes_seg", 52, U32, _WRITE_ZEROES),
    Field("write_zeroes_may_unmap", 56, BOOL, _WRITE_ZEROES),
    Field("max_secure_erase_sectors", 60, U32, _SECURE_ERASE),
    Field("max_secure_erase_seg", 64, U32, _SECURE_ERASE),
    Field("secure_erase_sector_alignment", 68, U32, _SECURE_ERASE),
    Field("zone_sectors", 72, U32, _ZONED),
    Field("max_open_zones", 76, U32, _ZONED),
    Field("max_active_zones", 80, U32, _ZONED),
    Field("max_append_sectors", 84, U32, _ZONED),
    Field("write_granularity", 88, U32, _ZONED),
    Field("zoned_model", 92, U8, _ZONED),
)

_CONSOLE = (
    Field("cols", 0, U16, (ConsoleFeature.SIZE,)),
    Field("rows", 2, U16, (ConsoleFeature.SIZE,)),
    Field("max_nr_ports", 4, U32, (ConsoleFeature.MULTIPORT,)),
    Field("emerg_wr", 8, U32, (ConsoleFeature.EMERG_WRITE,), Writable.YES),
)

_SCSI = (
    Field("num_queues", 0, U32),
    Field("seg_max", 4, U32),
    Field("max_sectors", 8, U32),
    Field("cmd_per_lun", 12, U32),
    Field("event_info_size", 16, U32),
    Field("sense_size", 20, U32, (), Writable.YES),
    Field("cdb_size", 24, U32, (), Writable.YES),
    Field("max_channel", 28, U16),
    Field("max_target", 30, U16),
    Field("max_lun", 32, U32),
)

_FS = (
    Field("tag", 0, TAG),
    Field("num_request_queues", 36, U32),
    Field("notify_buf_size", 40, U32, (FsFeature.NOTIFICATION,)),
)

_BALLOON = (
    Field("num_pages", 0, U32),
    Field("actual", 4, U32, (), Writable.YES),
    Field("free_page_hint_cmd_id", 8, U32, (BalloonFeature.FREE_PAGE_HINT,)),
    Field("poison_val", 12, U32, (BalloonFeature.PAGE_POISON,), Writable.YES),
)

_GPU = (
    Field("events_read", 0, U32),
    Field("events_clear", 4, U32, (), Writable.YES),
    Field("num_scanouts", 8, U32),
    Field("num_capsets", 12, U32),
)

_INPUT = (
    Field("select", 0, U8, (), Writable.YES),
    Field("subsel", 1, U8, (), Writable.YES),
    Field("size", 2, U8),
)

_CRYPTO_WORDS = (
    *("status", "max_dataqueues", "crypto_services", "cipher_algo_l", "cipher_algo_h"),
    *("hash_algo", "mac_algo_l", "mac_algo_h", "aead_algo"),
    *("max_cipher_key_len", "max_auth_key_len", "akcipher_algo"),
)
_CRYPTO = (
    *(Field(name, 4 * at, U32) for at, name in enumerate(_CRYPTO_WORDS)),
    Field("max_size", 48, U64),
)

_IOMMU = (
    Field("page_size_mask", 0, U64),
    Field("input_range_start", 8, U64, (IommuFeature.INPUT_RANGE,)),
    Field("input_range_end", 16, U64, (IommuFeature.INPUT_RANGE,)),
    Field("domain_range_start", 24, U32, (IommuFeature.DOMAIN_RANGE,)),
    Field("domain_range_end", 28, U32, (IommuFeature.DOMAIN_RANGE,)),
    Field("probe_size", 32, U32, (IommuFeature.PROBE,)),
    Field("bypass", 36, BOOL, (IommuFeature.BYPASS_CONFIG,), Writable.YES),
)

_MEM = (
    Field("block_size", 0, U64),
    Field("node_id", 8, U16, (MemFeature.ACPI_PXM,)),
    Field("addr", 16, U64),
    Field("region_size", 24, U64),
    Field("usable_region_size", 32, U64),
    Field("plugged_size", 40, U64),
    Field("requested_size", 48, U64),
)

_SOUND = (
    Field("jacks", 0, U32),
    Field("streams", 4, U32),
    Field("chmaps", 8, U32),
    Field("controls", 12, U32, (SoundFeature.CTLS,)),
)

CONFIG_FIELDS: Mapping[int, tuple[Field, ...]] = MappingProxyType(
    {
        DeviceId.NET: _NET,
        DeviceId.BLOCK: _BLOCK,
        DeviceId.CONSOLE: _CONSOLE,
        DeviceId.BALLOON: _BALLOON,
        DeviceId.SCSI: _SCSI,
        DeviceId.NINEP: (Field("tag_len", 0, U16), Field("tag", 2, TEXT)),
        DeviceId.GPU: _GPU,
        DeviceId.INPUT: _INPUT,
        DeviceId.VSOCK: (Field("guest_cid", 0, U64),),
        DeviceId.CRYPTO: _CRYPTO,
        DeviceId.IOMMU: _IOMMU,
        DeviceId.MEM: _MEM,
        DeviceId.SOUND: _SOUND,
        DeviceId.FS: _FS,
        DeviceId.PMEM: (Field("start", 0, U64), Field("size", 8, U64)),
        DeviceId.GPIO: (Field("ngpio", 0, U16), Field("gpio_names_size", 4, U32)),
    }
)
"""Device id → its fields by offset. A type that is missing has no config space that we know."""


def decode_config(device_id: int, data: bytes, features: int) -> dict[str, ConfigValue]:
    """Return the config space by field name.

    Left out: fields that lie wholly or partly past the end of ``data``, and fields that need a
    feature outside ``features``. Units are the specification's (``capacity`` and every
    ``*_sectors``: 512 bytes). A device type that we don't know gives nothing.
    """
    values: dict[str, ConfigValue] = {}
    for field in CONFIG_FIELDS.get(device_id, ()):
        end = field.offset + field.kind.size if field.kind.size else len(data)
        if field.offset < end <= len(data) and field.valid(features):
            values[field.name] = field.kind.decode(data[field.offset : end])
    return values


def writable_fields(device_id: int, features: int) -> tuple[Field, ...]:
    """Return the fields that a driver which negotiated ``features`` may write.

    virtio-net's MAC is one only for a legacy driver (no VERSION_1); others set it through the
    control vring.
    """
    legacy = not features & TransportFeature.VERSION_1.mask
    return tuple(
        field
        for field in CONFIG_FIELDS.get(device_id, ())
        if field.valid(features)
        and (field.writable is Writable.YES or (legacy and field.writable is Writable.LEGACY))
    )


def config_sizes(device_id: int, features: int) -> list[int]:
    """How many configuration bytes to ask a back-end for, the most useful number first.

    Back-ends refuse to read past the end of what they have, and don't say where that is.
    """
    valid = [field for field in CONFIG_FIELDS.get(device_id, ()) if field.valid(features)]
    ends = {field.offset + field.kind.size for field in valid if field.kind.size}
    return sorted(ends, reverse=True)
