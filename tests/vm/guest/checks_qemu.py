"""A guest in QEMU in the virtual machine, the bridge and the kernel's vdpa_sim_blk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from .blk import IN, OUT, SECTOR, BlockDriver, Request, content
from .devices import BridgeProcess, block_device, serving
from .memory import Memory
from .qemu import DONE, FROM, PIECE, TO, NestedGuest, boot_sector, nested_guest
from .raw import RawDevice
from .vring import SplitRing

SIZE = PIECE * SECTOR


@contextlib.contextmanager
def directly(node: str) -> Iterator[BlockDriver]:
    driver = BlockDriver(SplitRing(Memory()), span=SIZE)
    with RawDevice(node, driver.ring.memory) as device:
        device.start(driver.ring)
        yield driver


@contextlib.contextmanager
def copying(count: int) -> Iterator[tuple[NestedGuest, BridgeProcess]]:
    """A guest that copies `count` pieces; afterwards the device itself is looked at."""
    pieces = [content("piece", number, SIZE) for number in range(count)]
    inverted = bytes(byte ^ 0x5A for byte in range(256))
    with block_device() as node:
        with directly(node) as driver:
            driver.run([Request(OUT, 0, boot_sector(count))])
            driver.run(Request(OUT, FROM + n * PIECE, piece) for n, piece in enumerate(pieces))
        with serving(("vm", "vdpa:blk0")) as bridge, nested_guest(bridge.socket) as guest:
            yield guest, bridge
        with directly(node) as driver:
            done = driver.run(Request(IN, TO + n * PIECE, size=SIZE) for n in range(count))
        for request, data in done:
            number = (request.sector - TO) // PIECE
            assert data == pieces[number].translate(inverted), f"piece {number} is wrong"


def check_guest_reads_and_writes() -> None:
    with copying(100) as (guest, bridge):
        guest.wait_done()
        assert (guest.copied, starts(bridge)) == (100, 1)


def check_guest_is_stopped_and_continued() -> None:
    """QEMU's own order: each ring's base is asked for, status 0, and later everything anew."""
    turns, count = 8, 400
    with copying(count) as (guest, bridge):
        for turn in range(turns):
            guest.wait_copied(1 + turn * 40)
            guest.execute("stop")
            guest.catch_up()
            assert guest.copied < count, "it was done before the last stop"
            guest.execute("cont")
        guest.wait_done()
        assert (guest.copied, starts(bridge)) == (count, 1 + turns)


def check_guest_is_reset_in_the_middle() -> None:
    """It boots from the device again, and copies anew what it had begun to."""
    boots, count = 4, 200
    with copying(count) as (guest, bridge):
        for boot in range(1, boots):
            guest.wait_copied(5, boots=boot)
            guest.execute("system_reset")
        guest.wait_copied(count, boots=boots)
        guest.wait_done()
        assert guest.said.count(DONE) == 1, "it was done before a reset"
        assert starts(bridge) == boots


def starts(bridge: BridgeProcess) -> int:
    return bridge.text().count("running vrings 0")
