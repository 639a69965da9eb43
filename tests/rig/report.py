"""Progress of slow steps, where the cache lies, and the error that the rig's user sees."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


class RigError(Exception):
    """The rig can't do its work: what, why and what to do, in one line."""


def say(text: str) -> None:
    """Print one line about the rig on stderr."""
    print(f"rig: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def step(text: str) -> Iterator[None]:
    """Say what is being done, and how many seconds it took; silent about the time on failure."""
    say(f"{text} ...")
    began = time.monotonic()
    yield
    say(f"{text}: {time.monotonic() - began:.1f} s")


def cache_folder() -> Path:
    """Return the folder for everything that can be made again, made if need be."""
    home = os.environ.get("VHOST_BRIDGE_CACHE") or Path.home() / ".cache" / "vhost-bridge"
    folder = Path(home).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold the cache's lock of that name; other processes wait for it."""
    with (cache_folder() / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def checked(argv: Sequence[str], *, env: Mapping[str, str] | None = None) -> str:
    """Run a program and return its stdout; failure is a RigError with the last of its output."""
    done = subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        env=None if env is None else {**os.environ, **env},
        check=False,
    )
    if done.returncode:
        said = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
        raise RigError(f"`{' '.join(argv)[:300]}` ended with {done.returncode}:\n{said}")
    return done.stdout
