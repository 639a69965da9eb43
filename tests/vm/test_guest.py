"""What is checked inside the virtual machine, on the kernel's vhost-vdpa: see guest/checks_*.py."""

from __future__ import annotations

import pytest

from .checks import GUEST, GuestChecks, checks_of

# Checks that count rounds.
SOAK = (
    "front_ends_killed_at_any_point",
    "libblkio_killed_at_any_point",
    "front_end_killed_at_any_moment_goes_on",
    "daemon_killed_at_any_moment_loses_no_write",
    "libblkio_suspended_at_any_moment",
    "numbered_frames_over_suspends",
    "shadow_vrings_come_and_go_under_load",
    "block_between_vdpa_devices_on_one_store",
    "block_between_vdpa_and_vhost_user",
    "numbered_frames_between_vdpa_devices",
)
MODULES = sorted(path.stem for path in GUEST.glob("checks_*.py"))


@pytest.mark.parametrize(
    ("module", "check"),
    [
        pytest.param(
            module,
            check,
            id=f"{module.removeprefix('checks_')}: {check}",
            marks=[pytest.mark.soak] if check in SOAK else [],
        )
        for module in MODULES
        for check in checks_of(module)
    ],
)
def test_in_the_guest(guest: GuestChecks, module: str, check: str) -> None:
    """The check of that name passes in the guest."""
    guest.require(module, check)
