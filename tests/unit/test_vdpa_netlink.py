"""The vdpa netlink family, against a kernel that is played by a socket pair."""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.netlink_kernel import (
    MULTI,
    Kernel,
    ack,
    attribute,
    done,
    message,
    text,
    u8,
    u16,
    u32,
    u64,
)
from vhostbridge.backends.errors import ConfigError
from vhostbridge.backends.vdpa.netlink import (
    FamilyMissing,
    MgmtDevice,
    NetlinkRefused,
    VdpaDeviceInfo,
)


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[Kernel]:
    far = Kernel(tmp_path)
    yield far
    far.ours.close()
    far.theirs.close()


def test_management_devices_are_listed_with_what_they_can_make(kernel: Kernel) -> None:
    kernel.answer(
        message(1, text(2, "vdpasim_net"), u64(3, 1 << 1), u32(15, 3), u64(16, 0x308830028))
        + message(1, text(2, "vdpasim_blk"), u64(3, 1 << 2), u32(15, 0), u64(16, 0)),
        message(1, text(1, "pci"), text(2, "0000:03:00.2"), u64(3, 1 << 1 | 1 << 2)),
        done(),
    )
    with kernel.connect() as netlink_:
        found = netlink_.management_devices()
    assert found == [
        MgmtDevice(name="vdpasim_net", bus=None, device_ids=(1,), max_vqs=3, features=0x308830028),
        MgmtDevice(name="vdpasim_blk", bus=None, device_ids=(2,), max_vqs=0, features=0),
        MgmtDevice(name="0000:03:00.2", bus="pci", device_ids=(1, 2), max_vqs=None, features=None),
    ]
    assert [mgmtdev.handle for mgmtdev in found] == [
        *("vdpasim_net", "vdpasim_blk", "pci/0000:03:00.2")
    ]


def test_devices_are_listed_with_their_limits(kernel: Kernel) -> None:
    kernel.answer(
        message(
            *(3, text(2, "vdpasim_blk"), text(4, "blk0"), u32(5, 2), u32(6, 0)),
            *(u32(7, 1), u16(8, 256), u16(9, 16)),
            flags=MULTI,
        ),
        done(),
    )
    with kernel.connect() as netlink_:
        assert netlink_.devices() == [
            VdpaDeviceInfo(
                name="blk0",
                mgmtdev="vdpasim_blk",
                device_id=2,
                vendor_id=0,
                max_vqs=1,
                max_vq_size=256,
                min_vq_size=16,
            )
        ]


def test_one_device_is_asked_for_by_name(kernel: Kernel) -> None:
    kernel.answer(message(3, text(4, "net0"), u32(5, 1)) + ack())
    with kernel.connect() as netlink_:
        assert netlink_.device("net0").device_id == 1
    assert kernel.asked()[1][16:] == struct.pack("=BBH", 5, 1, 0) + text(4, "net0")


def test_net_configuration_has_the_names_of_the_config_space(kernel: Kernel) -> None:
    kernel.answer(
        message(
            *(6, text(4, "net0"), u32(5, 1), u64(14, 0x100000020), u16(11, 1)),
            *(u64(20, 0x308830028), u16(13, 1500), attribute(10, bytes.fromhex("525400112233"))),
        )
        + ack()
    )
    with kernel.connect() as netlink_:
        config = netlink_.device_config("net0")
    assert (config.features, config.negotiated_features) == (0x308830028, 0x100000020)
    assert config.fields == {
        "mac": "52:54:00:11:22:33",
        "status": 1,
        "mtu": 1500,
        "link_up": True,
        "announce": False,
    }


def test_block_configuration_has_the_names_of_the_config_space(kernel: Kernel) -> None:
    kernel.answer(
        message(
            *(6, text(4, "blk0"), u32(5, 2), u64(20, 0x308007646)),
            *(u64(21, 0x40000), u32(22, 4096), u32(23, 512), u32(24, 126), u16(25, 1), u8(26, 0)),
            *(u8(27, 0), u16(28, 1), u32(29, 1), u32(30, 2048), u32(31, 32), u32(32, 8)),
            *(u32(33, 1024), u32(34, 16), u8(35, 1), u8(36, 0)),
        )
        + ack()
    )
    with kernel.connect() as netlink_:
        config = netlink_.device_config("blk0")
    assert config.negotiated_features is None
    assert config.fields == {
        "capacity": 0x40000,
        "size_max": 4096,
        "blk_size": 512,
        "seg_max": 126,
        "num_queues": 1,
        "physical_block_exp": 0,
        "alignment_offset": 0,
        "min_io_size": 1,
        "opt_io_size": 1,
        "max_discard_sectors": 2048,
        "max_discard_seg": 32,
        "discard_sector_alignment": 8,
        "max_write_zeroes_sectors": 1024,
        "max_write_zeroes_seg": 16,
        "read_only": True,
        "flush": False,
    }


def test_linux_6_1_has_device_features_where_later_ones_have_the_capacity(kernel: Kernel) -> None:
    kernel.answer(message(6, text(4, "net0"), u32(5, 1), u64(21, 0x308830028)) + ack())
    with kernel.connect() as netlink_:
        config = netlink_.device_config("net0")
    assert config.features == 0x308830028
    assert config.fields == {}


