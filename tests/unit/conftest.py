"""Every unit test leaves the process's descriptors as it found them."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

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
