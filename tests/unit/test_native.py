"""The C extension: cffi checks structs and constants only when they are touched, so touch all."""

from __future__ import annotations

import errno
import os

import pytest

from vhostbridge.native import ffi, lib

# linux/vhost.h on x86-64, as the kernel's documentation and headers have them.
IOCTLS = {
    "VHOST_GET_FEATURES": 0x8008AF00,
    "VHOST_SET_FEATURES": 0x4008AF00,
    "VHOST_SET_OWNER": 0x0000AF01,
    "VHOST_SET_MEM_TABLE": 0x4008AF03,
    "VHOST_SET_LOG_BASE": 0x4008AF04,
    "VHOST_SET_LOG_FD": 0x4004AF07,
    "VHOST_SET_VRING_NUM": 0x4008AF10,
    "VHOST_SET_VRING_ADDR": 0x4028AF11,
    "VHOST_SET_VRING_BASE": 0x4008AF12,
    "VHOST_GET_VRING_BASE": 0xC008AF12,
    "VHOST_SET_VRING_ENDIAN": 0x4008AF13,
    "VHOST_GET_VRING_ENDIAN": 0x4008AF14,
    "VHOST_SET_VRING_KICK": 0x4008AF20,
    "VHOST_SET_VRING_CALL": 0x4008AF21,
    "VHOST_SET_VRING_ERR": 0x4008AF22,
    "VHOST_SET_VRING_BUSYLOOP_TIMEOUT": 0x4008AF23,
    "VHOST_GET_VRING_BUSYLOOP_TIMEOUT": 0x4008AF24,
    "VHOST_SET_BACKEND_FEATURES": 0x4008AF25,
    "VHOST_GET_BACKEND_FEATURES": 0x8008AF26,
    "VHOST_VDPA_GET_DEVICE_ID": 0x8004AF70,
    "VHOST_VDPA_GET_STATUS": 0x8001AF71,
    "VHOST_VDPA_SET_STATUS": 0x4001AF72,
    "VHOST_VDPA_GET_CONFIG": 0x8008AF73,
    "VHOST_VDPA_SET_CONFIG": 0x4008AF74,
    "VHOST_VDPA_SET_VRING_ENABLE": 0x4008AF75,
    "VHOST_VDPA_GET_VRING_NUM": 0x8002AF76,
    "VHOST_VDPA_SET_CONFIG_CALL": 0x4004AF77,
    "VHOST_VDPA_GET_IOVA_RANGE": 0x8010AF78,
    "VHOST_VDPA_GET_CONFIG_SIZE": 0x8004AF79,
    "VHOST_VDPA_GET_AS_NUM": 0x8004AF7A,
    "VHOST_VDPA_GET_VRING_GROUP": 0xC008AF7B,
    "VHOST_VDPA_SET_GROUP_ASID": 0x4008AF7C,
    "VHOST_VDPA_SUSPEND": 0x0000AF7D,
    "VHOST_VDPA_RESUME": 0x0000AF7E,
    "VHOST_VDPA_GET_VRING_DESC_GROUP": 0xC008AF7F,
    "VHOST_VDPA_GET_VQS_COUNT": 0x8004AF80,
    "VHOST_VDPA_GET_GROUP_NUM": 0x8004AF81,
    "VHOST_VDPA_GET_VRING_SIZE": 0xC008AF82,
    "VHOST_GET_FEATURES_ARRAY": 0x8008AF83,
    "VHOST_SET_FEATURES_ARRAY": 0x4008AF83,
    "VHOST_SET_FORK_FROM_OWNER": 0x4001AF84,
    "VHOST_GET_FORK_FROM_OWNER": 0x8001AF85,
}
FEATURE_BITS = {
    "IOTLB_MSG_V2": 1,
    "IOTLB_BATCH": 2,
    "IOTLB_ASID": 3,
    "SUSPEND": 4,
    "RESUME": 5,
    "ENABLE_AFTER_DRIVER_OK": 6,
    "DESC_ASID": 7,
    "IOTLB_PERSIST": 8,
}


def test_every_constant_and_struct_can_be_touched() -> None:
    names = [name for name in dir(lib) if not callable(getattr(lib, name))]
    assert set(IOCTLS) <= set(names)
    opaque = {"vb_shadow", "vb_commands", "vb_requests"}
    assert all(ffi.sizeof(f"struct {name}") > 0 for name in {*ffi.list_types()[1]} - opaque)


@pytest.mark.parametrize(("name", "number"), IOCTLS.items())
def test_ioctl_number_is_the_kernels(name: str, number: int) -> None:
    assert getattr(lib, name) == number


@pytest.mark.parametrize(("name", "bit"), FEATURE_BITS.items())
def test_backend_feature_is_the_kernels_bit(name: str, bit: int) -> None:
    assert getattr(lib, f"VHOST_BACKEND_F_{name}") == bit


def test_refused_ioctl_returns_its_errno() -> None:
    word = ffi.new("uint64_t *")
    assert lib.vb_ioctl(-1, lib.VHOST_GET_FEATURES, word) == -errno.EBADF
    with open("/dev/null", "rb") as null:
        assert lib.vb_ioctl(null.fileno(), lib.VHOST_GET_FEATURES, word) == -errno.ENOTTY


def test_iotlb_message_is_72_bytes_in_the_kernels_layout() -> None:
    reader, writer = os.pipe()
    try:
        update = lib.VHOST_IOTLB_UPDATE
        assert lib.vb_iotlb(writer, 7, update, 3, 0x1000, 0x2000, 0x7F0000000000) == 0
        message = os.read(reader, 100)
    finally:
        os.close(reader)
        os.close(writer)
    assert len(message) == 72
    words = [int.from_bytes(message[at : at + 8], "little") for at in (8, 16, 24)]
    assert words == [0x1000, 0x2000, 0x7F0000000000]
    assert message[:8] == b"\x02\0\0\0\x07\0\0\0" and message[32:34] == b"\x03\x02"
    assert not any(message[34:])


def test_refused_iotlb_message_returns_its_errno() -> None:
    assert lib.vb_iotlb(-1, 0, lib.VHOST_IOTLB_UPDATE, 3, 0, 4096, 4096) == -errno.EBADF


def test_mapping_shares_the_file() -> None:
    fd = os.memfd_create("test", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, 8192)
        os.pwrite(fd, b"before", 4096)
        address = lib.vb_map_shared(4096, fd, 4096)
        assert address > 0
        view = ffi.buffer(ffi.cast("char *", address), 4096)
        assert view[0:6] == b"before"
        view[0:5] = b"after"
        assert os.pread(fd, 5, 4096) == b"after"
        assert lib.vb_unmap(address, 4096) == 0
    finally:
        os.close(fd)


def test_refused_mapping_returns_its_errno() -> None:
    fd = os.memfd_create("test", os.MFD_CLOEXEC)
    try:
        assert lib.vb_map_shared(4096, -1, 0) == -errno.EBADF
        assert lib.vb_map_shared(4096, fd, 123) == -errno.EINVAL
        assert lib.vb_unmap(1, 4096) == -errno.EINVAL
    finally:
        os.close(fd)
