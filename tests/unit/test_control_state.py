"""What is learned from control commands, in any order and from hostile guests, and told again."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vhostbridge.backends.errors import StateError
from vhostbridge.backends.state import Decoder, DeviceState, Encoder, Head
from vhostbridge.bridge.control_state import ControlState, refusal

ALL = (1 << 64) - 1
MAC = bytes.fromhex("525400123456")
OTHER = bytes.fromhex("0180c2000001")


def u16(value: int) -> bytes:
    return value.to_bytes(2, "little")


def u32(value: int) -> bytes:
    return value.to_bytes(4, "little")


def table(*addresses: bytes) -> bytes:
    return u32(len(addresses)) + b"".join(addresses)


def rss(queues: int = 4, key: int = 40) -> bytes:
    return u32(0x3F) + u16(queues - 1) + u16(0) + u16(1) * queues + u16(queues) + bytes(
        [key]
    ) + bytes(key)  # fmt: skip


COMMANDS = {
    "RX": [bytes((0, mode, on)) for mode in range(6) for on in (0, 1)],
    "MAC": [
        b"\1\1" + MAC,
        b"\1\1" + OTHER,
        b"\1\0" + table(MAC, OTHER) + table(),
        b"\1\0" + table() + table(OTHER),
    ],
    "VLAN": [bytes((2, way)) + u16(vlan) for way in (0, 1) for vlan in (0, 7, 4095)],
    "MQ": [
        *(b"\4\0" + u16(pairs) for pairs in (1, 2, 0x8000)),
        *(b"\4\1" + rss(queues) for queues in (1, 2, 128)),
        b"\4\2" + u32(1) + bytes(8) + b"\2ab",
    ],
    "OFFLOADS": [b"\5\0" + bytes(8), b"\5\0" + b"\xff" * 8],
    "COAL": [
        *(bytes((6, kind)) + u32(kind) + u32(9) for kind in (0, 1)),
        *(b"\6\2" + u16(vring) + bytes(2) + u32(5) + u32(6) for vring in (0, 1, 6)),
    ],
    "TUNNEL": [b"\7\0" + u32(3)],
    "no state": [b"\3\0", b"\6\3" + u32(1), b"\x08\0", b"\x08\1" + bytes(32)],
}
VALID = st.sampled_from([command for some in COMMANDS.values() for command in some])


def told(commands: Iterable[bytes]) -> ControlState:
    state = ControlState()
    for command in commands:
        assert refusal(command, ALL) == "", command.hex()
        state = state.after(command)
    return state


def replayed(state: ControlState) -> list[bytes]:
    return list(state.commands(ALL))


@settings(deadline=None)
@given(st.lists(VALID, max_size=40))
def test_what_is_told_again_leads_to_the_same(commands: list[bytes]) -> None:
    state = told(commands)
    again = told(replayed(state))
    assert again == state
    assert replayed(again) == replayed(state)


@settings(deadline=None)
@given(st.lists(VALID, max_size=40))
def test_state_survives_its_stream(commands: list[bytes]) -> None:
    state = told(commands)
    mapping = state.to_mapping()
    assert ControlState.from_mapping(mapping) == state
    saved = DeviceState("vdpa", 1, ALL, 4, b"", (), control=mapping or None)
    encoder, decoder = Encoder(), Decoder()
    (head, *_) = decoder.feed(encoder.begin(saved) + encoder.end())
    assert isinstance(head, Head)
    assert ControlState.from_mapping(head.state.control or {}) == state


@settings(deadline=None, max_examples=500)
@given(
    st.one_of(
        st.binary(max_size=80),
        st.builds(
            lambda kind, data: kind + data,
            st.sampled_from([bytes((k, c)) for k in range(9) for c in range(7)]),
            st.binary(max_size=80),
        ),
        st.builds(lambda command, cut: command[:cut], VALID, st.integers(0, 60)),
        st.builds(lambda command, more: command + more, VALID, st.binary(min_size=1)),
    )
)
def test_any_bytes_are_refused_or_can_be_told_again(command: bytes) -> None:
    if refusal(command, ALL):
        return
    state = ControlState().after(command)
    assert told(replayed(state)) == state
    assert ControlState.from_mapping(state.to_mapping()) == state


def test_order_is_that_of_qemu() -> None:
    state = told(
        [
            b"\2\0" + u16(5), b"\2\0" + u16(3), b"\0\4\1", b"\0\1\1", b"\0\0\0", b"\5\0" + bytes(8),
            b"\4\0" + u16(3), b"\1\0" + table(MAC) + table(OTHER), b"\1\1" + MAC,
        ]
    )  # fmt: skip
    assert replayed(state) == [
        b"\1\1" + MAC, b"\1\0" + table(MAC) + table(OTHER), b"\4\0" + u16(3), b"\5\0" + bytes(8),
        b"\0\0\0", b"\0\1\1", b"\0\4\1", b"\2\0" + u16(3), b"\2\0" + u16(5),
    ]  # fmt: skip


def test_last_of_each_counts() -> None:
    state = told([b"\0\0\1", b"\0\0\0", b"\2\0" + u16(9), b"\2\1" + u16(9), b"\4\1" + rss()])
    assert replayed(state) == [b"\4\1" + rss(), b"\0\0\0"]
    assert replayed(state.after(b"\4\0" + u16(2))) == [b"\4\0" + u16(2), b"\0\0\0"]


@pytest.mark.parametrize(
    ("command", "features", "why"),
    [
        (b"", ALL, "none that is known"),
        (b"\0", ALL, "none that is known"),
        (b"\x09\0", ALL, "none that is known"),
        (b"\0\0", ALL, "0 bytes are not its data"),
        (b"\0\0\1\1", ALL, "2 bytes are not its data"),
        (b"\1\1" + MAC[:5], ALL, "5 bytes are not its data"),
        (b"\1\0" + table(MAC), ALL, "10 bytes are not its data"),
        (b"\1\0" + u32(0xFFFFFFFF) + table(), ALL, "8 bytes are not its data"),
        (b"\2\0" + u16(4096), ALL, "2 bytes are not its data"),
        (b"\4\0" + u16(0), ALL, "2 bytes are not its data"),
        (b"\4\0" + u16(0x8001), ALL, "2 bytes are not its data"),
        (b"\4\1" + rss(3), ALL, "are not its data"),
        (b"\4\1" + rss()[:-1], ALL, "are not its data"),
        (b"\4\0" + u16(2), ALL & ~(1 << 22), "MQ was not negotiated"),
        (b"\0\2\1", 1 << 18, "CTRL_RX_EXTRA was not negotiated"),
    ],
)
def test_refused(command: bytes, features: int, why: str) -> None:
    assert why in refusal(command, features)


@pytest.mark.parametrize(
    "control",
    [
        {"new": 1},
        {"mac": b"12345"},
        {"mac": 5},
        {"pairs": 0},
        {"pairs": 1 << 40},
        {"pairs": 2, "rss": rss()},
        {"unicast": [MAC]},
        {"unicast": [MAC[:5]], "multicast": []},
        {"unicast": 5, "multicast": []},
        {"rx": {"everything": True}},
        {"rx": {"promisc": 7}},
        {"rx": 1},
        {"vlans": [5, 3]},
        {"vlans": [5000]},
        {"vlans": ["a"]},
        {"offloads": -1},
        {"coalescing": [b"\0\0\1"]},
        {"coalescing": [b"\6\0"]},
        {"hash": b""},
        {"tunnel": None},
    ],
)
def test_section_that_is_none(control: dict[str, object]) -> None:
    with pytest.raises(StateError, match="control section can't be told"):
        ControlState.from_mapping(control)


def test_report_has_only_what_there_is() -> None:
    assert ControlState().report() == {}
    state = told([b"\1\1" + MAC, b"\0\0\1", b"\0\1\0", b"\2\0" + u16(5), b"\4\0" + u16(2)])
    assert state.report() == {
        "mac": "52:54:00:12:34:56", "pairs": "2", "rx": "promisc", "vlans": "1"
    }  # fmt: skip
