"""A block front-end, the bridge and the kernel's vdpa_sim_blk."""

from __future__ import annotations

import contextlib
import random
import struct
from collections.abc import Iterator, Sequence

from .blk import BLOCK, FLUSH, GET_ID, IN, OUT, SECTOR, BlockDriver, Request, content
from .devices import BridgeProcess, block_device, serving
from .frontend import ALL, MEM_SLOTS, REPLY_ACK, STATUS, Frontend
from .memory import Memory
from .raw import RawDevice
from .vring import SplitRing

CAPACITY = 0x40000  # sectors


@contextlib.contextmanager
def bridged() -> Iterator[BridgeProcess]:
    with block_device(), serving(("blk", "vdpa:blk0")) as bridge:
        yield bridge


@contextlib.contextmanager
def running(
    bridge: BridgeProcess, protocol: int = ALL, *, memories: Sequence[Memory] = ()
) -> Iterator[tuple[Frontend, BlockDriver]]:
    """A front-end whose ring runs; the ring is in the first of `memories`."""
    with Frontend(bridge.socket) as frontend:
        table = list(memories) or [Memory()]
        driver = BlockDriver(SplitRing(table[0]))
        frontend.negotiate(protocol=protocol)
        frontend.set_memory(table)
        frontend.start([driver.ring])
        yield frontend, driver


def scattered(seed: int, count: int) -> list[int]:
    """`count` different blocks, the device's first and last among them."""
    last = CAPACITY * SECTOR // BLOCK - 1
    return [0, last, *random.Random(seed).sample(range(1, last), count - 2)]


def check_random_writes_read_back() -> None:
    blocks = scattered(1, 1500)
    with bridged() as bridge, running(bridge) as (_, driver):
        driver.write_blocks("first", blocks)
        driver.write_blocks("second", blocks[::3])
        driver.check_blocks("second", blocks[::3])
        driver.check_blocks("first", blocks[1::3])


def check_data_written_through_the_bridge_is_on_the_device() -> None:
    """Read back over /dev/vhost-vdpa-N itself, with bare ioctls, after the bridge has ended."""
    blocks = scattered(2, 700)
    with block_device() as node:
        with serving(("blk", "vdpa:blk0")) as bridge, running(bridge) as (_, driver):
            driver.write_blocks("bridge", blocks)
        driver = BlockDriver(SplitRing(Memory()))
        with RawDevice(node, driver.ring.memory) as device:
            device.start(driver.ring)
            driver.check_blocks("bridge", blocks)


def check_data_on_the_device_is_read_through_the_bridge() -> None:
    blocks = scattered(3, 300)
    with block_device() as node:
        driver = BlockDriver(SplitRing(Memory()))
        with RawDevice(node, driver.ring.memory) as device:
            device.start(driver.ring)
            driver.write_blocks("direct", blocks)
        with serving(("blk", f"vdpa:{node}")) as bridge, running(bridge) as (_, driver):
            driver.check_blocks("direct", blocks)


def check_large_requests_and_other_kinds() -> None:
    with bridged() as bridge, Frontend(bridge.socket) as frontend:
        memory = Memory(16 << 20)
        driver = BlockDriver(SplitRing(memory), span=1 << 18)
        frontend.negotiate()
        frontend.set_memory([memory])
        frontend.start([driver.ring])
        whole = content("large", 0, 1 << 18)
        driver.run([Request(OUT, 64, whole), Request(FLUSH)])
        ((_, data),) = driver.run([Request(IN, 64, size=1 << 18)])
        assert data == whole
        ((_, name),) = driver.run([Request(GET_ID, size=20)])
        assert name.rstrip(b"\0") == b"vdpa_blk_sim"


def check_unknown_request_is_an_error_of_the_device() -> None:
    with bridged() as bridge, running(bridge) as (_, driver):
        driver.submit(Request(99, size=512))
        assert [status for _, status, _ in driver.wait()] == [1]
        driver.write_blocks("after", [7])
        driver.check_blocks("after", [7])


def check_configuration_space() -> None:
    """Any length the front-end asks for is answered with that length."""
    with bridged() as bridge, Frontend(bridge.socket) as frontend:
        frontend.negotiate()
        for size in (8, 57, 60, 96, 256):
            config = frontend.config(0, size)
            assert struct.unpack_from("<Q", config) == (CAPACITY,)
            assert not any(config[96:])
        assert frontend.config(20, 4) == struct.pack("<I", SECTOR)
        assert frontend.ask_u64("GET_QUEUE_NUM") == 1


def check_without_status_and_acknowledgements() -> None:
    blocks = scattered(4, 100)
    with bridged() as bridge, running(bridge, ALL & ~(STATUS | REPLY_ACK)) as (_, driver):
        driver.write_blocks("plain", blocks)
        driver.check_blocks("plain", blocks)


def check_stop_and_restart_keeps_the_place() -> None:
    """GET_VRING_BASE, status 0, the same ring again: as QEMU's stop and cont."""
    blocks = scattered(5, 40)
    with bridged() as bridge, running(bridge) as (frontend, driver):
        for turn in range(6):
            driver.write_blocks(turn, blocks)
            base = frontend.stop_ring(0)
            assert base == driver.ring.avail_index == driver.ring.used_index
            frontend.set_status(0)
            driver.ring.new_eventfds()
            frontend.start([driver.ring], [base])
            driver.check_blocks(turn, blocks)


