"""The virtual machine for these tests: booted once, when the first test wants it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig.product import build_wheel
from tests.rig.vm import Vm

from .checks import GuestChecks

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of this folder as one of the virtual machine's."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.vm)


@pytest.fixture(scope="session")
def vm() -> Iterator[Vm]:
    """The session's virtual machine, with the working tree's wheel."""
    with Vm(wheel=build_wheel()) as machine:
        yield machine


@pytest.fixture(scope="session")
def guest(vm: Vm, request: pytest.FixtureRequest) -> GuestChecks:
    """Runs the guest's side of tests; only the checks that this session selected."""
    wanted: dict[str, list[str]] = {}
    for item in request.session.items:
        callspec = getattr(item, "callspec", None)
        if callspec is not None and {"module", "check"} <= callspec.params.keys():
            wanted.setdefault(callspec.params["module"], []).append(callspec.params["check"])
    return GuestChecks(vm, wanted)
