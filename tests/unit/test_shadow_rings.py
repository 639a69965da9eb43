"""Shadow vrings in C: against models of a driver and a device, under the sanitizers, and against
guests and devices that break the rules."""

from __future__ import annotations

import mmap
import os
import select
import subprocess
from pathlib import Path

import pytest

from vhostbridge.backends.device import MemoryRegion, VringSetup
from vhostbridge.backends.dirty_log import DirtyLog
from vhostbridge.backends.errors import PeerError, Unsupported
from vhostbridge.backends.fds import OwnedFd, new_eventfd
from vhostbridge.bridge.shadow_rings import GuestMap, ShadowRings
from vhostbridge.native import ffi, lib

ROOT = Path(__file__).parents[2]
SOURCES = ("guest_ring", "device_ring", "shadow", "shadow_thread")
INDIRECT, EVENT_IDX, IN_ORDER = 1 << 28, 1 << 29, 1 << 35
FEATURES = {
    "plain": 0,
    "indirect": INDIRECT,
    "event index": INDIRECT | EVENT_IDX,
    "in order": IN_ORDER | EVENT_IDX,
}
PAGE = 4096


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models and the code under test, under the address and undefined-behaviour sanitizers."""
    path = tmp_path_factory.mktemp("native") / "shadow_test"
    sources = [ROOT / f"tests/native/{name}.c" for name in ("shadow_test",)]
    sources += [ROOT / f"native/{name}.c" for name in SOURCES]
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1"]
    warn = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-pthread"]
    subprocess.run(["gcc", *warn, *sanitize, "-o", path, *sources], check=True)
    return path


def run(program: Path, *arguments: object) -> None:
    done = subprocess.run(
        [program, *map(str, arguments)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("size", [1, 8, 256])
@pytest.mark.parametrize("layout", ["split", "packed"])
def test_every_request_arrives_and_comes_back_once(
    program: Path, layout: str, size: int, features: str
) -> None:
    """More than 2^16 of them, with every chain that fits, in any order; what the device may have
    written is marked, and nothing else is. Now and then another shadow vring takes over."""
    rounds = 70_000 if size == 8 else 5000
    run(program, "relay", 11, rounds, layout, size, FEATURES[features])


@pytest.mark.parametrize("size", [3, 100, 32768])
def test_packed_rings_have_any_size(program: Path, size: int) -> None:
    run(program, "relay", 5, 20_000, "packed", size, INDIRECT)


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("layout", ["split", "packed"])
def test_guest_that_corrupts_its_rings_harms_nobody(
    program: Path, layout: str, features: str
) -> None:
    """The device gets addresses of guest memory only; nothing outside the rings is written. Now
    and then the device lies too."""
    run(program, "hostile", 3, 1_000_000, layout, 16, FEATURES[features])


def guest_memory(pages: int) -> MemoryRegion:
    fd = OwnedFd(os.memfd_create("guest"))
    os.ftruncate(fd.fileno(), pages * PAGE)
    status = os.fstat(fd.fileno())
    return MemoryRegion(0, pages * PAGE, fd, 0, (status.st_dev, status.st_ino, 0))


def vring(base: int, kick: OwnedFd | None = None) -> VringSetup:
    return VringSetup(0, 8, 0, 0x100, 0x200, base, kick, None, None, enabled=True)


def test_guest_memory_that_goes_away_stops_the_vring_only() -> None:
    """A front-end that makes its memory's file shorter: a bus error, and the process lives."""
    broken, kick = new_eventfd(), new_eventfd()
    region, memory = guest_memory(4), GuestMap()
    memory.update([region])
    rings = ShadowRings(0, [vring(0, kick)], memory, 1 << 32, broken)
    rings.start()
    assert rings.broken_vrings() == []
    os.ftruncate(region.fd.fileno(), 0)
    os.eventfd_write(kick.fileno(), 1)
    assert select.select([broken.fileno()], [], [], 10)[0]
    rings.stop()
    ((_, reason),) = rings.broken_vrings()
    assert reason == "guest memory is gone"
    rings.close()
    memory.close()
    for fd in (broken, kick, region.fd):
        fd.close()


def test_vring_outside_guest_memory_is_refused() -> None:
    broken, region, memory = new_eventfd(), guest_memory(1), GuestMap()
    memory.update([region])
    outside = VringSetup(0, 256, 0, 0x1000, 0x2000, 0, None, None, None, enabled=True)
    with pytest.raises(Unsupported, match="vring 0 can't be shadowed"):
        ShadowRings(0, [outside], memory, 1 << 32, broken)
    memory.close()
    broken.close()
    region.fd.close()


@pytest.mark.parametrize(
    ("address", "size", "marked"),
    [
        (0, 1, {0}),
        (PAGE - 1, 2, {0, 1}),
        (7 * PAGE, 2 * PAGE, {7, 8}),
        (5 * PAGE, 0, set()),
        (63 * PAGE, 5 * PAGE, {63}),
        (1 << 40, PAGE, set()),
    ],
)
def test_pages_are_marked_in_the_log(address: int, size: int, marked: set[int]) -> None:
    """One bit a page, the lowest first; what lies behind the log's end is left out."""
    bits = ffi.new("uint8_t[8]")
    lib.vb_log_mark(bits, 8, address, size)
    word = int.from_bytes(bytes(bits), "little")
    assert {page for page in range(64) if word >> page & 1} == marked


def log_file(size: int) -> OwnedFd:
    fd = OwnedFd(os.memfd_create("log"))
    os.ftruncate(fd.fileno(), size)
    return fd


def test_everything_is_marked_in_the_log() -> None:
    region = guest_memory(16)
    with log_file(PAGE) as fd, DirtyLog(fd.dup(), 8, 64) as log:
        log.mark_all([region])
        assert log.covers([region])
        with mmap.mmap(fd.fileno(), PAGE) as found:
            assert found[:16] == bytes(8) + b"\xff\xff" + bytes(6)
    region.fd.close()


def test_log_that_is_larger_than_its_file_is_refused() -> None:
    with log_file(PAGE) as fd, pytest.raises(PeerError, match="4097 bytes from 0 on in a file of"):
        DirtyLog(fd, 0, 4097)


def test_log_that_is_too_small_for_the_memory_is_seen() -> None:
    region = guest_memory(9)
    with log_file(PAGE) as fd, DirtyLog(fd.dup(), 0, 1) as log:
        assert not log.covers([region])
    region.fd.close()
