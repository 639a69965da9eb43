"""Whether a saved state loads on a device: every reason why it does not, at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from .virtio import VHOST_ONLY_FEATURES, device_name, feature_names
from .virtio_config import CONFIG_FIELDS, ConfigValue, decode_config
from .virtio_features import BlockFeature, DeviceId, NetFeature, TransportFeature

if TYPE_CHECKING:
    from .device import DeviceInfo
    from .lifecycle import Capabilities
    from .state import DeviceState


@dataclass(frozen=True, slots=True)
class _Rule:
    """How a field of the device's configuration must relate to that of the state."""

    holds: Callable[[int, int], bool]  # device's, state's
    wanted: str


# What a driver read once may grow where it says how much a device takes, and must stay where it
# says how the device works. Hints, such as the best I/O size, and what a driver writes may differ.
_SAME = _Rule(lambda device, state: device == state, "the same")
_AT_LEAST = _Rule(lambda device, state: device >= state, "at least that")
_AT_MOST = _Rule(lambda device, state: device <= state, "at most that")
_ALL_BITS = _Rule(lambda device, state: not state & ~device, "all of its bits")


def _rules(
    same: str = "", at_least: str = "", all_bits: str = "", at_most: str = ""
) -> Mapping[str, _Rule]:
    return MappingProxyType(
        {
            **dict.fromkeys(same.split(), _SAME),
            **dict.fromkeys(at_least.split(), _AT_LEAST),
            **dict.fromkeys(all_bits.split(), _ALL_BITS),
            **dict.fromkeys(at_most.split(), _AT_MOST),
        }
    )


CONFIG_RULES: Mapping[int, Mapping[str, _Rule]] = MappingProxyType(
    {
        DeviceId.NET: _rules(
            same="mac",
            at_least="max_virtqueue_pairs mtu rss_max_key_size rss_max_indirection_table_length",
            all_bits="supported_hash_types supported_tunnel_types",
        ),
        DeviceId.BLOCK: _rules(
            same="blk_size zone_sectors write_granularity zoned_model",
            at_least="capacity size_max seg_max num_queues max_discard_sectors max_discard_seg "
            "max_write_zeroes_sectors max_write_zeroes_seg max_secure_erase_sectors "
            "max_secure_erase_seg max_open_zones max_active_zones max_append_sectors",
            at_most="secure_erase_sector_alignment",
        ),
        DeviceId.CONSOLE: _rules(at_least="max_nr_ports"),
        DeviceId.SCSI: _rules(
            same="event_info_size",
            at_least="num_queues seg_max max_sectors cmd_per_lun max_channel max_target max_lun",
        ),
        DeviceId.NINEP: _rules(same="tag"),
        DeviceId.GPU: _rules(at_least="num_scanouts num_capsets"),
        DeviceId.VSOCK: _rules(same="guest_cid"),
        DeviceId.CRYPTO: _rules(
            at_least="max_dataqueues max_cipher_key_len max_auth_key_len max_size",
            all_bits="crypto_services cipher_algo_l cipher_algo_h hash_algo mac_algo_l mac_algo_h "
            "aead_algo akcipher_algo",
        ),
        DeviceId.IOMMU: _rules(
            same="input_range_start input_range_end domain_range_start domain_range_end",
            all_bits="page_size_mask",
        ),
        DeviceId.MEM: _rules(same="block_size node_id addr region_size"),
        DeviceId.SOUND: _rules(same="jacks streams chmaps controls"),
        DeviceId.FS: _rules(same="tag", at_least="num_request_queues", at_most="notify_buf_size"),
        DeviceId.PMEM: _rules(same="start size"),
        DeviceId.GPIO: _rules(same="ngpio"),
    }
)
"""Device id → the fields that matter to a driver which has read them on another device."""


#: These a device may change while a driver uses it, and then tells it so.
_LIVE = frozenset({"capacity"})


def relied_on(device_id: int | None, config: bytes, features: int) -> dict[int, bytes]:
    """The parts of a configuration, by offset, that a driver relies on which has read them.

    A device that takes the place of another one, and is enough of one (``compatibility``), shows
    the driver these instead of its own: what is enough now would be too much to go back.
    """
    rules = CONFIG_RULES.get(device_id, {}) if device_id is not None else {}
    fields = CONFIG_FIELDS.get(device_id, ()) if device_id is not None else ()
    return {
        field.offset: config[field.offset : field.offset + field.kind.size]
        for field in fields
        if field.name in rules
        and field.name not in _LIVE
        and field.valid(features)
        and field.offset + field.kind.size <= len(config)
    }


def compatibility(
    state: DeviceState,
    info: DeviceInfo,
    capabilities: Capabilities,
    config: bytes | None,
    internal_owner: str | None = None,
) -> list[str]:
    """Return every reason why ``state`` does not load on a device; none means that it does.

    ``config`` is the device's configuration space, ``None`` or empty where it has none to read;
    ``internal_owner`` is whose internal state it takes, ``None`` if it takes none.
    """
    return [
        *_identity(state, info, capabilities),
        *_features(state, info),
        *_vrings(state, info, capabilities),
        *_config(state, info, config or b""),
        *_control(state, info),
        *_internal(state, internal_owner),
    ]