def check_requests_in_flight_survive_a_stop() -> None:
    """Every request is answered once, whether before the stop or after the restart."""
    with bridged() as bridge, running(bridge) as (frontend, driver):
        for turn in range(8):
            blocks = range(turn * 64, turn * 64 + 64)
            for block in blocks:
                driver.submit(Request(OUT, block * 8, content(turn, block)), kick=False)
            driver.ring.kick()
            base = frontend.stop_ring(0)
            assert base == driver.ring.used_index
            frontend.set_status(0)
            frontend.start([driver.ring], [base])
            done = driver.take()
            while driver.pending:
                done += driver.wait()
            assert [status for _, status, _ in done] == [0] * 64
            driver.check_blocks(turn, blocks)


def check_requests_offered_while_stopped_are_done_after_restart() -> None:
    with bridged() as bridge, running(bridge) as (frontend, driver):
        driver.write_blocks("before", [1])
        base = frontend.stop_ring(0)
        for block in range(30):
            driver.submit(Request(OUT, block * 8, content("while", block)))
        assert driver.ring.used_index == base
        frontend.set_status(0)
        driver.ring.new_eventfds()  # so that the kicks above are lost
        frontend.start([driver.ring], [base])
        while driver.pending:
            driver.wait()
        driver.check_blocks("while", range(30))


def check_region_added_and_removed_while_running() -> None:
    with bridged() as bridge:
        main = Memory()
        with running(bridge, memories=[main]) as (frontend, driver):
            driver.write_blocks("main", range(50))
            for turn in range(4):
                extra = Memory(guest=0x1_0000_0000, user=0x7D00_0000_0000)
                frontend.add_region(extra)
                added = BlockDriver(driver.ring, extra)
                added.write_blocks(turn, range(50, 90))
                added.check_blocks("main", range(50))
                frontend.remove_region(extra)
                driver.check_blocks(turn, range(50, 90))


def check_requests_run_while_memory_changes() -> None:
    """Adding and removing other regions neither loses nor repeats a request."""
    with bridged() as bridge, running(bridge) as (frontend, driver):
        extra = Memory(guest=0x1_0000_0000, user=0x7D00_0000_0000)
        block = 0
        for turn in range(40):
            for _ in range(min(20, driver.window - driver.pending)):
                driver.submit(Request(OUT, block * 8, content("on", block)))
                block += 1
            (frontend.remove_region if turn % 2 else frontend.add_region)(extra)
            while driver.pending > 20:
                assert not any(status for _, status, _ in driver.wait())
        while driver.pending:
            assert not any(status for _, status, _ in driver.wait())
        driver.check_blocks("on", range(block))
        assert driver.ring.used_index == driver.ring.avail_index


def check_removed_region_is_unmapped_by_the_daemon() -> None:
    with bridged() as bridge, running(bridge) as (frontend, _):
        extra = Memory(guest=0x1_0000_0000, user=0x7D00_0000_0000)

        def mapped() -> int:
            with open(f"/proc/{bridge.pid}/maps") as maps:
                return sum("memfd:guest-memory" in line for line in maps)

        before = mapped()
        frontend.add_region(extra)
        assert mapped() == before + 1
        frontend.remove_region(extra)
        assert mapped() == before


def check_buffer_in_removed_memory_is_not_reached() -> None:
    """The device does not touch memory that was taken away; nothing is written to it."""
    with bridged() as bridge, running(bridge) as (frontend, driver):
        driver.write_blocks("there", [3])
        extra = Memory(guest=0x1_0000_0000, user=0x7D00_0000_0000)
        frontend.add_region(extra)
        added = BlockDriver(driver.ring, extra)
        frontend.remove_region(extra)
        added.submit(Request(IN, 24, size=BLOCK))
        frontend.stop_ring(0)
        assert content("there", 3) not in extra.map[:]


def check_new_table_replaces_the_old() -> None:
    """SET_MEM_TABLE with more, then with less, while the ring runs."""
    with bridged() as bridge:
        main = Memory()
        with running(bridge, ALL & ~MEM_SLOTS, memories=[main]) as (frontend, driver):
            driver.write_blocks("old", range(20))
            extra = Memory(guest=0x1_0000_0000, user=0x7D00_0000_0000)
            frontend.set_memory([main, extra])
            added = BlockDriver(driver.ring, extra)
            added.check_blocks("old", range(20))
            frontend.set_memory([main])
            driver.check_blocks("old", range(20))


def check_eight_regions_of_one_file() -> None:
    """Regions that are parts of one file, at an offset each."""
    with bridged() as bridge, Frontend(bridge.socket) as frontend:
        whole = Memory(8 << 20)
        driver = BlockDriver(SplitRing(whole))
        frontend.negotiate()
        part = 1 << 20
        regions = [
            struct.pack("=QQQQ", whole.guest + at, part, whole.user + at, at)
            for at in range(0, 8 << 20, part)
        ]
        table = struct.pack("=II", 8, 0) + b"".join(regions)
        frontend.tell("SET_MEM_TABLE", table, [whole.fd] * 8)
        frontend.start([driver.ring])
        driver.write_blocks("parts", range(200))
        driver.check_blocks("parts", range(200))


def check_two_devices_in_one_daemon() -> None:
    with (
        block_device("blk1"),
        block_device("blk2"),
        serving(("one", "vdpa:blk1"), ("two", "vdpa:blk2")) as bridge,
        running(bridge) as (_, one),
        running(BridgeProcess(bridge.pid, "/tmp/two.sock", bridge.log)) as (_, two),
    ):
        one.write_blocks("one", range(50))
        two.write_blocks("two", range(50))
        one.check_blocks("one", range(50))
        two.check_blocks("two", range(50))
