"""What all tests share: a run that must not skip anything says so by failing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

VM = Path(__file__).with_name("vm")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With two processes (``-n 2 --dist loadgroup``) one has the virtual machine, one the rest."""
    for item in items:
        group = "vm" if VM in item.path.parents else "here"
        item.add_marker(pytest.mark.xdist_group(group))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """In ``make test`` everything that a test could need was installed: a skip is a failure."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if not os.environ.get("VHOST_BRIDGE_NO_SKIPS") or reporter is None:
        return
    if reporter.stats.get("skipped") and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
