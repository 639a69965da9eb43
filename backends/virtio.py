"""What the virtio specification says of every device: types, features, vrings, ring sizes.

Feature words are plain ints (bit N is ``1 << N``), because that is what every transport carries.
The bits themselves are in ``virtio_features``, the config space layouts in ``virtio_config``.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from vhostbridge.backends.errors import ConfigError

from .virtio_features import (
    DEVICE_FEATURE_NAMES,
    TRANSPORT_NAMES,
    VHOST_ONLY_FEATURES,
    BalloonFeature,
    BlockFeature,
    DeviceId,
    FeatureBit,
    FsFeature,
    NetFeature,
    TransportFeature,
)

__all__ = [
    "VHOST_ONLY_FEATURES",
    "BlockFeature",
    "DeviceId",
    "FsFeature",
    "NetFeature",
    "RingAreas",
    "TransportFeature",
    "UnknownFeature",
    "describe_vring",
    "descriptor_area_size",
    "device_area_size",
    "device_id_of",
    "device_name",
    "driver_area_size",
    "feature_names",
    "parse_features",
    "ring_areas",
]

_DEVICE_NAMES: dict[int, str] = {
    **{device.value: device.name.lower().replace("_", "-") for device in DeviceId},
    DeviceId.NINEP: "9p",
}
# What other tools and people call them.
_DEVICE_ALIASES = {"network": "net", "blk": "block", "entropy": "rng", "snd": "sound"}

_FEATURE_ALIASES = {
    "IOMMU_PLATFORM": "ACCESS_PLATFORM",
    "RING_INDIRECT_DESC": "INDIRECT_DESC",
    "RING_EVENT_IDX": "EVENT_IDX",
}
_PREFIX = re.compile(r"^(?:VIRTIO|VHOST)(?:_[A-Z0-9]+)?_F_")
_BIT = re.compile(r"^BIT_(\d{1,3})$")
_FEATURE_BITS = 128  # virtio 1.4; messages, ioctls and netlink carry the first 64


class UnknownFeature(ConfigError):
    """No feature of this device type has that name."""


def device_name(device_id: int) -> str:
    """Return the short name of a virtio device type: ``net``, ``block``, ``fs``, ``type-99``."""
    return _DEVICE_NAMES.get(device_id, f"type-{device_id}")


def device_id_of(name: str) -> int:
    """Return the device id that ``device_name`` calls ``name``.

    Raises ConfigError for a name that no device type has.
    """
    wanted = name.lower().removeprefix("virtio-")
    wanted = _DEVICE_ALIASES.get(wanted, wanted)
    for device_id, known in _DEVICE_NAMES.items():
        if known == wanted:
            return device_id
    if wanted.startswith("type-") and wanted[5:].isdecimal():
        return int(wanted[5:])
    close = difflib.get_close_matches(wanted, _DEVICE_NAMES.values(), 1)
    raise ConfigError(
        f"no virtio device type is called {name!r}", f"did you mean {close[0]}?" if close else ""
    )


def _names_of(device_id: int | None) -> dict[int, str]:
    own = DEVICE_FEATURE_NAMES.get(device_id, {}) if device_id is not None else {}
    return {**own, **TRANSPORT_NAMES}


def feature_names(features: int, device_id: int | None = None) -> list[str]:
    """Name each bit that is set, lowest first; a bit without a name is ``bit_N``.

    Without a device id only the transport's bits have names.
    """
    names = _names_of(device_id)
    return [
        names.get(bit, f"bit_{bit}") for bit in range(features.bit_length()) if features >> bit & 1
    ]


def parse_features(names: Iterable[str], device_id: int | None = None) -> int:
    """Return the feature word with the named bits set: the inverse of ``feature_names``.

    Accepts any case, ``bit_N``, and the header's full names (``VIRTIO_NET_F_MAC``).
    Raises UnknownFeature for the first name that the device type doesn't have.
    """
    bits = {name: bit for bit, name in _names_of(device_id).items()}
    features = 0
    for given in names:
        name = _PREFIX.sub("", given.strip().upper().replace("-", "_"))
        name = _FEATURE_ALIASES.get(name, name)
        if (by_number := _BIT.match(name)) and int(by_number[1]) < _FEATURE_BITS:
            features |= 1 << int(by_number[1])
        elif name in bits:
            features |= 1 << bits[name]
        else:
            raise _unknown_feature(given, name, bits, device_id)
    return features


def _unknown_feature(
    given: str, name: str, bits: dict[str, int], device_id: int | None
) -> UnknownFeature:
    of = f"virtio-{device_name(device_id)}" if device_id is not None else "the virtio transport"
    close = difflib.get_close_matches(name, bits, 1)
    hint = f"did you mean {close[0]}?" if close else "bit_N names a feature by its number"
    if device_id is None:
        hint = "with the type of the device (--type), its own features have names too"
    return UnknownFeature(f"{of} has no feature {given!r}", hint)


@dataclass(frozen=True, slots=True)
class _VringNames:
    # Names in index order; one that needs a feature is absent, and the rest move up, without it.
    fixed: tuple[tuple[str, FeatureBit | None], ...] = ()
    # What every later vring is called, numbered from 0.
    numbered: str = "vring"


def _vrings(*fixed: str, numbered: str = "vring") -> _VringNames:
    return _VringNames(tuple((name, None) for name in fixed), numbered)


_VRING_NAMES: dict[int, _VringNames] = {
    DeviceId.BLOCK: _vrings(numbered="request"),
    DeviceId.RNG: _vrings(numbered="request"),
    DeviceId.BALLOON: _VringNames(
        (
            ("inflate", None),
            ("deflate", None),
            ("stats", BalloonFeature.STATS_VQ),
            ("free_page", BalloonFeature.FREE_PAGE_HINT),
            ("reporting", BalloonFeature.REPORTING),
        )
    ),
    DeviceId.SCSI: _vrings("control", "event", numbered="request"),
    DeviceId.NINEP: _vrings(numbered="request"),
    DeviceId.GPU: _vrings("control", "cursor"),
    DeviceId.INPUT: _vrings("event", "status"),
    DeviceId.VSOCK: _vrings("rx", "tx", "event"),
    DeviceId.IOMMU: _vrings("request", "event"),
    DeviceId.MEM: _vrings("request"),
    DeviceId.SOUND: _vrings("control", "event", "tx", "rx"),
    DeviceId.FS: _VringNames(
        (("hiprio", None), ("notification", FsFeature.NOTIFICATION)), numbered="request"
    ),
    DeviceId.PMEM: _vrings(numbered="request"),
    DeviceId.RPMB: _vrings("request"),
    DeviceId.SCMI: _vrings("command", "event"),
    DeviceId.I2C: _vrings("request"),
    DeviceId.CAN: _vrings("tx", "rx", "control"),
    DeviceId.BLUETOOTH: _vrings("tx", "rx"),
    DeviceId.GPIO: _vrings("request", "event"),
}


def net_control_vring(features: int, max_pairs: int | None) -> int | None:
    """Return the index of virtio-net's control vring, or None when it has none.

    ``features`` are the negotiated ones: without MQ or RSS the driver finds it at 2, whatever
    the device's ``max_virtqueue_pairs`` says.
    """
    if not features & NetFeature.CTRL_VQ.mask:
        return None
    if features & (NetFeature.MQ.mask | NetFeature.RSS.mask) and max_pairs:
        return 2 * max_pairs
    return 2


def describe_vring(
    device_id: int, index: int, features: int = 0, max_pairs: int | None = None
) -> str:
    """Name a vring by what it carries: ``rx0``, ``tx0``, ``control``, ``request0``, ``hiprio``.

    ``max_pairs`` is the config field that places the control vring: ``max_virtqueue_pairs`` of
    virtio-net, ``max_dataqueues`` of virtio-crypto. A vring that the type doesn't define is
    ``vringN``.
    """
    if device_id == DeviceId.NET:
        if index == net_control_vring(features, max_pairs):
            return "control"
        return f"{'tx' if index % 2 else 'rx'}{index // 2}"
    if device_id == DeviceId.CONSOLE:
        # Port 0 has vrings 0 and 1, the control pair 2 and 3, port 1 starts at 4.
        port = "control" if index in (2, 3) else str(index // 2 - (index > 3))
        return f"{'tx' if index % 2 else 'rx'}{'_' if port == 'control' else ''}{port}"
    if device_id == DeviceId.CRYPTO:
        return "control" if max_pairs and index == max_pairs else f"data{index}"
    names = _VRING_NAMES.get(device_id, _vrings())
    fixed = [name for name, needs in names.fixed if needs is None or features & needs.mask]
    if index < len(fixed):
        return fixed[index]
    first = 0 if names.numbered == "vring" else len(fixed)
    return f"{names.numbered}{index - first}"


@dataclass(frozen=True, slots=True)
class RingAreas:
    """Sizes in bytes of a vring's three areas, and the alignment that each address needs."""

    descriptor: int
    driver: int
    device: int
    descriptor_align: int
    driver_align: int
    device_align: int


def ring_areas(entries: int, packed: bool = False) -> RingAreas:
    """Return the areas of a vring of ``entries`` (virtio 1.4 sections 2.7 and 2.8).

    The two index fields behind EVENT_IDX are always counted: drivers allocate them always.
    """
    if not 1 <= entries <= 32768:
        raise ValueError(f"a vring has 1 to 32768 entries, not {entries}")
    if packed:
        return RingAreas(16 * entries, 4, 4, 16, 4, 4)
    return RingAreas(16 * entries, 6 + 2 * entries, 6 + 8 * entries, 16, 2, 4)


def descriptor_area_size(entries: int, packed: bool = False) -> int:
    """Return the bytes of the descriptor table (split) or ring (packed)."""
    return ring_areas(entries, packed).descriptor


def driver_area_size(entries: int, packed: bool = False) -> int:
    """Return the bytes of the available ring (split) or the driver event structure (packed)."""
    return ring_areas(entries, packed).driver


def device_area_size(entries: int, packed: bool = False) -> int:
    """Return the bytes of the used ring (split) or the device event structure (packed)."""
    return ring_areas(entries, packed).device
