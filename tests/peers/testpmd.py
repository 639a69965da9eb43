"""DPDK's testpmd: a port of ours and a port of files, frames going from each to the other."""

from __future__ import annotations

import random
import secrets
import struct
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

from tests.rig.root import peer_argv

from .process import Process

READY = "Checking link statuses"
PROMPT = "testpmd> "


class Testpmd(Process):
    """Forwards what `incoming` files have to `vdev`, and what comes from there to files.

    There is one incoming file a queue, and `outgoing` has as many. It waits for memory of its own
    only, no huge pages; its threads spin on one processor while it forwards.
    """

    __test__ = False  # its name begins as a test's does

    def __init__(self, vdev: str, incoming: Sequence[Path], *, processor: int) -> None:
        self.outgoing = [path.with_suffix(".out") for path in incoming]
        files = [f"rx_pcap={path}" for path in incoming]
        files += [f"tx_pcap={path}" for path in self.outgoing]
        argv = testpmd(vdev, f"net_pcap0,{','.join(files)}", len(incoming), processor)
        super().__init__(argv, name=f"testpmd {vdev[:12]}")
        self._seen = 0

    def __enter__(self) -> Self:
        try:
            self.wait_for_output(READY, 60)
            self._wait_for_prompt()
            self._set_up()
        except BaseException:
            self.kill()
            raise
        return self

    # A ring that is full is waited for: a frame is lost only by those under test.
    def _set_up(self) -> None:
        self.tell("set fwd io retry")
        self.tell("set burst tx delay 50 retry 100000")

    def tell(self, command: str) -> None:
        """Give a command and wait until it is done: one that comes sooner may be lost."""
        self._seen = len(self.output)
        self.send(f"{command}\n")
        self._wait_for_prompt()

    # Its log, which goes to the same place, tears prompts apart at times.
    def _wait_for_prompt(self) -> None:
        with suppress(AssertionError):
            self.wait_for_output(PROMPT, 2, start=self._seen)


class Uplink(Testpmd):
    """Forwards between `vdev` and a network interface in the network namespace at `place`.

    Frames that the one or the other has no room for are lost, as on any network.
    """

    def __init__(self, vdev: str, interface: str, place: Path, *, processor: int) -> None:
        pcap = f"net_pcap0,rx_iface_in={interface},tx_iface={interface}"
        argv = ["nsenter", f"--net={place}", *testpmd(vdev, pcap, 1, processor)]
        Process.__init__(self, argv, name=f"testpmd {interface}")
        self._seen = 0

    def _set_up(self) -> None:
        self.tell("set fwd io")


class Echo(Testpmd):
    """Sends every frame that `vdev` has back there, as far as there is room for it."""

    def __init__(self, vdev: str, *, processor: int) -> None:
        argv = testpmd(vdev, None, 1, processor)
        Process.__init__(self, argv, name="testpmd echo")
        self._seen = 0

    def _set_up(self) -> None:
        self.tell("set fwd io")
        self.tell("start")


def testpmd(vdev: str, other: str | None, queues: int, processor: int) -> list[str]:
    """The command that forwards between two virtual devices, or back to the one."""
    # A thread for each direction of each queue: one that waits for a full ring must not keep
    # another from emptying one, or both programs wait for each other.
    threads = 2 * queues
    lcores = ",".join(f"{i}@{processor}" for i in range(1 + threads))
    argv = [
        *("dpdk-testpmd", "--no-huge", "--no-pci", "--single-file-segments", "-m", "256"),
        *(f"--file-prefix={secrets.token_hex(4)}", "--lcores", lcores),
        *("--vdev", vdev, *(("--vdev", other) if other else ()), "--"),
        *("-i", "--no-flush-rx", "--total-num-mbufs=8192"),
        *(() if other else ("--port-topology=loop",)),
        *(f"--rxq={queues}", f"--txq={queues}", f"--nb-cores={threads}"),
    ]
    return peer_argv(argv, die_with_parent=True)


def frame(number: int, salt: int = 0) -> bytes:
    """Frame `number`: 60 to 1400 bytes with content that no other one has."""
    source = random.Random(f"{salt}/{number}")
    body = struct.pack(">II", salt, number) + source.randbytes(source.randint(38, 1380))
    return b"\xff" * 6 + bytes.fromhex("525400112233") + b"\x88\xb5" + body


def write_frames(path: Path, frames: Sequence[bytes]) -> None:
    """Write a capture file."""
    records = [struct.pack("<IIII", 0, i, len(x), len(x)) + x for i, x in enumerate(frames)]
    head = struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 1)
    path.write_bytes(head + b"".join(records))


def read_frames(path: Path) -> list[bytes]:
    """The whole frames of a capture file, which may be still growing."""
    data = memoryview(path.read_bytes())[24:] if path.exists() else memoryview(b"")
    frames = []
    while len(data) >= 16:
        (size,) = struct.unpack_from("<I", data, 8)
        if len(data) < 16 + size:
            break
        frames.append(bytes(data[16 : 16 + size]))
        data = data[16 + size :]
    return frames
