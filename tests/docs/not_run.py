"""Sections of the documents whose commands the guides' tests do not follow, and why."""

from __future__ import annotations

HARDWARE = "the test machine has no such card"
NO_PACKAGE = "Debian has no package of it; it was run by hand"
RUNNERS = "they are what runs the tests"
BY_CI = "CI runs them (.ci/run)"
#: Under systemd, with the Debian package.
PACKAGE = "tests/vm/test_guest.py::test_in_the_guest"

#: Section: the test that does what its commands do.
BY_OTHER_TESTS: dict[str, str] = {
    "docs/conformance.md": "tests/host/test_conform.py::test_storage_daemon_that_is_read",
    "docs/migration.md#with-qemu": (
        "tests/host/test_live_migration.py::test_guest_moves_there_and_back_under_load"
    ),
    "docs/migration.md#state-that-only-the-back-end-has": (
        "tests/host/test_net_state.py::test_connection_goes_on_there_and_back"
    ),
    # With systemd for what the guide of virtiofsd does by hand.
    "docs/moving.md#when-the-back-end-goes-away": (
        "tests/host/test_guides.py::test_qemu_and_virtiofsd"
    ),
    "docs/serving.md#completion": (
        "tests/unit/test_cli.py::test_completion_scripts_call_the_command"
    ),
    "docs/service.md#installing": PACKAGE,
    "docs/service.md#starting-by-a-socket": PACKAGE,
    "docs/service.md#journal": PACKAGE,
}
#: Section: why no test runs its commands.
NOT_RUN: dict[str, str] = {
    "README.md#try-it": BY_CI,
    "docs/guides/cloud-hypervisor.md#disk": NO_PACKAGE,
    "docs/guides/cloud-hypervisor.md#network-card": NO_PACKAGE,
    "docs/guides/cloud-hypervisor.md#shared-folder": NO_PACKAGE,
    "docs/guides/mlx5.md#a-device": HARDWARE,
    "docs/migration.md#with-cloud-hypervisor": NO_PACKAGE,
    "docs/testing.md#fuzzing": RUNNERS,
    "docs/testing.md#the-rig": RUNNERS,
}
