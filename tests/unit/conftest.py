"""Every unit test leaves the process's descriptors as it found them."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.unit.commands import Ran, Run
from vhostbridge import cli as command_line

# Two shared cores: a slow example says nothing about the code, and runs must repeat.
settings.register_profile(
    "unit",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("unit")


def open_descriptors() -> dict[int, str]:
    """Number and target of every open descriptor of this process."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue  # the listing's own
    return found


@pytest.fixture(autouse=True)
def no_descriptor_leaks() -> Iterator[None]:
    """A descriptor that only the garbage collector closes counts too: it warns, which fails."""
    before = open_descriptors()
    yield
    after = open_descriptors()
    if after != before:
        gc.collect()
        after = open_descriptors()
    assert after == before


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    def call(*argv: str | Path) -> Ran:
        monkeypatch.setattr(sys, "argv", ["vhost-bridge", *map(str, argv)])
        with pytest.raises(SystemExit) as exit_:
            command_line.main()
        shown = capfd.readouterr()
        assert isinstance(exit_.value.code, int)
        return Ran(exit_.value.code, shown.out, shown.err)

    return call
