"""Shadow vrings in C against models of a driver and a device, and against guests and devices that
break the rules; under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("eventfd", "guest_ring", "device_ring", "shadow", "shadow_thread")
INDIRECT, EVENT_IDX, IN_ORDER = 1 << 28, 1 << 29, 1 << 35
FEATURES = {
    "plain": 0,
    "indirect": INDIRECT,
    "event index": INDIRECT | EVENT_IDX,
    "in order": IN_ORDER | EVENT_IDX,
}


def build(folder: Path, name: str, *options: str) -> Path:
    """A test program and the code under test, under the sanitizers."""
    path = folder / name
    sources = [ROOT / f"tests/native/{name}.c", *(ROOT / f"native/{one}.c" for one in SOURCES)]
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1"]
    warn = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-pthread"]
    subprocess.run(["gcc", *warn, *sanitize, *options, "-o", path, *sources], check=True)
    return path


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models and the code under test."""
    return build(tmp_path_factory.mktemp("native"), "shadow_test")


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


def test_peer_that_takes_no_signal_makes_nobody_wait(tmp_path: Path) -> None:
    """It fills its eventfd between our look and our write, which then waits until it reads."""
    run(build(tmp_path, "eventfd_test", "-Wl,--wrap=poll"))
