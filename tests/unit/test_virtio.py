"""Feature names, config layouts, vring names and ring sizes against hand-made data."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostbridge.backends.virtio import (
    VHOST_ONLY_FEATURES,
    DeviceId,
    RingAreas,
    UnknownFeature,
    describe_vring,
    descriptor_area_size,
    device_area_size,
    device_id_of,
    device_name,
    driver_area_size,
    feature_names,
    parse_features,
    ring_areas,
)
from vhostbridge.backends.virtio_config import CONFIG_FIELDS, decode_config, writable_fields
from vhostbridge.backends.virtio_features import (
    DEVICE_FEATURE_NAMES,
    TRANSPORT_NAMES,
    BalloonFeature,
    BlockFeature,
    FsFeature,
    NetFeature,
    TransportFeature,
)

# What the kernel's simulators offer (Linux 6.12).
SIM_NET = 0x308830028
SIM_BLOCK = 0x308007646


def test_device_names_are_the_usual_short_ones() -> None:
    assert [device_name(i) for i in (1, 2, 8, 9, 19, 26, 34)] == [
        *("net", "block", "scsi", "9p", "vsock", "fs", "i2c")
    ]


def test_an_unknown_device_type_is_named_by_its_number() -> None:
    assert device_name(99) == "type-99"
    assert device_id_of("type-99") == 99


@given(st.sampled_from(list(DeviceId)))
def test_each_device_name_leads_back_to_its_id(device: DeviceId) -> None:
    assert device_id_of(device_name(device)) == device
    assert device_id_of(f"virtio-{device_name(device)}") == device


def test_a_mistyped_device_name_gets_a_suggestion() -> None:
    with pytest.raises(Exception, match=r"did you mean vsock\?"):
        device_id_of("vsok")


def test_the_simulated_net_device_is_named_as_iproute2_names_it() -> None:
    assert feature_names(SIM_NET, DeviceId.NET) == [
        *("MTU", "MAC", "STATUS", "CTRL_VQ", "CTRL_MAC_ADDR"),
        *("ANY_LAYOUT", "VERSION_1", "ACCESS_PLATFORM"),
    ]


def test_the_simulated_block_device_is_named_as_a_disk() -> None:
    assert feature_names(SIM_BLOCK, DeviceId.BLOCK) == [
        *("SIZE_MAX", "SEG_MAX", "BLK_SIZE", "FLUSH", "TOPOLOGY", "MQ", "DISCARD"),
        *("WRITE_ZEROES", "ANY_LAYOUT", "VERSION_1", "ACCESS_PLATFORM"),
    ]


def test_bits_without_a_name_are_numbered() -> None:
    assert feature_names(1 << 3 | 1 << 49, DeviceId.BLOCK) == ["bit_3", "bit_49"]


def test_device_bits_have_no_name_without_a_device_type() -> None:
    assert feature_names(1 << 5 | 1 << 32) == ["bit_5", "VERSION_1"]


def test_what_only_vhost_knows_has_names_too() -> None:
    assert feature_names(VHOST_ONLY_FEATURES) == ["LOG_ALL", "PROTOCOL_FEATURES"]


@given(st.integers(0, 2**128 - 1), st.sampled_from([None, *DeviceId]))
def test_parsing_the_names_of_any_features_gives_them_back(
    features: int, device: DeviceId | None
) -> None:
    assert parse_features(feature_names(features, device), device) == features


@pytest.mark.parametrize(
    "name", ["mq", "MQ", "VIRTIO_NET_F_MQ", "virtio-net-f-mq", "bit_22", "Bit_22"]
)
def test_a_feature_may_be_written_in_the_ways_people_write_it(name: str) -> None:
    assert parse_features([name], DeviceId.NET) == NetFeature.MQ.mask


@pytest.mark.parametrize(
    ("name", "feature"),
    [
        ("VIRTIO_F_IOMMU_PLATFORM", TransportFeature.ACCESS_PLATFORM),
        ("VIRTIO_RING_F_EVENT_IDX", TransportFeature.EVENT_IDX),
        ("RING_INDIRECT_DESC", TransportFeature.INDIRECT_DESC),
        ("VHOST_USER_F_PROTOCOL_FEATURES", TransportFeature.PROTOCOL_FEATURES),
        ("VHOST_F_LOG_ALL", TransportFeature.LOG_ALL),
    ],
)
def test_header_names_of_transport_features_are_known(name: str, feature: TransportFeature) -> None:
    assert parse_features([name], DeviceId.FS) == feature.mask


def test_a_feature_of_another_device_type_is_refused_with_the_closest_name() -> None:
    with pytest.raises(UnknownFeature, match=r"virtio-block has no feature 'CTRL_MAC_ADDRESS'"):
        parse_features(["CTRL_MAC_ADDRESS"], DeviceId.BLOCK)
    with pytest.raises(UnknownFeature, match=r"did you mean CTRL_MAC_ADDR\?"):
        parse_features(["CTRL_MAC_ADDRESS"], DeviceId.NET)


def test_a_feature_of_a_device_of_unknown_type_asks_for_the_type() -> None:
    with pytest.raises(UnknownFeature, match=r"has no feature 'SIZE_MAX' \(with the type"):
        parse_features(["SIZE_MAX"])


def test_a_bit_number_past_the_feature_words_is_refused() -> None:
    with pytest.raises(UnknownFeature):
        parse_features(["bit_128"], DeviceId.NET)


def test_no_device_feature_hides_a_transport_feature() -> None:
    for names in DEVICE_FEATURE_NAMES.values():
        assert not set(names) & set(TRANSPORT_NAMES)
        assert not set(names.values()) & set(TRANSPORT_NAMES.values())


NET_CONFIG = struct.pack(
    "<6sHHHIBBHII",
    *(bytes.fromhex("525400112233"), 3, 4, 1500, 25000, 1, 40, 128, 0x1FF, 7),
)


def test_net_config_is_decoded_field_by_field() -> None:
    every = (1 << 128) - 1
    assert decode_config(DeviceId.NET, NET_CONFIG, every) == {
        "mac": "52:54:00:11:22:33",
        "status": 3,
        "link_up": True,
        "announce": True,
        "max_virtqueue_pairs": 4,
        "mtu": 1500,
        "speed": 25000,
        "duplex": 1,
        "rss_max_key_size": 40,
        "rss_max_indirection_table_length": 128,
        "supported_hash_types": 0x1FF,
        "supported_tunnel_types": 7,
    }


def test_fields_whose_feature_is_not_offered_are_left_out() -> None:
    assert decode_config(DeviceId.NET, NET_CONFIG, SIM_NET) == {
        "mac": "52:54:00:11:22:33",
        "status": 3,
        "link_up": True,
        "announce": True,
        "mtu": 1500,
    }


def test_either_of_two_features_makes_a_field_valid() -> None:
    assert decode_config(DeviceId.NET, NET_CONFIG, NetFeature.RSS.mask)["max_virtqueue_pairs"] == 4
    assert decode_config(DeviceId.NET, NET_CONFIG, NetFeature.MQ.mask)["max_virtqueue_pairs"] == 4


def test_a_field_that_is_cut_off_is_left_out() -> None:
    features = NetFeature.MAC.mask | NetFeature.STATUS.mask | NetFeature.MQ.mask
    assert decode_config(DeviceId.NET, NET_CONFIG[:9], features) == {
        "mac": "52:54:00:11:22:33",
        "status": 3,
        "link_up": True,
        "announce": True,
    }
    assert decode_config(DeviceId.NET, b"", features) == {}


BLOCK_CONFIG = struct.pack(
    "<QIIHBBIBBHIBBHIIIIIB3xIIIIIIIIB3x",
    *(0x40000, 4096, 126, 1024, 16, 63, 512, 3, 1, 8, 16, 1, 0, 4),
    *(2048, 32, 8, 1024, 16, 1, 512, 2, 8, 524288, 14, 15, 16, 4096, 2),
)


def test_block_config_is_96_bytes_and_decoded_field_by_field() -> None:
    assert len(BLOCK_CONFIG) == 96
    assert decode_config(DeviceId.BLOCK, BLOCK_CONFIG, (1 << 64) - 1) == {
        "capacity": 0x40000,
        "size_max": 4096,
        "seg_max": 126,
        "cylinders": 1024,
        "heads": 16,
        "sectors": 63,
        "blk_size": 512,
        "physical_block_exp": 3,
        "alignment_offset": 1,
        "min_io_size": 8,
        "opt_io_size": 16,
        "writeback": True,
        "num_queues": 4,
        "max_discard_sectors": 2048,
        "max_discard_seg": 32,
        "discard_sector_alignment": 8,
        "max_write_zeroes_sectors": 1024,
        "max_write_zeroes_seg": 16,
        "write_zeroes_may_unmap": True,
        "max_secure_erase_sectors": 512,
        "max_secure_erase_seg": 2,
        "secure_erase_sector_alignment": 8,
        "zone_sectors": 524288,
        "max_open_zones": 14,
        "max_active_zones": 15,
        "max_append_sectors": 16,
        "write_granularity": 4096,
        "zoned_model": 2,
    }


def test_the_capacity_of_a_disk_needs_no_feature() -> None:
    assert decode_config(DeviceId.BLOCK, BLOCK_CONFIG, 0) == {"capacity": 0x40000}


def test_a_fs_tag_may_fill_its_field() -> None:
    data = b"t" * 36 + struct.pack("<I", 3)
    assert decode_config(DeviceId.FS, data, 0) == {"tag": "t" * 36, "num_request_queues": 3}


def test_a_fs_tag_ends_at_its_nul() -> None:
    data = struct.pack("<36sII", "größe".encode(), 1, 4096)
    assert decode_config(DeviceId.FS, data, FsFeature.NOTIFICATION.mask) == {
        "tag": "größe",
        "num_request_queues": 1,
        "notify_buf_size": 4096,
    }


def test_scsi_config_is_decoded_field_by_field() -> None:
    data = struct.pack("<7IHHI", 4, 126, 65535, 128, 16, 96, 32, 0, 255, 16383)
    decoded = decode_config(DeviceId.SCSI, data, 0)
    assert list(decoded.values()) == [4, 126, 65535, 128, 16, 96, 32, 0, 255, 16383]


def test_a_vsock_cid_takes_all_64_bits() -> None:
    data = struct.pack("<Q", 2**63 + 3)
    assert decode_config(DeviceId.VSOCK, data, 0) == {"guest_cid": 2**63 + 3}


def test_a_9p_tag_takes_what_follows_its_length() -> None:
    assert decode_config(DeviceId.NINEP, b"\x04\x00home", 1) == {"tag_len": 4, "tag": "home"}


def test_a_device_type_without_a_known_layout_decodes_to_nothing() -> None:
    assert decode_config(DeviceId.WATCHDOG, bytes(64), 0) == {}


@pytest.mark.parametrize("device", list(CONFIG_FIELDS))
def test_config_fields_lie_in_order_at_their_natural_place(device: int) -> None:
    fields = CONFIG_FIELDS[device]
    offsets = [field.offset for field in fields]
    assert offsets == sorted(offsets)
    assert len({field.name for field in fields}) == len(fields)
    for field in fields:
        if field.kind.size in (2, 4, 8):
            assert field.offset % field.kind.size == 0, field.name


def test_the_cache_mode_is_all_that_a_block_driver_writes() -> None:
    offered = BlockFeature.CONFIG_WCE.mask | TransportFeature.VERSION_1.mask
    assert [f.name for f in writable_fields(DeviceId.BLOCK, offered)] == ["writeback"]
    assert writable_fields(DeviceId.BLOCK, TransportFeature.VERSION_1.mask) == ()


def test_only_a_legacy_net_driver_writes_its_mac() -> None:
    legacy = NetFeature.MAC.mask
    assert [f.name for f in writable_fields(DeviceId.NET, legacy)] == ["mac"]
    assert writable_fields(DeviceId.NET, legacy | TransportFeature.VERSION_1.mask) == ()


def test_net_vrings_come_in_pairs_with_the_control_vring_last() -> None:
    features = NetFeature.CTRL_VQ.mask | NetFeature.MQ.mask
    names = [describe_vring(DeviceId.NET, index, features, 2) for index in range(5)]
    assert names == ["rx0", "tx0", "rx1", "tx1", "control"]


def test_the_control_vring_is_the_third_without_multiqueue() -> None:
    features = NetFeature.CTRL_VQ.mask
    assert describe_vring(DeviceId.NET, 2, features, 8) == "control"
    assert describe_vring(DeviceId.NET, 2, 0, 8) == "rx1"


def test_console_ports_skip_the_control_pair() -> None:
    names = [describe_vring(DeviceId.CONSOLE, index) for index in range(6)]
    assert names == ["rx0", "tx0", "rx_control", "tx_control", "rx1", "tx1"]


def test_fs_requests_follow_hiprio_and_notifications() -> None:
    plain = [describe_vring(DeviceId.FS, index) for index in range(3)]
    notified = [describe_vring(DeviceId.FS, i, FsFeature.NOTIFICATION.mask) for i in range(3)]
    assert plain == ["hiprio", "request0", "request1"]
    assert notified == ["hiprio", "notification", "request0"]


def test_scsi_requests_are_numbered_from_zero() -> None:
    names = [describe_vring(DeviceId.SCSI, index) for index in range(4)]
    assert names == ["control", "event", "request0", "request1"]


def test_a_balloon_without_statistics_moves_its_later_vrings_up() -> None:
    features = BalloonFeature.REPORTING.mask
    names = [describe_vring(DeviceId.BALLOON, index, features) for index in range(3)]
    assert names == ["inflate", "deflate", "reporting"]


def test_crypto_control_comes_after_the_data_vrings() -> None:
    names = [describe_vring(DeviceId.CRYPTO, index, 0, 2) for index in range(3)]
    assert names == ["data0", "data1", "control"]


@pytest.mark.parametrize(
    ("device", "index", "name"),
    [
        (DeviceId.BLOCK, 3, "request3"),
        (DeviceId.VSOCK, 2, "event"),
        (DeviceId.VSOCK, 3, "vring3"),
        (DeviceId.GPU, 1, "cursor"),
        (99, 7, "vring7"),
    ],
)
def test_vrings_are_named_by_what_they_carry(device: int, index: int, name: str) -> None:
    assert describe_vring(device, index) == name


def test_a_split_ring_of_256_has_the_sizes_of_the_specification() -> None:
    assert ring_areas(256) == RingAreas(4096, 518, 2054, 16, 2, 4)
    areas = (descriptor_area_size(256), driver_area_size(256), device_area_size(256))
    assert areas == (4096, 518, 2054)


def test_a_packed_ring_has_two_event_structures_beside_its_descriptors() -> None:
    assert ring_areas(100, packed=True) == RingAreas(1600, 4, 4, 16, 4, 4)


@pytest.mark.parametrize("entries", [0, -1, 32769])
def test_a_ring_size_that_virtio_does_not_allow_is_refused(entries: int) -> None:
    with pytest.raises(ValueError, match="1 to 32768"):
        ring_areas(entries)
