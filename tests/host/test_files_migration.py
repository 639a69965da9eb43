"""QEMU to QEMU: a guest takes its open files from one virtiofsd to another, through bridges."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from tests.host.test_model_files import HALF_WRITTEN, virtiofsd, wait_for
from tests.peers import migration
from tests.peers.bridge import Bridge
from tests.peers.guest import Guest, vhost_user_fs

MEMORY = 160


def side(stack: ExitStack, shared: Path, folder: Path) -> Bridge:
    folder.mkdir()
    server = stack.enter_context(virtiofsd(shared, folder / "fs.sock"))
    server.wait_for_output("Waiting for vhost-user socket connection")
    backend = f"vhost-user:{folder / 'fs.sock'}"
    return stack.enter_context(
        Bridge(backend, listen=folder / "vm.sock", arguments=["--type", "fs"])
    )


def guest(bridge: Bridge, *, incoming: bool = False) -> Guest:
    return Guest(vhost_user_fs(bridge.listen, "shared"), memory_mib=MEMORY, incoming=incoming)


def test_open_file_goes_along(tmp_path: Path) -> None:
    """Half written before the move, the other half after it: one file, with both."""
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "kept").write_text("kept\n")
    with ExitStack() as stack:
        first, second = (side(stack, shared, tmp_path / name) for name in "ab")
        source = stack.enter_context(guest(first))
        source.run("mount -t virtiofs shared /mnt")
        script = HALF_WRITTEN.replace("rm /mnt/half; ", "")
        source.run(f"({script}) >/dev/null 2>&1 & {wait_for('/tmp/half')}")
        destination = stack.enter_context(guest(second, incoming=True))
        migration.migrate(source, destination, tmp_path / "migration")
        destination.run(f"touch /tmp/go; {wait_for('/tmp/whole')}")
        assert (shared / "half").read_bytes() == b"first\nsecond\n"
        assert destination.run("cat /mnt/kept; echo new >/mnt/new") == "kept"
    assert (shared / "new").read_text() == "new\n"
