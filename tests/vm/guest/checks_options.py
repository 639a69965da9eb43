"""The simulators with other module options: pinned memory, no batches, one store for all."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from .blk import BlockDriver
from .devices import BridgeProcess, block_device, serving, simulator_options, wait_until
from .frontend import Frontend, Refused
from .memory import Memory
from .vring import SplitRing

MIB = 1 << 20
# capabilities(7), of capget and capset.
VERSION_3, SYS_RESOURCE = 0x20080522, 1 << 24
HELD = ctypes.c_uint32 * 6


def limited(kib: int, *, may_raise: bool) -> Callable[[], None]:
    """What makes a process one that may lock `kib` KiB of memory, and perhaps not raise that."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (kib << 10, kib << 10))
        if not may_raise:
            libc, header, held = ctypes.CDLL(None), struct.pack("=Ii", VERSION_3, 0), HELD()
            assert libc.capget(header, held) == 0
            held[0] &= ~SYS_RESOURCE  # effective
            held[1] &= ~SYS_RESOURCE  # permitted
            assert libc.capset(header, held) == 0

    return limit


@contextlib.contextmanager
def pinning(before: Callable[[], None] | None = None) -> Iterator[BridgeProcess]:
    """A bridge to a device that pins memory."""
    with (
        simulator_options("use_va=0"),
        block_device(),
        serving(("pin", "vdpa:blk0"), before=before) as bridge,
    ):
        yield bridge


@contextlib.contextmanager
def running(path: str, memories: Sequence[Memory]) -> Iterator[tuple[Frontend, BlockDriver]]:
    with Frontend(path) as frontend:
        driver = BlockDriver(SplitRing(memories[0]))
        frontend.negotiate()
        frontend.set_memory(memories)
        frontend.start([driver.ring])
        yield frontend, driver


def pinned(bridge: BridgeProcess) -> int:
    """Bytes that are pinned on behalf of the daemon."""
    lines = Path(f"/proc/{bridge.pid}/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("VmPin:")]
    return int(line.split()[1]) * 1024


def check_pinned_memory_is_released() -> None:
    with pinning() as bridge:
        assert pinned(bridge) == 0
        for _ in range(3):
            extra = Memory(2 * MIB, guest=0x1_0000_0000, user=0x7D00_0000_0000)
            with running(bridge.socket, [Memory(4 * MIB)]) as (frontend, driver):
                assert pinned(bridge) == 4 * MIB
                frontend.add_region(extra)
                assert pinned(bridge) == 6 * MIB
                driver.write_blocks("pinned", range(20))
                driver.check_blocks("pinned", range(20))
                frontend.remove_region(extra)
                assert pinned(bridge) == 4 * MIB
            wait_until(lambda: pinned(bridge) == 0)


def check_stop_and_restart_with_pinned_memory() -> None:
    with pinning() as bridge, running(bridge.socket, [Memory()]) as (frontend, driver):
        for turn in range(4):
            driver.write_blocks(turn, range(20))
            base = frontend.stop_ring(0)
            frontend.set_status(0)
            frontend.start([driver.ring], [base])
            driver.check_blocks(turn, range(20))
        frontend.tell("RESET_DEVICE")
        again = BlockDriver(SplitRing(driver.ring.memory))
        frontend.start([again.ring])
        again.check_blocks(3, range(20))


def check_limit_of_locked_memory_says_how_much_is_needed() -> None:
    """Root has that limit too; the daemon raises it where it may, and here it may not."""
    with pinning(limited(1024, may_raise=False)) as bridge:
        with Frontend(bridge.socket) as frontend:
            frontend.negotiate()
            try:
                frontend.set_memory([Memory(4 * MIB)])
            except Refused:
                pass
            else:
                raise AssertionError("4 MiB were pinned with a limit of 1 MiB")
        bridge.wait_for(
            "refused SET_MEM_TABLE: guest memory needs 4096 KiB of locked memory, RLIMIT_MEMLOCK "
            "allows 1024 KiB (set LimitMEMLOCK=infinity in the unit, or ulimit -l unlimited)"
        )
        assert pinned(bridge) == 0


def check_region_over_the_limit_leaves_the_others() -> None:
    with (
        pinning(limited(6 * 1024, may_raise=False)) as bridge,
        running(bridge.socket, [Memory(4 * MIB)]) as (frontend, driver),
    ):
        driver.write_blocks("fits", range(10))
        extra = Memory(4 * MIB, guest=0x1_0000_0000, user=0x7D00_0000_0000)
        with contextlib.suppress(Refused):
            frontend.add_region(extra)
            raise AssertionError("8 MiB were pinned with a limit of 6 MiB")
        bridge.wait_for("refused ADD_MEM_REG: guest memory needs 8192 KiB of locked memory")
        assert pinned(bridge) == 4 * MIB
        driver.check_blocks("fits", range(10))


def check_daemon_raises_the_limit_where_it_may() -> None:
    with (
        pinning(limited(1024, may_raise=True)) as bridge,
        running(bridge.socket, [Memory(4 * MIB)]) as (_, driver),
    ):
        driver.write_blocks("raised", range(10))
        driver.check_blocks("raised", range(10))


def check_device_that_maps_entry_by_entry() -> None:
    """A parent with dma_map instead of set_map."""
    with (
        simulator_options("batch_mapping=0"),
        block_device(),
        serving(("one", "vdpa:blk0")) as bridge,
        running(bridge.socket, [Memory()]) as (frontend, driver),
    ):
        for turn in range(3):
            extra = Memory(guest=0x1_0000_0000, user=0x7D00_0000_0000)
            frontend.add_region(extra)
            added = BlockDriver(driver.ring, extra)
            added.write_blocks(turn, range(30))
            frontend.remove_region(extra)
            driver.check_blocks(turn, range(30))
            base = frontend.stop_ring(0)
            frontend.set_status(0)
            frontend.start([driver.ring], [base])


def check_two_devices_on_one_store() -> None:
    """What one bridge writes the other reads."""
    with (
        simulator_options("", block="shared_backend=1"),
        block_device("blk1"),
        block_device("blk2"),
        serving(("one", "vdpa:blk1"), ("two", "vdpa:blk2")),
        running("/tmp/one.sock", [Memory()]) as (_, one),
        running("/tmp/two.sock", [Memory()]) as (_, two),
    ):
        one.write_blocks("shared", range(60))
        two.check_blocks("shared", range(60))
