"""What is checked inside the virtual machine, on the kernel's vhost-vdpa: see guest/checks_*.py."""

from __future__ import annotations

import pytest

from .checks import GUEST, GuestChecks, checks_of
from .guest.harness import SOAK

MODULES = sorted(path.stem for path in GUEST.glob("checks_*.py"))


@pytest.mark.parametrize(
    ("module", "check"),
    [
        pytest.param(
            module,
            check,
            id=f"{module.removeprefix('checks_')}: {check}",
            marks=[pytest.mark.soak] if f"check_{check}" in SOAK else [],
        )
        for module in MODULES
        for check in checks_of(module)
    ],
)
def test_in_the_guest(guest: GuestChecks, module: str, check: str) -> None:
    """The check of that name passes in the guest."""
    guest.require(module, check)
