"""Shadow vrings in C against models of a driver and a device, against guests and devices that break
the rules, and ended at any moment; under the address, undefined-behaviour and thread sanitizers."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = (
    *("bus_error", "eventfd", "guest_ring", "guest_requests", "device_ring"),
    *("inflight", "inflight_packed"),
    *("shadow", "shadow_thread"),
)
WARN = ("-std=gnu11", "-Wall", "-Wextra", "-Werror", "-pthread", "-g", "-O1")
ADDRESS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
# Fences that order a store before a load are beside what it can follow.
THREAD = ("-fsanitize=thread", "-Wno-tsan")
#: How each program is built. A kill frees nothing, so nobody looks for leaks after it.
PROGRAMS = {
    "shadow_test": ADDRESS,
    "inflight_test": ("-DCRASH_POINTS", *ADDRESS),
    "threads_test": THREAD,
    "eventfd_test": (*ADDRESS, "-Wl,--wrap=poll"),
}
ENVIRONMENT = {"inflight_test": {"ASAN_OPTIONS": "detect_leaks=0"}}
INDIRECT, EVENT_IDX, IN_ORDER = 1 << 28, 1 << 29, 1 << 35
FEATURES = {
    "plain": 0,
    "indirect": INDIRECT,
    "event index": INDIRECT | EVENT_IDX,
    "in order": IN_ORDER | EVENT_IDX,
}

Run = Callable[..., None]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a program, compiled with the models and the code under test, to its good end."""
    folder = tmp_path_factory.mktemp("native")

    def run(name: str, *arguments: object) -> None:
        path = folder / name
        if not path.exists():
            sources = [ROOT / f"tests/native/{source}.c" for source in (name, "ring_model")]
            sources += [ROOT / f"native/{source}.c" for source in SOURCES]
            subprocess.run(["gcc", *WARN, *PROGRAMS[name], "-o", path, *sources], check=True)
        done = subprocess.run(
            [path, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            env=os.environ | ENVIRONMENT.get(name, {}),
        )
        assert done.returncode == 0, done.stderr[-3000:]

    return run


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("size", [1, 8, 256])
@pytest.mark.parametrize("layout", ["split", "packed"])
def test_every_request_arrives_and_comes_back_once(
    run: Run, layout: str, size: int, features: str
) -> None:
    """More than 2^16 of them, with every chain that fits, in any order; what the device may have
    written is marked, and nothing else is. Now and then another shadow vring takes over."""
    rounds = 70_000 if size == 8 else 5000
    run("shadow_test", "relay", 11, rounds, layout, size, FEATURES[features])


@pytest.mark.parametrize("size", [3, 100, 32768])
def test_packed_rings_have_any_size(run: Run, size: int) -> None:
    run("shadow_test", "relay", 5, 20_000, "packed", size, INDIRECT)


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("layout", ["split", "packed"])
def test_guest_that_corrupts_its_rings_harms_nobody(run: Run, layout: str, features: str) -> None:
    """The device gets addresses of guest memory only; nothing outside the rings is written. The
    in-flight buffer is corrupted as well, and now and then the device lies too."""
    run("shadow_test", "hostile", 3, 1_000_000, layout, 16, FEATURES[features])


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("size", [1, 8, 256])
@pytest.mark.parametrize("layout", ["split", "packed"])
def test_kill_between_any_two_stores_loses_and_repeats_nothing(
    run: Run, layout: str, size: int, features: str
) -> None:
    """From the in-flight buffer alone another process goes on: each request comes back once, those
    that had come back are not done again, and the others are in their order. It may be killed too
    while it begins, or while it stops with requests in flight."""
    run("inflight_test", "crash", 7, 20_000, layout, size, FEATURES[features])


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("layout", ["split", "packed"])
def test_threads_do_not_race(run: Run, layout: str, features: str) -> None:
    """Driver, shadow vring and device in a thread each, under the thread sanitizer; vrings end and
    others go on, while the log, memory and eventfds change."""
    run("threads_test", "threads", 5, 4000, layout, 64, FEATURES[features])


def test_peer_that_takes_no_signal_makes_nobody_wait(run: Run) -> None:
    """It fills its eventfd between our look and our write, which then waits until it reads."""
    run("eventfd_test")
