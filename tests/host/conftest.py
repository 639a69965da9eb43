"""Real user-space peers on this host, from the rig's tree."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.peers.bridge import Bridge
from tests.peers.manager import Manager
from tests.peers.storage import StorageDaemon, make_image

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of this folder as one of real peers."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.host)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[StorageDaemon]:
    """A vhost-user-blk back-end with four queues on an image of 32 MiB."""
    image = make_image(tmp_path / "disk.img")
    with StorageDaemon(image, tmp_path / "disk.sock", queues=4) as daemon:
        yield daemon


@pytest.fixture
def bridge(disk: StorageDaemon, tmp_path: Path) -> Iterator[Bridge]:
    """A bridge that listens, in front of `disk`."""
    with Bridge(f"vhost-user:{disk.socket}", listen=tmp_path / "vm.sock") as running:
        yield running


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    """A service manager that keeps descriptors."""
    with Manager(tmp_path) as manager:
        yield manager


@pytest.fixture
def arguments(disk: StorageDaemon, tmp_path: Path) -> list[str | Path]:
    """Those of `serve` for one bridge, `vm1`, in front of `disk`, which listens at `vm.sock`."""
    device: list[str | Path] = ["--name", "vm1", "--backend", f"vhost-user:{disk.socket}"]
    return [*device, "--listen", tmp_path / "vm.sock", "--control", tmp_path / "control"]
