"""Every ioctl and IOTLB wrapper of the product against the kernel, and the kernel's own traps."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from vhostbridge.backends.errors import KernelRefused, TargetError
from vhostbridge.backends.fds import OwnedFd, new_eventfd
from vhostbridge.backends.vdpa.chardev import BackendFeature, Chardev

from .blk import OUT, BlockDriver, Request, content
from .devices import block_device, net_device, wait_until
from .memory import PAGE, Memory
from .net import OURS
from .vring import DriverRing, SplitRing

SIMULATOR = 0x17E  # backend features of both
BLK, NET = 0x308007646, 0x308830028
ACCESS_PLATFORM_VERSION_1 = 3 << 32


@contextlib.contextmanager
def opened(node: str, backend: BackendFeature | None = None) -> Iterator[Chardev]:
    device = Chardev(Path(node))
    try:
        device.set_backend_features(device.backend_features() if backend is None else backend)
        yield device
    finally:
        device.close()


@contextlib.contextmanager
def block(backend: BackendFeature | None = None) -> Iterator[Chardev]:
    with block_device() as node, opened(node, backend) as device:
        yield device


@contextlib.contextmanager
def net() -> Iterator[Chardev]:
    with net_device() as node, opened(node) as device:
        yield device


def refused(code: int, function: Callable[..., object], *arguments: object) -> str:
    """The message of a refusal with that errno."""
    try:
        function(*arguments)
    except KernelRefused as error:
        told = error
    else:
        raise AssertionError(f"{function} was not refused")
    assert told.errno == code, f"{told}, wanted {errno.errorcode.get(code, code)}"
    return str(told)


def program(device: Chardev, ring: DriverRing, *, base: int = 0) -> None:
    """Bring a device with one vring to FEATURES_OK, its vring set up and enabled."""
    guest = ring.memory.guest
    device.set_status(3)
    device.set_features(ACCESS_PLATFORM_VERSION_1)
    device.set_status(11)
    device.set_vring_num(0, ring.size)
    device.set_vring_base(0, base)
    device.set_vring_addr(0, guest + ring.descriptors, guest + ring.avail, guest + ring.used)
    kick, call = (device.set_vring_kick, ring.kick_fd), (device.set_vring_call, ring.call_fd)
    for setter, fd in (kick, call):
        with OwnedFd(os.dup(fd)) as owned:
            setter(0, owned)
    device.set_vring_enable(0, True)


def start(device: Chardev, memory: Memory | None = None) -> BlockDriver:
    """A block device that runs, with a driver."""
    driver = BlockDriver(SplitRing(memory or Memory()))
    memory = driver.ring.memory
    device.iotlb_map(memory.guest, memory.size, memory.address)
    program(device, driver.ring)
    device.set_status(15)
    return driver


def check_every_wrapper_is_called_here() -> None:
    source = Path(__file__).read_text()
    names = [name for name in vars(Chardev) if not name.startswith("_")]
    assert [name for name in names if f"device.{name}" not in source] == []


def check_what_a_block_device_is() -> None:
    with block() as device:
        assert device.device_id() == 2
        assert device.features() == BLK
        assert device.backend_features() == SIMULATOR
        assert (device.vring_size_max(), device.vring_count()) == (256, 1)
        assert (device.group_count(), device.address_space_count()) == (1, 1)
        assert device.config_size() == 96
        assert device.iova_range() == (0, 2**64 - 1)
        assert device.status() == 0


def check_what_a_net_device_is() -> None:
    with net() as device:
        assert device.device_id() == 1
        assert device.features() == NET
        assert (device.vring_size_max(), device.vring_count()) == (256, 3)
        assert (device.group_count(), device.address_space_count()) == (2, 2)
        assert device.config_size() == 24


def check_vring_groups_and_address_spaces() -> None:
    """The control vring of the net simulator has a group of its own."""
    with net() as device:
        assert [device.vring_group(index) for index in range(3)] == [0, 0, 1]
        device.set_group_asid(1, 1)
        refused(errno.EINVAL, device.set_group_asid, 1, 2)
        refused(errno.EINVAL, device.set_group_asid, 2, 0)


def check_optional_wrappers_say_what_is_missing() -> None:
    with block() as device:
        assert "GET_VRING_DESC_GROUP of vring 0" in refused(
            errno.EOPNOTSUPP, device.vring_descriptor_group, 0
        )
        refused(errno.EOPNOTSUPP, device.vring_size, 0)


def check_configuration_is_read() -> None:
    with net() as device:
        assert device.config(0, 6) == OURS
        assert device.config(1, 2) == OURS[1:3]
        assert "GET_CONFIG 20+8" in refused(errno.EINVAL, device.config, 20, 8)


def check_configuration_is_written() -> None:
    """The net simulator takes it; the block one says yes and ignores it."""
    with net() as device:
        device.set_config(0, bytes.fromhex("52540000abcd"))
        assert device.config(0, 6).hex() == "52540000abcd"
    with block() as device:
        before = device.config(0, 8)
        device.set_config(0, bytes(8))
        assert device.config(0, 8) == before
        refused(errno.EINVAL, device.set_config, 90, bytes(10))


def check_configuration_interrupt_can_be_set_and_taken_away() -> None:
    with block() as device, new_eventfd() as eventfd:
        device.set_config_call(eventfd)
        device.set_config_call(None)


def check_status_only_grows_until_reset() -> None:
    with block() as device:
        device.set_status(1)
        device.set_status(3)
        assert device.status() == 3
        assert "SET_STATUS 0x1" in refused(errno.EINVAL, device.set_status, 1)
        device.set_status(0)
        assert device.status() == 0


def check_features_without_access_platform_are_refused() -> None:
    with block() as device:
        device.set_status(3)
        refused(errno.EINVAL, device.set_features, 1 << 32)
        device.set_features(ACCESS_PLATFORM_VERSION_1)
        device.set_status(11)
        refused(errno.EBUSY, device.set_features, ACCESS_PLATFORM_VERSION_1)


def check_unknown_backend_features_are_refused() -> None:
    with block() as device:
        refused(errno.EOPNOTSUPP, device.set_backend_features, BackendFeature(1 << 20))


def check_vring_that_is_not_there() -> None:
    with block() as device:
        assert "GET_VRING_BASE of vring 1" in refused(errno.ENOBUFS, device.vring_base, 1)
        refused(errno.ENOBUFS, device.set_vring_num, 7, 8)
        refused(errno.ENOBUFS, device.set_vring_enable, 1, True)


def check_vring_size_must_be_a_power_of_two() -> None:
    with block() as device:
        for size in (0, 3, 100, 65536):
            refused(errno.EINVAL, device.set_vring_num, 0, size)


def check_vring_base_needs_16_bits() -> None:
    with block() as device:
        device.set_status(3)
        device.set_features(ACCESS_PLATFORM_VERSION_1)
        device.set_vring_base(0, 0xFFFF)
        assert device.vring_base(0) == 0xFFFF
        refused(errno.EINVAL, device.set_vring_base, 0, 0x10000)


def check_misaligned_areas_are_refused() -> None:
    with block() as device:
        refused(errno.EINVAL, device.set_vring_addr, 0, 0x1000, 0x2001, 0x3000)
        refused(errno.EINVAL, device.set_vring_addr, 0, 0x1000, 0x2000, 0x3002)


def check_descriptor_that_is_no_eventfd() -> None:
    with block() as device, OwnedFd(os.memfd_create("no eventfd")) as file:
        refused(errno.EINVAL, device.set_vring_kick, 0, file)
        refused(errno.EINVAL, device.set_vring_call, 0, file)
        refused(errno.EINVAL, device.set_vring_err, 0, file)
        device.set_vring_err(0, None)
        device.set_vring_kick(0, None)
        device.set_vring_call(0, None)


def check_vring_is_not_changed_while_it_runs() -> None:
    """It may be while suspended."""
    with block() as device:
        driver = start(device)
        ring, guest = driver.ring, driver.ring.memory.guest
        areas = (guest + ring.descriptors, guest + ring.avail, guest + ring.used)
        refused(errno.EINVAL, device.set_vring_base, 0, 5)
        refused(errno.EINVAL, device.set_vring_addr, 0, *areas)
        device.suspend()
        device.set_vring_addr(0, *areas)
        device.resume()
        driver.write_blocks("still", range(3))


def check_suspend_stops_and_resume_goes_on() -> None:
    with block() as device:
        driver = start(device)
        driver.write_blocks("before", range(10))
        device.suspend()
        device.suspend()
        assert device.vring_base(0) == 10
        assert device.status() == 15
        driver.submit(Request(OUT, 8, content("while", 1)))
        assert device.vring_base(0) == 10
        device.resume()
        device.resume()
        assert [status for _, status, _ in driver.wait()] == [0]
        driver.check_blocks("while", [1])


def check_suspend_before_driver_ok_does_nothing() -> None:
    """It succeeds; a device that is started after it runs."""
    with block() as device:
        driver = BlockDriver(SplitRing(Memory()))
        memory = driver.ring.memory
        device.iotlb_map(memory.guest, memory.size, memory.address)
        program(device, driver.ring)
        device.suspend()
        device.set_status(15)
        driver.write_blocks("runs", range(3))


def check_status_written_while_suspended_wakes_the_simulator() -> None:
    """That is why the product never does."""
    with block() as device:
        driver = start(device)
        device.suspend()
        device.set_status(15)
        driver.write_blocks("awake", range(3))


def check_base_set_while_suspended_moves_one_index_only() -> None:
    """The used index goes on from where it was: old buffers are done again."""
    with block() as device:
        driver = start(device)
        driver.write_blocks("once", range(4))
        device.suspend()
        device.set_vring_base(0, 2)
        device.resume()
        driver.ring.kick()
        wait_until(lambda: driver.ring.used_index == 6)
        device.suspend()
        assert device.vring_base(0) == 4


def check_overlapping_entry_is_refused() -> None:
    with block() as device:
        memory = Memory()
        device.iotlb_map(memory.guest, memory.size, memory.address)
        message = refused(
            errno.EFAULT, device.iotlb_map, memory.guest + PAGE, PAGE, memory.address + PAGE
        )
        assert f"IOTLB UPDATE {memory.guest + PAGE:#x}+0x1000: Bad address (EFAULT)" in message


def check_invalidate_drops_the_whole_entry() -> None:
    with block() as device:
        memory = Memory()
        device.iotlb_map(memory.guest, memory.size, memory.address)
        device.iotlb_unmap(memory.guest + PAGE, PAGE)
        device.iotlb_map(memory.guest, memory.size, memory.address)
        device.iotlb_unmap(0x9999_0000, PAGE)


def check_empty_entries_are_refused() -> None:
    with block() as device:
        memory = Memory()
        refused(errno.EINVAL, device.iotlb_map, memory.guest, 0, memory.address)
        for size in (0, -1):
            with contextlib.suppress(ValueError):
                device.iotlb_unmap(0, size)
                raise AssertionError(f"INVALIDATE of {size} bytes was sent")


def check_entry_at_the_end_of_the_address_space() -> None:
    with block() as device:
        memory = Memory()
        device.iotlb_map(2**64 - PAGE, PAGE, memory.address)
        device.iotlb_map(0, PAGE, memory.address)


def check_batch_maps_all_at_its_end() -> None:
    with block() as device:
        driver = BlockDriver(SplitRing(Memory()))
        memory, half = driver.ring.memory, driver.ring.memory.size // 2
        device.iotlb_batch_begin()
        device.iotlb_map(memory.guest, half, memory.address)
        device.iotlb_map(memory.guest + half, half, memory.address + half)
        device.iotlb_batch_end()
        program(device, driver.ring)
        device.set_status(15)
        driver.write_blocks("batch", range(400))
        driver.check_blocks("batch", range(400))


def check_address_space_that_is_not_there() -> None:
    with net() as device:
        memory = Memory()
        device.iotlb_batch_begin(asid=1)
        device.iotlb_map(memory.guest, memory.size, memory.address, asid=1)
        device.iotlb_batch_end(asid=1)
        device.iotlb_map(memory.guest, memory.size, memory.address, asid=0)
        device.iotlb_unmap(memory.guest, memory.size, asid=1)
        refused(errno.EFAULT, device.iotlb_map, memory.guest, PAGE, memory.address, 2)


def check_mapping_survives_a_reset_with_persist() -> None:
    with block() as device:
        driver = start(device)
        driver.write_blocks("before", range(5))
        device.set_status(0)
        program(device, driver.ring, base=5)
        device.set_status(15)
        driver.check_blocks("before", range(5))


def check_mapping_is_lost_by_a_reset_without_persist() -> None:
    """The kernel's entry is still in the way; taking it out and putting it back repairs it."""
    with block(BackendFeature.IOTLB_MSG_V2) as device:
        driver = start(device)
        driver.write_blocks("before", range(5))
        memory = driver.ring.memory
        device.set_status(0)
        refused(errno.EFAULT, device.iotlb_map, memory.guest, memory.size, memory.address)
        device.iotlb_unmap(memory.guest, memory.size)
        device.iotlb_map(memory.guest, memory.size, memory.address)
        program(device, driver.ring, base=5)
        device.set_status(15)
        driver.check_blocks("before", range(5))


def check_second_opener_is_told_who_has_it() -> None:
    with block_device() as node, opened(node):
        try:
            Chardev(Path(node))
        except TargetError as error:
            text = str(error)
            assert text.startswith(f"{node} is busy: held by ") and str(os.getpid()) in text, text
        else:
            raise AssertionError("opened twice")


def check_closing_resets() -> None:
    with block_device() as node:
        with opened(node) as device:
            start(device).write_blocks("one", range(7))
            assert device.vring_base(0) == 7
        with opened(node) as device:
            assert (device.status(), device.vring_base(0)) == (0, 0)
