"""`vhost-bridge conform` on real back-ends: what they offer passes, and they are left usable."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.peers.process import Process, peer
from tests.peers.storage import StorageDaemon
from vhostbridge.bridge.conform.block import BLOCK, SCRATCH_BLOCKS
from vhostbridge.bridge.conform.contracts import CONTRACTS

NEED_REQUESTS = {"requests-complete", "kick-kept", "call-after-resume"}
INTERNAL = {"internal-state-twice", "internal-state-loads"}
UNSEEN = {"config-change-held"}
# qemu-storage-daemon 10.0 hangs up when a request ends after GET_VRING_BASE, and writes take long
# enough for that: see docs/conformance.md.
STOPPED_WHEN_IDLE = (
    *("requests-complete", "kick-kept", "call-after-resume", "load-continues", "illegal-refused"),
    *("reset-suspended", "base-wraps", "other-ring-size"),
)


def conform(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vhostbridge", "conform", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def passing(*arguments: str | Path) -> dict[str, Any]:
    """The report; nothing may have failed."""
    done = conform("-j", *arguments)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["summary"]["fail"] == report["summary"]["not run"] == 0
    return dict(report)


def not_offered(report: dict[str, Any]) -> set[str]:
    return {one["name"] for one in report["contracts"] if one["result"] == "not offered"}


# Block


def test_storage_daemon_that_is_read(disk: StorageDaemon) -> None:
    """Its disk has the same content afterwards, and it takes the next front-end."""
    with disk.image.open("r+b") as image:
        image.write(os.urandom(1 << 20))
    before = disk.image.read_bytes()
    report = passing(disk.socket, "--type", "block")
    assert [one["name"] for one in report["contracts"]] == [one.name for one in CONTRACTS]
    assert not_offered(report) == INTERNAL | UNSEEN
    assert report["device"]["vrings"] == 2
    assert report["summary"]["left"] == "as found"
    assert disk.image.read_bytes() == before
    passing(disk.socket, "--type", "block", "-c", "suspend-stops")


def test_storage_daemon_that_is_written_has_its_content_back(disk: StorageDaemon) -> None:
    size = disk.image.stat().st_size
    with disk.image.open("r+b") as image:
        image.seek(size - 2 * SCRATCH_BLOCKS * BLOCK)
        image.write(os.urandom(2 * SCRATCH_BLOCKS * BLOCK))
    before = disk.image.read_bytes()
    only = [word for name in STOPPED_WHEN_IDLE for word in ("-c", name)]
    report = passing(disk.socket, "--type", "block", "--write", *only)
    assert not_offered(report) == set()
    assert report["summary"]["left"] == "as found"
    assert disk.image.read_bytes() == before


def test_storage_daemon_of_unknown_type_gets_no_requests(disk: StorageDaemon) -> None:
    report = passing(f"vhost-user:{disk.socket}")
    assert not_offered(report) == INTERNAL | UNSEEN | NEED_REQUESTS
    assert report["device"]["vrings"] == 4


def test_disk_that_is_busy_is_an_error(disk: StorageDaemon) -> None:
    with Process([sys.executable, "-c", HOLDER, disk.socket], name="holder") as holder:
        holder.wait_for_output("connected")
        done = conform(disk.socket)
    assert done.returncode == 1
    assert "nobody answered within 3 s" in done.stderr
    assert "Traceback" not in done.stderr


HOLDER = """
import socket, sys
s = socket.socket(socket.AF_UNIX)
s.connect(sys.argv[1])
s.sendall(bytes.fromhex("01000000 01000000 00000000"))  # GET_FEATURES
s.recv(20)
print("connected", flush=True)
sys.stdin.read()
"""


# Files


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Path]:
    """The socket of a virtiofsd, which serves one connection."""
    socket, shared = tmp_path / "fs.sock", tmp_path / "shared"
    shared.mkdir()
    (shared / "file").write_text("content")
    argv = ["virtiofsd", "--shared-dir", str(shared), "--socket-path", str(socket)]
    with peer([*argv, "--sandbox", "none", "--log-level", "info"]) as server:
        server.wait_for_output("Waiting for vhost-user socket connection")
        yield socket
        assert server.wait() == 0


def test_virtiofsd_keeps_all_and_ends_with_the_connection(files: Path) -> None:
    report = passing(files, "--type", "fs")
    assert not_offered(report) == UNSEEN | NEED_REQUESTS
    assert "it can't be opened any more" in report["summary"]["left"]


# Network


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Path]:
    """The socket of a DPDK back-end that sends what it gets back to where it came from."""
    socket = tmp_path / "net.sock"
    memory = ["--no-huge", "--no-pci", "--single-file-segments", "-m", "256", "-l", "0,1"]
    own = ["--file-prefix", f"conform{os.getpid()}", "--vdev", f"net_vhost0,iface={socket}"]
    argv = ["dpdk-testpmd", *memory, *own, "--", "-i", "--auto-start", "--total-num-mbufs=4096"]
    with peer([*argv, "--no-flush-rx"]) as server:
        server.wait_for_output("testpmd>")
        yield socket


def test_dpdk_with_traffic(network: Path) -> None:
    """But for a vring that stops alone, after which DPDK forgets the other now and then."""
    only = [arg for c in CONTRACTS if c.name != "vring-stops" for arg in ("-c", c.name)]
    report = passing(network, "--type", "net", "--traffic", *only)
    assert not_offered(report) == INTERNAL | UNSEEN
    assert report["summary"]["left"] == "as found"


def test_dpdk_without_traffic(network: Path) -> None:
    report = passing(network, "--type", "net")
    assert not_offered(report) == INTERNAL | UNSEEN | NEED_REQUESTS
    reasons = {one["evidence"] for one in report["contracts"] if one["name"] in NEED_REQUESTS}
    assert reasons == {"frames are sent with --traffic only"}


# What can't be checked


def test_nothing_there_is_one_line(tmp_path: Path) -> None:
    done = conform(tmp_path / "none.sock")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") <= 2
    assert "Traceback" not in done.stderr


def test_writing_to_an_unknown_type_is_wrong_usage(disk: StorageDaemon) -> None:
    done = conform(disk.socket, "--write")
    assert done.returncode == 2
    assert "--write is for block devices, this is a device of unknown type" in done.stderr
