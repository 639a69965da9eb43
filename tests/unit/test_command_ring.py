"""The driver's side of a control vring, against a model of the device's, and hostile ones."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.control_device import ControlSide
from tests.unit.fakes import device_info
from vhostbridge.backends.errors import TransportLost, Unsupported
from vhostbridge.bridge import command_ring
from vhostbridge.bridge.command_ring import COMMAND_MAX, REPLY_MAX, SIZE, CommandRing
from vhostbridge.native import lib

PACKED = 1 << 34
CTRL_VQ, MQ = 1 << 17, 1 << 22
IOVA = 1 << 45


def new_ring(**changes: object) -> CommandRing:
    return CommandRing(
        device_info(queue_num=4, **changes), IOVA, lambda ring, features, rings: None
    )


@pytest.fixture
def ring() -> Iterator[CommandRing]:
    made = new_ring()
    yield made
    made.close()


@pytest.mark.parametrize("packed", [0, PACKED], ids=["split", "packed"])
@pytest.mark.parametrize("size", [2, 4, 64])
def test_commands_arrive_and_replies_come_back(packed: int, size: int) -> None:
    ring = new_ring(vring_size_max=size)
    setup = ring.renew(CTRL_VQ | packed)
    assert setup.size == size and setup.base == (0x80008000 if packed else 0)

    def answer(command: bytes, room: int) -> bytes:
        return (bytes([0]) + command[::-1])[:room]

    sent = [bytes([1, n % 256]) + b"x" * (n % 300) for n in range(150)]
    with ControlSide(ring, setup, answer, packed=bool(packed)) as device:
        for command in sent:
            assert ring.send(command, len(command) + 1) == b"\0" + command[::-1]
    assert device.commands == sent
    ring.close()


@pytest.mark.parametrize("packed", [0, PACKED], ids=["split", "packed"])
@pytest.mark.parametrize(("largest", "size"), [(3, 2), (48, 32), (1000, 64)])
def test_size_is_a_power_of_two_whatever_the_device_has(
    packed: int, largest: int, size: int
) -> None:
    ring = new_ring(vring_size_max=largest)
    setup = ring.renew(CTRL_VQ | packed)
    assert setup.size == size
    with ControlSide(ring, setup, lambda command, room: command, packed=bool(packed)):
        for number in range(100):
            assert ring.send(bytes([number])) == bytes([number])
    ring.close()


@pytest.mark.parametrize("largest", [0, 1])
def test_device_whose_vrings_have_no_room_for_a_command(largest: int) -> None:
    with pytest.raises(Unsupported, match=f"{largest} descriptors .* a control command takes 2"):
        new_ring(vring_size_max=largest)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=600), max_size=20), st.booleans())
def test_any_bytes_pass_unchanged(commands: list[bytes], packed: bool) -> None:
    ring = new_ring(vring_size_max=8)
    setup = ring.renew(CTRL_VQ | (PACKED if packed else 0))
    with ControlSide(ring, setup, lambda command, room: b"\1", packed=packed) as device:
        assert [ring.send(command) for command in commands] == [b"\1"] * len(commands)
    assert device.commands == commands
    ring.close()


def test_reply_that_the_device_does_not_write_is_no_ack(ring: CommandRing) -> None:
    setup = ring.renew(CTRL_VQ)
    with ControlSide(ring, setup, lambda command, room: b"", packed=False):
        assert ring.send(b"ab") == b"\xff"


def test_place_of_the_control_vring(ring: CommandRing) -> None:
    assert [ring.renew(f).index for f in (CTRL_VQ, CTRL_VQ | MQ, CTRL_VQ)] == [2, 8, 2]


def test_begins_anew_after_a_command_that_was_not_answered(
    ring: CommandRing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_ring, "PATIENCE", 0.02)
    ring.renew(CTRL_VQ)
    with pytest.raises(TransportLost, match="did not answer the control command RX PROMISC"):
        ring.send(b"\0\0\1")
    with pytest.raises(TransportLost, match="still has a control command"):
        ring.send(b"\0\0\1")
    setup = ring.renew(CTRL_VQ)
    monkeypatch.setattr(command_ring, "PATIENCE", 5)
    with ControlSide(ring, setup, lambda command, room: b"\0", packed=False) as device:
        assert ring.send(b"\0\0\0") == b"\0"
    assert device.commands == [b"\0\0\0"]


@pytest.mark.parametrize(("index", "head"), [(2, 0), (1, 1), (1, 64), (0x8000, 0), (1, 0xFFFFFFFF)])
def test_device_that_breaks_the_rules(ring: CommandRing, index: int, head: int) -> None:
    setup = ring.renew(CTRL_VQ)
    used = setup.device_area - IOVA
    with mmap.mmap(ring.region.fd.fileno(), SIZE) as memory:
        memory[used : used + 12] = struct.pack("<HHII", 0, index, head, 1)
        with pytest.raises(TransportLost, match="broke its control vring"):
            ring.send(b"\0\0\1")


def test_packed_device_that_breaks_the_rules(
    ring: CommandRing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A used descriptor that was there before is overwritten; one with another id is an error."""
    monkeypatch.setattr(command_ring, "PATIENCE", 0.02)
    ring.renew(CTRL_VQ | PACKED)
    with mmap.mmap(ring.region.fd.fileno(), SIZE) as memory:
        memory[0:16] = struct.pack("<QIHH", 0, 0, 5, 1 << 7 | 1 << 15)
        with pytest.raises(TransportLost, match="did not answer"):
            ring.send(b"\0\0\1")
        memory[0:16] = struct.pack("<QIHH", 0, 0, 5, 1 << 7 | 1 << 15)
        assert lib.vb_commands_done(ring._handle) < 0


def test_sizes_that_do_not_fit_are_refused(ring: CommandRing) -> None:
    ring.renew(CTRL_VQ)
    for command, room in ((b"", 1), (bytes(COMMAND_MAX + 1), 1), (b"a", 0), (b"a", REPLY_MAX + 1)):
        with pytest.raises(ValueError, match="bytes for a command"):
            ring.send(command, room)


def test_close_releases_everything_once(ring: CommandRing) -> None:
    before = len(os.listdir("/proc/self/fd"))
    made = new_ring()
    made.renew(CTRL_VQ)
    made.close()
    made.close()
    assert len(os.listdir("/proc/self/fd")) == before
