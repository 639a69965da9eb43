"""A traced bridge between real peers: what its trace says is what was on the wire."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

from tests.peers import blkio
from tests.peers.bridge import COMMAND, ENVIRONMENT, Bridge
from tests.peers.process import Process, eventually
from tests.peers.storage import StorageDaemon
from tests.peers.tap import Heard, Tap
from vhostbridge.backends.vhostuser.messages import BackendRequest, Request
from vhostbridge.backends.vhostuser.specs import BACKEND_SPECS, FRONTEND_SPECS
from vhostbridge.backends.vhostuser.tracing import Lane, sent
from vhostbridge.backends.virtio import DeviceId
from vhostbridge.bridge.trace.entry import Entry
from vhostbridge.bridge.trace.reader import read

SIZE = 4 << 20
Said = tuple[str, bool, bool, int, object]


def entries(path: Path) -> list[Entry]:
    return [entry for entry, _ in read(str(path), note=lambda text: None)]


def traced(found: list[Entry], sender: str, receiver: str, *, reverse: bool) -> list[Said]:
    """Name, reply, need_reply, descriptors and fields of each message one way, in order."""
    return [
        (e.name, e.reply, e.need_reply, e.fds, e.fields)
        for e in found
        if (e.kind, e.sender, e.receiver, e.reverse) == ("message", sender, receiver, reverse)
        for _ in range(e.repeat)
    ]


def heard(wire: list[tuple[bytes, int]], *, reverse: bool) -> list[Said]:
    """The same of what went over a wire."""
    names = BackendRequest if reverse else Request
    lane = Lane("x", BACKEND_SPECS if reverse else FRONTEND_SPECS, replies=True)
    said: list[Said] = []
    for data, fds in wire:
        request, flags, _ = struct.unpack_from("=III", data)
        (record,) = sent(DeviceId.BLOCK, lane, data, fds)
        name = names(request).name
        said.append((name, bool(flags & 4), bool(flags & 8), fds, record.get("fields", {})))
    return said


def agree(found: list[Entry], peer: str, main: Heard, reverse: Heard, *, towards: bool) -> None:
    """The trace has what was heard between the bridge and a peer; ``towards``: it is a back-end."""
    for wire, backward in ((main, False), (reverse, True)):
        out, into = (wire.forward, wire.backward) if towards else (wire.backward, wire.forward)
        for ends, messages in ((("bridge", peer), out), ((peer, "bridge"), into)):
            expected = heard(messages, reverse=backward)
            assert traced(found, *ends, reverse=backward) == expected, (ends, backward)


def test_trace_is_what_went_over_every_wire(disk: StorageDaemon, tmp_path: Path) -> None:
    """Front-end, back-end and both reverse channels, each way, in order, field by field.

    The front-end is another bridge: it wants to hear of configuration changes.
    """
    path, size = tmp_path / "t.trace", disk.image.stat().st_size
    sockets = {name: tmp_path / name for name in ("vm", "outer", "inner", "before", "behind")}
    with (
        Tap(sockets["behind"], disk.socket) as behind,
        Bridge(
            f"vhost-user:{sockets['behind']}",
            name="inner",
            listen=sockets["inner"],
            arguments=["--trace", path, "--type", "block"],
        ) as inner,
        Tap(sockets["before"], sockets["inner"]) as before,
        Bridge(f"vhost-user:{sockets['before']}", name="outer", listen=sockets["outer"]) as outer,
    ):
        with blkio.start(sockets["outer"], "write-read", size=SIZE, seconds=600) as client:
            client.wait_for_output(blkio.RUNNING)
            inner.wait_for_output("running vrings")
            inner.operate("Suspend")
            inner.operate("Resume")
            disk.resize(size * 2)
            eventually(lambda: bool(before.reverse.backward), "the change is told")
            client.kill()
        outer.wait_for_departures(1)
        outer.stop()
        inner.wait_for_departures(1)
        inner.stop()
        found = entries(path)
        agree(found, "front-end", before.main, before.reverse, towards=False)
        agree(found, f"back-end vhost-user:{sockets['behind']}", behind.main, behind.reverse,
              towards=True)  # fmt: skip
        assert len(behind.main.forward) > 30 and len(before.main.forward) > 20
        assert [BackendRequest(d[0]).name for d, _ in behind.reverse.backward] == [
            "CONFIG_CHANGE_MSG"
        ]
    states = [(e.fields or {})["now"] for e in found if e.name == "state"]
    assert [s for s in states if s in ("running", "suspended")] == [
        *("running", "suspended", "running", "suspended")
    ]
    assert any(e.name == "pause" and e.fields and e.fields["reason"] == "operator" for e in found)
    assert all(e.bridge == "inner" for e in found if e.kind == "message")


def test_trace_of_a_killed_daemon_is_whole_and_tells_nothing_of_the_guest(
    disk: StorageDaemon, tmp_path: Path
) -> None:
    """Also through shadow vrings, which see every request."""
    path = tmp_path / "t.trace"
    options: dict[str, object] = {"size": SIZE, "seed": 5}
    socket = tmp_path / "vm"
    argv: list[str | Path] = [
        "serve",
        "--name",
        "b",
        "--listen",
        socket,
        "--backend",
        f"vhost-user:{disk.socket}",
    ]
    argv += ["--no-control", "--shadow", "--trace", path]
    with Process([COMMAND, *argv], env=ENVIRONMENT) as bridge:
        bridge.wait_for_output("serving ")
        blkio.run(socket, "fill", **options)
        eventually(lambda: b" left" in path.read_bytes(), "it is written")
        bridge.kill()
        found = entries(path)
        assert str((found[-1].fields or {})["text"]).endswith("left")
        assert "shadow-on" in [e.name for e in found]
        assert {"SET_OWNER", "SET_VRING_KICK"} <= {e.name for e in found if e.sender == "front-end"}
        raw, image = path.read_bytes(), disk.image.read_bytes()
        for offset in (0, 4096 * 7 + 100, SIZE - 16):
            block = image[offset : offset + 16]
            assert any(block) and block not in raw and block.hex().encode() not in raw
        assert path.stat().st_mode & 0o777 == 0o600
        done = subprocess.run(
            [COMMAND, "trace", "show", path, "--html", tmp_path / "t.html"], capture_output=True
        )
        assert (done.returncode, done.stderr) == (0, b"")