def test_statistics_keep_their_order_and_repeated_names(kernel: Kernel) -> None:
    kernel.answer(
        message(
            *(7, text(4, "net0"), u32(5, 1), u64(14, 1 << 32), u32(17, 2)),
            *(text(18, "cvq requests"), u64(19, 3), text(18, "cvq errors"), u64(19, 2)),
            *(text(18, "cvq requests"), u64(19, 2**40)),
        )
        + ack()
    )
    with kernel.connect() as netlink_:
        statistics = netlink_.queue_statistics("net0", 2)
    assert statistics.counters == (("cvq requests", 3), ("cvq errors", 2), ("cvq requests", 2**40))
    assert (statistics.queue_index, statistics.negotiated_features) == (2, 1 << 32)
    assert kernel.asked()[1][16:] == struct.pack("=BBH", 7, 1, 0) + text(4, "net0") + u32(17, 2)


def test_create_sends_only_what_was_given(kernel: Kernel) -> None:
    kernel.answer(ack())
    with kernel.connect() as netlink_:
        netlink_.create("blk0", "vdpasim_blk")
    body = struct.pack("=BBH", 3, 1, 0) + text(4, "blk0") + text(2, "vdpasim_blk")
    assert kernel.asked()[1][16:] == body


def test_create_sends_the_bus_and_every_provisioned_value(kernel: Kernel) -> None:
    kernel.answer(ack())
    with kernel.connect() as netlink_:
        netlink_.create(
            *("net0", "pci/0000:03:00.2"),
            mac="52-54-00-AA-BB-CC",
            mtu=9000,
            max_queue_pairs=4,
            features=1 << 63 | 1 << 5,
        )
    assert kernel.asked()[1][16:] == struct.pack("=BBH", 3, 1, 0) + b"".join(
        [
            *(text(4, "net0"), text(1, "pci"), text(2, "0000:03:00.2")),
            *(attribute(10, bytes.fromhex("525400aabbcc")), u16(13, 9000), u16(12, 4)),
            u64(20, 1 << 63 | 1 << 5),
        ]
    )


@pytest.mark.parametrize(
    "options",
    [
        {"mac": "52:54:00:11:22"},
        {"mac": "01:00:5e:00:00:01"},
        {"mtu": 67},
        {"mtu": 65536},
        {"max_queue_pairs": 0},
    ],
)
def test_values_that_cannot_be_right_never_reach_the_kernel(
    kernel: Kernel, options: dict[str, int]
) -> None:
    with kernel.connect() as netlink_, pytest.raises(ConfigError):
        netlink_.create("net0", "vdpasim_net", **options)  # type: ignore[arg-type]
    assert len(kernel.asked()) == 1


def test_delete_names_the_device(kernel: Kernel) -> None:
    kernel.answer(ack())
    with kernel.connect() as netlink_:
        netlink_.delete("blk0")
    assert kernel.asked()[1][16:] == struct.pack("=BBH", 4, 1, 0) + text(4, "blk0")


def test_set_mac_sends_six_bytes(kernel: Kernel) -> None:
    kernel.answer(ack())
    with kernel.connect() as netlink_:
        netlink_.set_mac("net0", "52:54:00:00:00:07")
    body = struct.pack("=BBH", 8, 1, 0) + text(4, "net0")
    assert kernel.asked()[1][16:] == body + attribute(10, bytes.fromhex("525400000007"))


def test_a_refusal_says_what_failed_and_the_kernels_reason(kernel: Kernel) -> None:
    kernel.answer(ack(errno.ENODEV, "Fail to find the specified management device"))
    with kernel.connect() as netlink_, pytest.raises(NetlinkRefused) as caught:
        netlink_.create("blk0", "nosuch")
    assert caught.value.errno == errno.ENODEV
    assert caught.value.extack == "Fail to find the specified management device"
    assert caught.value.message == (
        "create vDPA device blk0 on nosuch: No such device (ENODEV): "
        "Fail to find the specified management device"
    )
    assert "vhost-bridge list" in caught.value.hint


def test_a_refusal_for_lack_of_privilege_names_the_capability(kernel: Kernel) -> None:
    kernel.answer(ack(errno.EPERM))
    with kernel.connect() as netlink_, pytest.raises(NetlinkRefused) as caught:
        netlink_.delete("blk0")
    assert "CAP_NET_ADMIN" in caught.value.hint


def test_an_error_at_the_end_of_a_dump_is_not_swallowed(kernel: Kernel) -> None:
    kernel.answer(message(3, text(4, "blk0"), flags=MULTI), done(errno.EOPNOTSUPP))
    with kernel.connect() as netlink_, pytest.raises(NetlinkRefused) as caught:
        netlink_.devices()
    assert caught.value.errno == errno.EOPNOTSUPP


def test_one_connection_serves_several_requests(kernel: Kernel) -> None:
    kernel.answer(ack(errno.EBUSY), message(3, text(4, "b"), sequence=3) + ack(sequence=3))
    with kernel.connect() as netlink_:
        with pytest.raises(NetlinkRefused):
            netlink_.delete("a")
        assert netlink_.device("b").name == "b"


def test_a_kernel_without_vdpa_gets_the_module_as_hint(kernel: Kernel) -> None:
    kernel.without_family()
    with pytest.raises(FamilyMissing) as caught:
        kernel.connect()
    assert caught.value.hint == "modprobe vdpa"
    assert kernel.ours.fileno() == -1


def test_a_family_that_only_this_namespace_lacks_gets_another_hint(
    kernel: Kernel, tmp_path: Path
) -> None:
    (tmp_path / "bus/vdpa").mkdir(parents=True)
    kernel.without_family()
    with pytest.raises(FamilyMissing, match="network namespace") as caught:
        kernel.connect()
    assert "nsenter" in caught.value.hint


def test_any_other_lookup_failure_keeps_its_errno(kernel: Kernel) -> None:
    kernel.without_family(errno.ENOBUFS)
    with pytest.raises(NetlinkRefused) as caught:
        kernel.connect()
    assert caught.value.errno == errno.ENOBUFS
