"""A file system's own state: saved from one virtiofsd, loaded into another, under one guest."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import pytest

from tests.peers.bridge import Bridge
from tests.peers.guest import Guest, vhost_user_fs
from tests.peers.process import Process, peer
from vhostbridge.backends.errors import InvalidTransition


def virtiofsd(shared: Path, socket: Path, mode: str = "file-handles") -> Process:
    """`mode`: by what the next one finds open files."""
    argv = ["virtiofsd", "--shared-dir", str(shared), "--socket-path", str(socket)]
    more = ["--sandbox", "none", "--log-level", "info", "--cache", "never"]
    return peer([*argv, *more, "--migration-mode", mode, "--modcaps=+dac_read_search"])


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    folder = tmp_path / "shared"
    folder.mkdir()
    (folder / "kept").write_text("kept\n")
    return folder


# Has a file open that has no name any more, and writes the rest when it is told to.
HALF_WRITTEN = (
    "exec 5>/mnt/half; echo first >&5; rm /mnt/half; touch /tmp/half; "
    "while [ ! -e /tmp/go ]; do sleep 0.1; done; echo second >&5; exec 5>&-; touch /tmp/whole"
)


def wait_for(file: str) -> str:
    return f"for i in $(seq 100); do [ -e {file} ] && exit 0; sleep 0.1; done; exit 1"


# An unlinked file lives as long as somebody has it open, and virtiofsd is about to end. Between
# hosts the shared file system keeps it.
def open_unlinked(name: str) -> int:
    for entry in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            if os.readlink(entry).endswith(f"{name} (deleted)"):
                return os.open(entry, os.O_RDONLY)
    raise AssertionError(f"nobody has {name} open")


def test_guest_goes_on_in_a_new_virtiofsd(shared: Path, tmp_path: Path) -> None:
    """A file that the guest has open, half written and unlinked is the same file afterwards."""
    socket, state = tmp_path / "fs.sock", tmp_path / "fs.state"
    listen = tmp_path / "vm.sock"
    with virtiofsd(shared, socket) as first:
        first.wait_for_output("Waiting for vhost-user socket connection")
        with (
            Bridge(f"vhost-user:{socket}", listen=listen, arguments=["--type", "fs"]) as bridge,
            Guest(vhost_user_fs(listen, "shared")) as guest,
        ):
            guest.run("mount -t virtiofs shared /mnt")
            guest.run(f"({HALF_WRITTEN}) >/dev/null 2>&1 & {wait_for('/tmp/half')}")
            unlinked = open_unlinked("half")
            bridge.operate("Suspend")
            bridge.command("save", state)
            first.kill()
            bridge.wait_for_output("waiting for the back-end: ")
            log = len(bridge.output)
            with virtiofsd(shared, socket):
                bridge.wait_for_output("is ready", start=log)
                assert bridge.status().state == "reset"
                bridge.command("load", state)
                assert bridge.operate("Resume") == "running"
                guest.run(f"touch /tmp/go; {wait_for('/tmp/whole')}")
                assert os.pread(unlinked, 100, 0) == b"first\nsecond\n"
                assert guest.run("cat /mnt/kept; echo new >/mnt/new") == "kept"
    os.close(unlinked)
    assert (shared / "new").read_text() == "new\n"


def test_device_with_state_of_its_own_is_not_resumed_without_it(
    shared: Path, tmp_path: Path
) -> None:
    socket, listen = tmp_path / "fs.sock", tmp_path / "vm.sock"
    with virtiofsd(shared, socket) as first:
        first.wait_for_output("Waiting for vhost-user socket connection")
        with (
            Bridge(f"vhost-user:{socket}", listen=listen, arguments=["--type", "fs"]) as bridge,
            Guest(vhost_user_fs(listen, "shared")) as guest,
        ):
            guest.run("mount -t virtiofs shared /mnt")
            bridge.operate("Suspend")
            first.kill()
            bridge.wait_for_output("waiting for the back-end: ")
            log = len(bridge.output)
            with virtiofsd(shared, socket):
                bridge.wait_for_output("is ready", start=log)
                with pytest.raises(InvalidTransition, match="cannot resume a device that is reset"):
                    bridge.operate("Resume")
