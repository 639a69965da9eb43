"""Which states load on which devices, and what is said of those that don't."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.unit.fakes import CAPABILITIES, device_info
from tests.unit.states import PACKED, VERSION_1, vring
from vhostbridge.backends.device import DeviceInfo
from vhostbridge.backends.lifecycle import Ability, Capabilities, How
from vhostbridge.backends.state import DeviceState, InflightVring, compatibility
from vhostbridge.backends.state_compatibility import relied_on
from vhostbridge.backends.virtio import parse_features
from vhostbridge.backends.virtio_config import CONFIG_FIELDS
from vhostbridge.backends.virtio_features import DeviceId

REFUSING = Ability(How.NO, "this back-end can't")
BLOCK_FEATURES = VERSION_1 | parse_features(
    ["SIZE_MAX", "SEG_MAX", "BLK_SIZE", "MQ", "DISCARD", "SECURE_ERASE", "CONFIG_WCE"], 2
)
NET_FEATURES = VERSION_1 | parse_features(["MAC", "MTU", "MQ", "HASH_REPORT", "STATUS"], 1)


def config(device_id: int, **values: int) -> bytes:
    """Configuration space with some fields set, and zeros elsewhere."""
    raw = bytearray(96)
    for field in CONFIG_FIELDS[device_id]:
        if field.name in values:
            size = field.kind.size
            raw[field.offset : field.offset + size] = values[field.name].to_bytes(size, "little")
    return bytes(raw)


BLOCK = {"capacity": 2048, "size_max": 65536, "seg_max": 126, "blk_size": 512, "num_queues": 2}
BLOCK |= {"max_discard_sectors": 64, "secure_erase_sector_alignment": 8, "writeback": 1}
NET = {"mac": 0x0605_0403_0252, "mtu": 1500, "max_virtqueue_pairs": 2, "supported_hash_types": 6}


def state(device_id: int | None = 2, features: int = BLOCK_FEATURES, **more: object) -> DeviceState:
    made = DeviceState("vdpa", device_id, features, 2, config(2, **BLOCK), (vring(0), vring(1)))
    return replace(made, **more)  # type: ignore[arg-type]


def reasons(
    saved: DeviceState,
    info: DeviceInfo | None = None,
    capabilities: Capabilities = CAPABILITIES,
    now: bytes | None = config(2, **BLOCK),
    internal_owner: str | None = None,
) -> list[str]:
    info = info or device_info(features=BLOCK_FEATURES)
    return compatibility(saved, info, capabilities, now, internal_owner)


def test_driver_relies_on_the_limits_that_it_may_have_read() -> None:
    """Not on those of features that it has not, on hints, or on what changes while it runs."""
    features = VERSION_1 | parse_features(["SEG_MAX", "MQ", "TOPOLOGY"], 2)
    space = config(2, **BLOCK, opt_io_size=8)
    parts = relied_on(2, space, features)
    assert parts == {12: (126).to_bytes(4, "little"), 34: (2).to_bytes(2, "little")}
    assert relied_on(2, space[:35], features) == {12: (126).to_bytes(4, "little")}
    assert relied_on(None, space, features) == {}


def test_state_loads_on_a_device_like_its_own() -> None:
    assert reasons(state()) == []


def test_every_reason_is_told_at_once() -> None:
    saved = state(
        features=BLOCK_FEATURES | PACKED | 1 << 9,
        vrings=(vring(0, 2048), vring(7)),
        inflight=(InflightVring(0, (1, 2)),),
        internal_owner="vhost-user",
    )
    incapable = replace(CAPABILITIES, load=REFUSING, inflight=REFUSING)
    now = config(2, **BLOCK | {"capacity": 1024, "blk_size": 4096})
    found = reasons(saved, capabilities=incapable, now=now)
    assert found == [
        "the device can't be loaded: this back-end can't",
        "the state's vrings are packed, and the device has split ones only",
        "the device lacks features that were negotiated: FLUSH",
        "the device has 4 vrings, and the state uses 7 too",
        "the device's vrings have up to 1024 descriptors, and the state's vring 0 has 2048",
        "2 requests are in flight, and the device can't take them up: this back-end can't",
        "blk_size of the device is 4096, the state's is 512: must be the same",
        "capacity of the device is 1024, the state's is 2048: must be at least that",
        "the state has internal state of vhost-user, and the device takes none",
    ]


def test_another_device_type_is_told_by_name_and_its_configuration_not_compared() -> None:
    info = device_info(features=BLOCK_FEATURES, device_id=1)
    assert reasons(state(), info, now=config(1, **NET)) == [
        "the state is of a block device, the device is a net device"
    ]


@pytest.mark.parametrize(("saved", "now"), [(None, 2), (2, None)])
def test_type_that_one_side_does_not_tell_is_the_others(saved: int | None, now: int | None) -> None:
    info = device_info(features=VERSION_1, device_id=now)
    found = reasons(state(saved), info, now=config(2, **BLOCK | {"capacity": 1}))
    assert "SIZE_MAX, SEG_MAX, BLK_SIZE" in found[0]
    assert found[1].startswith("capacity of the device is 1")


def test_configuration_of_an_unknown_type_must_be_the_same() -> None:
    info = device_info(features=BLOCK_FEATURES, device_id=None)
    assert reasons(state(None), info) == []
    (found,) = reasons(state(None), info, now=config(2, **BLOCK | {"capacity": 4096}))
    assert "neither tells what type" in found


@pytest.mark.parametrize("now", [None, b""])
def test_device_that_keeps_its_configuration_to_itself_takes_any(now: bytes | None) -> None:
    assert reasons(state(), now=now) == []


def test_state_without_configuration_loads_on_a_device_with_one() -> None:
    assert reasons(state(config=b"")) == []


def test_bits_that_only_vhost_knows_are_not_features() -> None:
    assert reasons(state(features=BLOCK_FEATURES | 1 << 26 | 1 << 30)) == []


def test_split_state_loads_on_a_device_with_packed_vrings_too() -> None:
    assert reasons(state(), device_info(features=BLOCK_FEATURES | PACKED)) == []


def test_read_only_device_does_not_take_a_writable_ones_state() -> None:
    (found,) = reasons(state(), device_info(features=BLOCK_FEATURES | 1 << 5))
    assert "read-only" in found


@pytest.mark.parametrize(
    ("owner", "now", "told"),
    [
        ("a", "a", []),
        ("a", None, ["the state has internal state of a, and the device takes none"]),
        (None, "a", ["the device needs internal state of a, and the state has none"]),
        ("a", "b", ["the internal state is of a, and the device takes that of b"]),
    ],
)
def test_internal_state_belongs_to_its_owner(
    owner: str | None, now: str | None, told: list[str]
) -> None:
    assert reasons(state(internal_owner=owner), internal_owner=now) == told


@pytest.mark.parametrize(
    ("field", "fits", "fits_not"),
    [
        ("capacity", [2048, 2049], [2047, 0]),
        ("blk_size", [512], [511, 4096]),
        ("size_max", [65536, 1 << 20], [4096]),
        ("seg_max", [126, 254], [125]),
        ("num_queues", [2, 64], [1]),
        ("max_discard_sectors", [64, 65], [63]),
        ("secure_erase_sector_alignment", [8, 1], [16]),
        ("writeback", [0, 1], []),
    ],
)
def test_block_configuration(field: str, fits: list[int], fits_not: list[int]) -> None:
    for value in fits:
        assert reasons(state(), now=config(2, **BLOCK | {field: value})) == []
    for value in fits_not:
        (found,) = reasons(state(), now=config(2, **BLOCK | {field: value}))
        assert found.startswith(f"{field} of the device is {value}, the state's is {BLOCK[field]}")


@pytest.mark.parametrize(
    ("field", "fits", "fits_not"),
    [
        ("mac", [NET["mac"]], [NET["mac"] + 1]),
        ("mtu", [1500, 9000], [1400]),
        ("max_virtqueue_pairs", [2, 3], [1]),
        ("supported_hash_types", [6, 7], [5]),
        ("status", [0, 1], []),
    ],
)
def test_net_configuration(field: str, fits: list[int], fits_not: list[int]) -> None:
    saved = state(1, NET_FEATURES, config=config(1, **NET))
    info = device_info(device_id=1, features=NET_FEATURES)
    for value in fits:
        assert reasons(saved, info, now=config(1, **NET | {field: value})) == []
    for value in fits_not:
        (found,) = reasons(saved, info, now=config(1, **NET | {field: value}))
        assert found.startswith(f"{field} of the device is")


def test_queue_pairs_that_place_the_control_vring_must_be_the_same() -> None:
    features = NET_FEATURES | parse_features(["CTRL_VQ"], 1)
    saved = state(1, features, config=config(1, **NET))
    info = device_info(device_id=1, features=features)
    (found,) = reasons(saved, info, now=config(1, **NET | {"max_virtqueue_pairs": 4}))
    assert found == ("max_virtqueue_pairs of the device is 4, the state's is 2: must be the same")


def test_fields_whose_feature_was_not_negotiated_may_differ() -> None:
    saved = state(features=VERSION_1)
    assert reasons(saved, now=config(2, capacity=2048)) == []


def test_file_system_goes_by_its_tag() -> None:
    saved = state(DeviceId.FS, VERSION_1, config=b"one".ljust(36, b"\0") + b"\2\0\0\0")
    info = device_info(device_id=DeviceId.FS)
    assert reasons(saved, info, now=b"two".ljust(36, b"\0") + b"\1\0\0\0") == [
        "tag of the device is two, the state's is one: must be the same",
        "num_request_queues of the device is 1, the state's is 2: must be at least that",
    ]


def test_field_that_the_device_does_not_have_is_told() -> None:
    assert reasons(state(), now=config(2, **BLOCK)[:12]) == [
        "the device's configuration ends before blk_size, which was 512",
        "the device's configuration ends before seg_max, which was 126",
        "the device's configuration ends before num_queues, which was 2",
        "the device's configuration ends before max_discard_sectors, which was 64",
        "the device's configuration ends before max_discard_seg, which was 0",
        "the device's configuration ends before max_secure_erase_sectors, which was 0",
        "the device's configuration ends before max_secure_erase_seg, which was 0",
        "the device's configuration ends before secure_erase_sector_alignment, which was 8",
    ]


def test_long_lists_are_cut() -> None:
    saved = state(vrings=tuple(vring(i) for i in range(40)))
    assert reasons(saved) == [
        "the device has 4 vrings, and the state uses 4, 5, 6, 7, 8, 9, 10, 29 more too"
    ]


def test_every_rule_is_for_a_field_that_exists() -> None:
    from vhostbridge.backends.state_compatibility import CONFIG_RULES

    for device_id, rules in CONFIG_RULES.items():
        assert set(rules) <= {field.name for field in CONFIG_FIELDS[device_id]}
