"""Runs every fuzzer: ``python -m tests.fuzz [--seconds N] [FUZZER…]``, or ``make fuzz``.

Each begins with its corpus under ``tests/fuzz/corpus`` and gets an equal share of the time. What it
finds is written to ``out/fuzz``; the exit code is 1 then.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz.harnesses import HARNESSES

ROOT = Path(__file__).parents[2]
CORPUS = ROOT / "tests/fuzz/corpus"
FINDINGS = ROOT / "out/fuzz"
#: Names of fuzzers, those of C and of hypothesis first: they have most to do.
FUZZERS = ("shadow", "session", "control", *HARNESSES)
#: Shares of the time; the others have one.
SHARES = {"shadow": 4.0, "session": 4.0, "control": 2.0}

_OF_C = ("shadow", "control")
_SOURCES = (
    *("bus_error", "eventfd", "guest_ring", "guest_requests", "device_ring"),
    *("inflight", "inflight_packed"),
    *("shadow", "shadow_thread", "control", "control_guest"),
)
_SANITIZE = ("-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all", "-g", "-O1")
_WARN = ("-std=gnu11", "-Wall", "-Wextra", "-Werror", "-pthread")


@dataclass(frozen=True, slots=True)
class Ended:
    """One fuzzer at its end: how much it tried, and what it said if it found something."""

    name: str
    tried: str
    finding: str = ""


def build(name: str, folder: Path) -> None:
    """A fuzzer of C code into the folder, with libFuzzer and the sanitizers."""
    own = [ROOT / f"tests/fuzz/{n}.c" for n in (f"{name}_fuzz", "peers")]
    sources = [*own, *(ROOT / f"native/{n}.c" for n in _SOURCES)]
    subprocess.run([_clang(), *_WARN, *_SANITIZE, "-o", folder / name, *sources], check=True)


# Debian's default one, or that of any other version.
def _clang() -> str:
    for name in ("clang-14", "clang"):
        if any(Path(folder, name).exists() for folder in os.get_exec_path()):
            return name
    sys.exit("no clang: .ci/setup-fuzz installs it")


def _command(name: str, seconds: float, programs: Path, new: Path) -> list[str | Path]:
    if name == "session":
        return [sys.executable, "-m", "tests.fuzz.machines", f"{seconds:.0f}"]
    limits: list[str | Path] = [
        f"-max_total_time={max(1, seconds):.0f}",
        "-timeout=10",
        "-rss_limit_mb=2048",
    ]
    places: list[str | Path] = [f"-artifact_prefix={FINDINGS}/{name}-", new, CORPUS / name]
    if name in _OF_C:
        return [programs / name, "-handle_bus=0", "-max_len=512", *limits, *places]
    return [sys.executable, "-m", "tests.fuzz.target", name, *limits, *places]


def run(name: str, seconds: float, programs: Path, new: Path) -> Ended:
    """One fuzzer; ``new`` is where inputs go that reach more."""
    new.mkdir(parents=True, exist_ok=True)
    # The code under test has a handler of its own for SIGBUS.
    environment = {**os.environ, "ASAN_OPTIONS": "handle_sigbus=0"}
    done = subprocess.run(
        _command(name, seconds, programs, new),
        cwd=ROOT, env=environment, capture_output=True, text=True, errors="replace", check=False,
    )  # fmt: skip
    said = re.sub(r"INFO: Instrumenting .*\n", "", done.stdout + done.stderr)
    found = re.search(r"(\d+) (?:runs|programs)", said)
    tried = f"{found[1]} inputs" if found else "nothing"
    # Nothing tried is no success either.
    return Ended(name, tried, said[-6000:] if done.returncode or not found else "")


def main() -> int:
    """Run what was asked for, two at a time; print a line for each."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument(
        "fuzzers", nargs="*", default=FUZZERS, metavar="FUZZER", help=" ".join(FUZZERS)
    )
    parser.add_argument("--seconds", type=float, default=60, help="for all of them together")
    parser.add_argument("--keep", type=Path, help="folder for inputs that reach more code")
    wanted = parser.parse_args()
    jobs = min(len(wanted.fuzzers), len(os.sched_getaffinity(0)))
    whole = sum(SHARES.get(name, 1) for name in wanted.fuzzers)
    FINDINGS.mkdir(parents=True, exist_ok=True)
    failed = False
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        programs = Path(folder)
        builds = [pool.submit(build, name, programs) for name in wanted.fuzzers if name in _OF_C]
        for built in builds:
            built.result()
        keep = wanted.keep or programs / "new"
        ends = []
        for name in wanted.fuzzers:
            seconds = wanted.seconds * jobs * SHARES.get(name, 1) / whole
            ends.append(pool.submit(run, name, seconds, programs, keep / name))
        for end in ends:
            one = end.result()
            failed |= bool(one.finding)
            print(
                f"{one.name}: {one.tried}, {'FAILED' if one.finding else 'nothing found'}",
                flush=True,
            )
            print(one.finding, end="")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
