"""virtiofsd's files in a QEMU guest, through the bridge."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.peers.bridge import Bridge
from tests.peers.guest import Guest, vhost_user_fs
from tests.peers.process import Process, peer


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    (folder / "from-host").write_bytes(os.urandom((4 << 20) + 17))
    return folder


def virtiofsd(shared: Path, socket: Path) -> Process:
    argv = ["virtiofsd", "--shared-dir", str(shared), "--socket-path", str(socket)]
    return peer([*argv, "--sandbox", "none", "--log-level", "info", "--cache", "never"])


@pytest.fixture(scope="module")
def guest(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    folder = tmp_path_factory.mktemp("fs")
    listen = folder / "vm.sock"
    with virtiofsd(shared, folder / "fs.sock") as server:
        server.wait_for_output("Waiting for vhost-user socket connection")
        with (
            Bridge(f"vhost-user:{folder / 'fs.sock'}", listen=listen),
            Guest(vhost_user_fs(listen, "shared")) as running,
        ):
            running.run("mount -t virtiofs shared /mnt")
            yield running


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_file_of_the_host_is_the_same_in_the_guest(guest: Guest, shared: Path) -> None:
    """A file of several MiB and an odd length, read whole."""
    found = guest.run("sha256sum </mnt/from-host | cut -c1-64")
    assert found == digest_of(shared / "from-host")


def test_file_of_the_guest_is_the_same_on_the_host(guest: Guest, shared: Path) -> None:
    """A new file in a new folder, written, appended to and renamed by the guest."""
    guest.run("mkdir /mnt/d && dd if=/dev/urandom of=/mnt/d/new bs=100000 count=31")
    guest.run("echo tail >>/mnt/d/new; mv /mnt/d/new /mnt/d/from-guest")
    found = guest.run("sha256sum </mnt/d/from-guest | cut -c1-64")
    assert found == digest_of(shared / "d/from-guest")
    assert (shared / "d/from-guest").stat().st_size == 3_100_005


def test_many_small_files(guest: Guest, shared: Path) -> None:
    """Names and contents of a few hundred files agree, and removed ones are gone."""
    guest.run("mkdir /mnt/many; for i in $(seq 200); do echo $i >/mnt/many/f$i; done")
    guest.run("rm /mnt/many/f*0")
    names = {path.name for path in (shared / "many").iterdir()}
    assert names == {f"f{i}" for i in range(1, 201) if i % 10}
    assert sorted(guest.run("ls /mnt/many").split()) == sorted(names)
    assert all((shared / "many" / name).read_text() == f"{name[1:]}\n" for name in names)


def test_reads_go_on_over_stop_and_continue(guest: Guest, shared: Path) -> None:
    """The device is stopped and continued while the guest reads; what it reads stays right."""
    guest.begin("for i in $(seq 8); do sha256sum </mnt/from-host | cut -c1-64; done")
    for _ in range(5):
        guest.qmp.execute("stop")
        guest.qmp.execute("cont")
    assert set(guest.end().split()) == {digest_of(shared / "from-host")}


def test_mounted_again_after_a_reset(guest: Guest, shared: Path) -> None:
    """A guest that is reset with the file system mounted can mount and use it again."""
    guest.qmp.execute("system_reset")
    guest.wait_ready()
    guest.run("mount -t virtiofs shared /mnt")
    assert guest.run("sha256sum </mnt/from-host | cut -c1-64") == digest_of(shared / "from-host")
