"""A device without SUSPEND that a process serves: qemu-storage-daemon by way of VDUSE."""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import time
from collections.abc import Iterator

from .blk import BLOCK, FLUSH, OUT, SECTOR, BlockDriver, Request, content
from .devices import BridgeProcess, block_device, serving, wait_until
from .frontend import Frontend, HungUp
from .memory import Memory
from .vduse import SIZE, VduseDevice, vduse_block
from .vring import SplitRing


@contextlib.contextmanager
def running(path: str) -> Iterator[tuple[Frontend, BlockDriver]]:
    with Frontend(path) as frontend:
        driver = BlockDriver(SplitRing(Memory()))
        frontend.negotiate()
        frontend.set_memory([driver.ring.memory])
        frontend.start([driver.ring])
        yield frontend, driver


@contextlib.contextmanager
def bridged() -> Iterator[tuple[VduseDevice, BridgeProcess]]:
    with vduse_block() as device, serving(("vd", "vdpa:vd0")) as bridge:
        yield device, bridge


def block_of(device: VduseDevice, block: int) -> bytes:
    with device.file.open("rb") as image:
        return os.pread(image.fileno(), BLOCK, block * BLOCK)


def check_writes_are_in_the_file() -> None:
    blocks = range(0, SIZE // BLOCK, 11)
    with bridged() as (device, bridge), running(bridge.socket) as (_, driver):
        driver.write_blocks("bridge", blocks)
        driver.run([Request(FLUSH)])
        assert [b for b in blocks if block_of(device, b) != content("bridge", b)] == []


def check_the_file_is_read() -> None:
    with bridged() as (device, bridge), running(bridge.socket) as (_, driver):
        with device.file.open("r+b") as image:
            for block in range(200):
                os.pwrite(image.fileno(), content("file", block), block * BLOCK)
        driver.check_blocks("file", range(200))


def check_capacity_is_the_files() -> None:
    with bridged() as (_, bridge), Frontend(bridge.socket) as frontend:
        frontend.negotiate()
        assert struct.unpack("<Q", frontend.config(0, 8)) == (SIZE // SECTOR,)


def check_stop_finishes_requests_and_restart_goes_on() -> None:
    with bridged() as (_, bridge), running(bridge.socket) as (frontend, driver):
        for turn in range(5):
            for block in range(60):
                driver.submit(Request(OUT, block * 8, content(turn, block)), kick=False)
            driver.ring.kick()
            base = frontend.stop_ring(0)
            assert base == driver.ring.used_index
            stopped_at = driver.ring.used_index
            frontend.set_status(0)
            assert driver.ring.used_index == stopped_at
            driver.ring.new_eventfds()
            frontend.start([driver.ring], [base])
            while driver.pending:
                assert not any(status for _, status, _ in driver.wait())
            driver.check_blocks(turn, range(60))


def check_memory_added_and_removed_while_running() -> None:
    with bridged() as (_, bridge), running(bridge.socket) as (frontend, driver):
        driver.write_blocks("main", range(20))
        for turn in range(3):
            extra = Memory(guest=0x1_0000_0000, user=0x7D00_0000_0000)
            frontend.add_region(extra)
            added = BlockDriver(driver.ring, extra)
            added.write_blocks(turn, range(20, 40))
            added.check_blocks("main", range(20))
            frontend.remove_region(extra)
            driver.check_blocks(turn, range(20, 40))


def check_front_ends_come_and_go() -> None:
    with bridged() as (_, bridge):
        for turn in range(6):
            with running(bridge.socket) as (_, driver):
                driver.check_blocks(turn - 1, range(30) if turn else ())
                driver.write_blocks(turn, range(30))


def check_front_end_that_leaves_with_requests_in_flight() -> None:
    with bridged() as (_, bridge):
        for turn in range(6):
            with running(bridge.socket) as (_, driver):
                for block in range(60):
                    driver.submit(Request(OUT, block * 8, content(turn, block)))
        with running(bridge.socket) as (_, driver):
            driver.write_blocks("last", range(60))
            driver.check_blocks("last", range(60))


def check_configuration_change_reaches_the_front_end() -> None:
    """The disk grows; the front-end is told, and reads the new capacity."""
    with bridged() as (device, bridge), running(bridge.socket) as (frontend, driver):
        reverse = frontend.open_reverse_channel()
        driver.write_blocks("before", range(3))
        device.resize(SIZE * 2)
        request, flags, size = struct.unpack("=III", reverse.recv(12))
        assert (request, flags & 3, size) == (2, 1, 0)
        assert struct.unpack("<Q", frontend.config(0, 8)) == (2 * SIZE // SECTOR,)
        last = 2 * SIZE // BLOCK - 1
        driver.write_blocks("grown", [last])
        driver.run([Request(FLUSH)])
        assert block_of(device, last) == content("grown", last)


@contextlib.contextmanager
def with_a_neighbour() -> Iterator[tuple[VduseDevice, BridgeProcess]]:
    """A daemon with two bridges: /tmp/vd.sock on VDUSE, /tmp/sim.sock on a simulator."""
    with (
        vduse_block() as device,
        block_device("blk9"),
        serving(("vd", "vdpa:vd0"), ("sim", "vdpa:blk9")) as bridge,
    ):
        yield device, bridge


def _neighbour_lives(seconds: float) -> None:
    # Messages, restarts, I/O and new front-ends of the other bridge, each answered soon.
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with running("/tmp/sim.sock") as (frontend, driver):
            driver.write_blocks("next door", range(20))
            began = time.monotonic()
            base = frontend.stop_ring(0)
            assert time.monotonic() - began < 2, "the event loop was held up"
            frontend.set_status(0)
            frontend.start([driver.ring], [base])
            driver.check_blocks("next door", range(20))


def check_process_that_hangs_holds_up_no_other_bridge() -> None:
    with with_a_neighbour() as (device, _), running("/tmp/vd.sock") as (frontend, driver):
        driver.write_blocks("before", range(10))
        device.signal(signal.SIGSTOP)
        for block in range(10):
            driver.submit(Request(OUT, block * 8, content("during", block)))
        frontend.send("GET_VRING_BASE", struct.pack("=II", 0, 0))
        _neighbour_lives(4)
        assert driver.ring.used_index == 10
        device.signal(signal.SIGCONT)
        index, base = struct.unpack("=II", frontend.receive("GET_VRING_BASE"))
        assert (index, base) == (0, driver.ring.used_index)
        frontend.set_status(0)
        frontend.start([driver.ring], [base])
        while driver.pending:
            driver.wait()
        driver.check_blocks("during", range(10))


def check_front_end_that_leaves_while_the_process_hangs() -> None:
    with with_a_neighbour() as (device, _):
        with running("/tmp/vd.sock") as (_, driver):
            driver.write_blocks("before", range(10))
            device.signal(signal.SIGSTOP)
            driver.submit(Request(OUT, 0, content("during", 0)))
        _neighbour_lives(3)
        device.signal(signal.SIGCONT)
        with running("/tmp/vd.sock") as (_, driver):
            driver.check_blocks("before", range(1, 10))


def check_process_that_dies_is_an_error_and_no_hang() -> None:
    """The front-end is cut off, the log says why, and the other bridge goes on."""
    with (
        vduse_block(msg_timeout=1) as device,
        block_device("blk9"),
        serving(("vd", "vdpa:vd0"), ("sim", "vdpa:blk9")) as bridge,
    ):
        with running("/tmp/vd.sock") as (frontend, driver):
            driver.write_blocks("before", range(10))
            device.signal(signal.SIGKILL)
            device.process.wait()
            began = time.monotonic()
            try:
                frontend.stop_ring(0)
            except HungUp:
                pass
            else:
                raise AssertionError("a dead device was stopped in good order")
            assert time.monotonic() - began < 20
        bridge.wait_for("vd: waiting for the back-end: /dev/vhost-vdpa-")
        assert "cut off: /dev/vhost-vdpa-" in bridge.text()
        _neighbour_lives(1)


def check_device_created_anew_is_taken_up_again() -> None:
    with contextlib.ExitStack() as first:
        device = first.enter_context(vduse_block(msg_timeout=1))
        with serving(("vd", "vdpa:vd0")) as bridge:
            with running("/tmp/vd.sock") as (frontend, driver):
                driver.write_blocks("lost", range(3))
                device.signal(signal.SIGKILL)
                device.process.wait()
                with contextlib.suppress(HungUp):
                    frontend.stop_ring(0)
            bridge.wait_for("vd: waiting for the back-end")
            first.close()
            with vduse_block() as device:
                wait_until(lambda: bridge.text().count("vd: vdpa:vd0 is ready") == 2)
                with running("/tmp/vd.sock") as (_, driver):
                    driver.write_blocks("anew", range(3))
                    driver.run([Request(FLUSH)])
                assert block_of(device, 2) == content("anew", 2)
                bridge.stop()
