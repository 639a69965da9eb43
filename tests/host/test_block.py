"""libblkio, the bridge and qemu-storage-daemon: every block read is the one that was written."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.peers import blkio
from tests.peers.bridge import Bridge
from tests.peers.storage import StorageDaemon, make_image
from tests.vm.guest.frontend import Frontend

MIB = 1 << 20


@pytest.fixture(params=["direct", "shadow"])
def bridge(disk: StorageDaemon, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Bridge]:
    """A bridge in front of `disk`, whose requests go straight or through shadow vrings."""
    options = ["--shadow"] if request.param == "shadow" else []
    backend = f"vhost-user:{disk.socket}"
    with Bridge(backend, listen=tmp_path / "vm.sock", arguments=options) as running:
        yield running


QUICK = {"size": 4 * MIB, "seed": 7}


@pytest.mark.parametrize(
    ("depth", "queues", "per_request"), [(1, 1, 1), (64, 1, 1), (16, 4, 1), (8, 2, 16)]
)
def test_random_io_is_verified_on_the_device_and_in_the_image(
    disk: StorageDaemon, bridge: Bridge, tmp_path: Path, depth: int, queues: int, per_request: int
) -> None:
    """Writes and reads at several depths, queues and request sizes; then the image itself."""
    common = {"size": 8 * MIB, "seed": depth, "state": tmp_path / "state"}
    shape = {"depth": depth, "queues": queues, "per_request": per_request}
    result = blkio.run(bridge.listen, "write-read", **common, **shape, flush_every=100)
    assert result["flushes"] > queues
    written = blkio.verify_file(disk.image, **common)["verified"]
    assert 0 < written < result["verified"]


def test_whole_disk_comes_back_to_the_next_front_end(disk: StorageDaemon, bridge: Bridge) -> None:
    """One front-end fills the disk; another, with more queues, reads it; the image agrees."""
    size = disk.image.stat().st_size
    assert blkio.run(bridge.listen, "fill", seed=3, per_request=32)["flushes"] == 1
    result = blkio.run(bridge.listen, "verify", seed=3, queues=4, depth=32)
    assert result["verified"] == size // 4096
    assert blkio.verify_file(disk.image, seed=3)["verified"] == size // 4096


def test_configuration_can_be_read_from_anywhere(bridge: Bridge) -> None:
    """As crosvm, libkrun and OpenVMM do, whose guests read field by field."""
    with Frontend(str(bridge.listen)) as frontend:
        frontend.negotiate()
        whole = frontend.config(0, 60)
        for offset, size in ((0, 8), (4, 4), (20, 4), (34, 2), (59, 1)):
            assert frontend.config(offset, size) == whole[offset : offset + size]


def test_verification_sees_one_damaged_byte(disk: StorageDaemon, bridge: Bridge) -> None:
    """What the other tests rely on: a changed byte in the image is found through the bridge."""
    blkio.run(bridge.listen, "fill", **QUICK)
    with disk.image.open("r+b") as image:
        image.seek(MIB + 4000)
        (byte,) = image.read(1)
        image.seek(MIB + 4000)
        image.write(bytes([byte ^ 1]))
    with blkio.start(bridge.listen, "verify", **QUICK) as client:
        assert client.wait() == 1
        assert "block at 0x100000 (generation 1) is damaged from byte 4000" in client.output


def test_front_end_sees_the_back_ends_limits(disk: StorageDaemon, bridge: Bridge) -> None:
    """Capacity and number of queues are the device's."""
    with blkio.start(bridge.listen, "info") as client:
        info = blkio.finish(client)
    assert (info["capacity"], info["max-queues"]) == (disk.image.stat().st_size, 4)


def test_inherited_listening_socket_serves_front_ends_one_after_the_other(
    disk: StorageDaemon, tmp_path: Path
) -> None:
    """With --fd and a listening socket, as from systemd; its path is left alone at the end."""
    path = tmp_path / "inherited.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with Bridge(f"vhost-user:{disk.socket}", fd=listener.fileno()):
            blkio.run(path, "fill", **QUICK)
            blkio.run(path, "verify", **QUICK)
    assert path.is_socket()
    assert blkio.verify_file(disk.image, **QUICK)["verified"] == 1024


def test_inherited_connection_is_served_until_it_ends(disk: StorageDaemon, tmp_path: Path) -> None:
    """With --fd and a connected socket the bridge ends by itself, and well, with its front-end."""
    path = tmp_path / "accepted.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with blkio.start(path, "write-read", **QUICK) as client:
            connection, _ = listener.accept()
            with connection:
                bridge = Bridge(f"vhost-user:{disk.socket}", fd=connection.fileno())
            with bridge:
                assert blkio.finish(client)["verified"]
                assert bridge.wait() == 0


def test_bridge_of_a_bridge(disk: StorageDaemon, bridge: Bridge, tmp_path: Path) -> None:
    """A bridge's back-end may be another bridge."""
    outer = tmp_path / "outer.sock"
    with Bridge(f"vhost-user:{bridge.listen}", name="outer", listen=outer):
        blkio.run(outer, "write-read", **QUICK, queues=2, state=tmp_path / "state")
    assert blkio.verify_file(disk.image, **QUICK, state=tmp_path / "state")["verified"]


def test_many_bridges_in_one_process(disk: StorageDaemon, tmp_path: Path) -> None:
    """A configuration file's bridges run side by side, each with its own device."""
    with StorageDaemon(make_image(tmp_path / "other.img"), tmp_path / "other.sock") as other:
        config = tmp_path / "bridges.toml"
        config.write_text(
            "".join(
                f'[[bridge]]\nname = "{name}"\nlisten = "{tmp_path / name}"\n'
                f'backend = "vhost-user:{daemon.socket}"\n'
                for name, daemon in (("one", disk), ("two", other))
            )
        )
        with Bridge(arguments=["--config", config]):
            clients = [
                blkio.start(tmp_path / name, "fill", size=4 * MIB, seed=seed)
                for seed, name in enumerate(("one", "two"))
            ]
            for client in clients:
                with client:
                    blkio.finish(client)
        for seed, image in enumerate((disk.image, other.image)):
            assert blkio.verify_file(image, size=4 * MIB, seed=seed)["verified"] == 1024