def _device_id(state: DeviceState, info: DeviceInfo) -> int | None:
    return info.device_id if state.device_id is None else state.device_id


def _identity(state: DeviceState, info: DeviceInfo, capabilities: Capabilities) -> Iterator[str]:
    if not capabilities.load:
        yield f"the device can't be loaded: {capabilities.load.why}"
    if None not in (state.device_id, info.device_id) and state.device_id != info.device_id:
        yield (
            f"the state is of a {_name(state.device_id)} device, the device is a "
            f"{_name(info.device_id)} device"
        )


def _name(device_id: int | None) -> str:
    return "" if device_id is None else device_name(device_id)


def _features(state: DeviceState, info: DeviceInfo) -> Iterator[str]:
    packed = TransportFeature.RING_PACKED.mask
    lacking = state.features & ~info.features & ~VHOST_ONLY_FEATURES
    if lacking & packed:
        yield "the state's vrings are packed, and the device has split ones only"
    if names := feature_names(lacking & ~packed, _device_id(state, info)):
        yield f"the device lacks features that were negotiated: {', '.join(names)}"
    read_only = BlockFeature.RO.mask
    # Of a device whose driver never came nothing was negotiated.
    is_block = state.features and _device_id(state, info) == DeviceId.BLOCK
    if is_block and info.features & ~state.features & read_only:
        yield "the device is read-only, and the driver takes it for a writable one"


def _vrings(state: DeviceState, info: DeviceInfo, capabilities: Capabilities) -> Iterator[str]:
    beyond = [str(v.index) for v in state.vrings if v.index >= info.vring_limit]
    if beyond:
        yield f"the device has {info.vring_limit} vrings, and the state uses {_listed(beyond)} too"
    large = [f"{v.index} has {v.size}" for v in state.vrings if v.size > info.vring_size_max]
    if large:
        yield (
            f"the device's vrings have up to {info.vring_size_max} descriptors, and the state's "
            f"vring {_listed(large)}"
        )
    waiting = sum(len(vring.heads) for vring in state.inflight)
    if waiting and not capabilities.inflight:
        yield (
            f"{waiting} requests are in flight, and the device can't take them up: "
            f"{capabilities.inflight.why}"
        )


def _listed(words: list[str]) -> str:
    shown = words if len(words) <= 8 else [*words[:7], f"{len(words) - 7} more"]
    return ", ".join(shown)


def _config(state: DeviceState, info: DeviceInfo, config: bytes) -> Iterator[str]:
    device_id = _device_id(state, info)
    # A net device's front-end may keep the configuration to itself: nothing to compare then.
    if (
        not state.config
        or not config
        or (None not in (state.device_id, info.device_id) and state.device_id != info.device_id)
    ):
        return
    if device_id is None:
        if state.config != config:
            yield (
                "the device's configuration differs from the state's, and neither tells what type "
                "of device it is"
            )
        return
    before = decode_config(device_id, state.config, state.features)
    now = decode_config(device_id, config, state.features)
    for name, rule in CONFIG_RULES.get(device_id, {}).items():
        if name in before and not (name == "mac" and _sets_mac(state, info)):
            rule = _placing_control_vring(state, device_id, name) or rule
            yield from _difference(name, before[name], now.get(name), rule)


def _control(state: DeviceState, info: DeviceInfo) -> Iterator[str]:
    if state.control and not info.takes_control:
        yield "the device can't be told what the state's driver said through its control vring"


# It is told: see ``DeviceInfo.takes_control``.
def _sets_mac(state: DeviceState, info: DeviceInfo) -> bool:
    wanted = NetFeature.CTRL_VQ.mask | NetFeature.CTRL_MAC_ADDR.mask
    return info.takes_control and state.features & wanted == wanted


def _placing_control_vring(state: DeviceState, device_id: int, name: str) -> _Rule | None:
    # virtio-net's control vring follows the last pair that there could be.
    pairs = NetFeature.MQ.mask | NetFeature.RSS.mask
    placed = state.features & pairs and state.features & NetFeature.CTRL_VQ.mask
    return _SAME if device_id == DeviceId.NET and name == "max_virtqueue_pairs" and placed else None


def _difference(
    name: str, before: ConfigValue, now: ConfigValue | None, rule: _Rule
) -> Iterator[str]:
    if now is None:
        yield f"the device's configuration ends before {name}, which was {before}"
        return
    fits, wanted = now == before, "the same"
    if isinstance(before, int) and isinstance(now, int):
        fits, wanted = rule.holds(now, before), rule.wanted
    if not fits:
        yield f"{name} of the device is {now}, the state's is {before}: must be {wanted}"


def _internal(state: DeviceState, internal_owner: str | None) -> Iterator[str]:
    if state.internal_owner == internal_owner:
        return
    if internal_owner is None:
        yield (f"the state has internal state of {state.internal_owner}, and the device takes none")
    elif state.internal_owner is None:
        yield f"the device needs internal state of {internal_owner}, and the state has none"
    else:
        yield (
            f"the internal state is of {state.internal_owner}, and the device takes that of "
            f"{internal_owner}"
        )
