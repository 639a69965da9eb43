"""The state stream as it should be: what is written is what is read, now and of every version."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.states import (
    BLOCK,
    EMPTY,
    FILES,
    NET,
    SAMPLES,
    changed,
    read,
    save,
    section,
    stream,
)
from vhostbridge.backends.errors import StateError
from vhostbridge.backends.state import (
    MAX_CHUNK,
    Chunk,
    DeviceState,
    Encoder,
    End,
    Head,
    InflightVring,
    VringState,
)

RELEASED = Path(__file__).parent / "data/states"
U64 = st.integers(0, 2**64 - 1)
NAMES = st.text(st.characters(categories=["L", "N", "P", "Zs"]), min_size=1, max_size=40).filter(
    str.isprintable
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**64), 2**64 - 1) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@st.composite
def states(draw: st.DrawFn) -> DeviceState:
    packed = draw(st.booleans())
    sizes = st.integers(1, 32768) if packed else st.sampled_from([2**n for n in range(16)])
    vrings = tuple(
        VringState(
            index,
            draw(sizes),
            draw(st.integers(0, 2**32 - 1 if packed else 2**16 - 1)),
            draw(st.booleans()),
            *(draw(U64) for _ in range(3)),
        )
        for index in sorted(draw(st.sets(st.integers(0, 1023), max_size=4)))
    )
    heads = [draw(st.lists(st.integers(0, v.size - 1), unique=True, max_size=5)) for v in vrings]
    features = draw(st.integers(0, 2**128 - 1)) & ~(1 << 34) | packed << 34
    return DeviceState(
        transport=draw(st.sampled_from(["vdpa", "vhost-user"])),
        device_id=draw(st.none() | st.integers(0, 2**32 - 1)),
        features=features,
        queue_num=draw(st.integers(0, 65536)),
        config=draw(st.binary(max_size=200)),
        vrings=vrings,
        inflight=tuple(
            InflightVring(v.index, tuple(h)) for v, h in zip(vrings, heads, strict=True) if h
        ),
        control=draw(st.none() | st.dictionaries(st.text(), VALUES, max_size=3)),
        internal_owner=draw(st.none() | NAMES),
        producer=draw(NAMES),
    )


@given(states(), st.lists(st.binary(min_size=1, max_size=3000), max_size=3), st.integers(50, 4000))
def test_what_is_written_is_read_in_whatever_pieces(
    state: DeviceState, chunks: list[bytes], piece: int
) -> None:
    chunks = chunks if state.internal_owner is not None else []
    raw = save(state, chunks)
    head, *middle, end = read(raw, piece)
    assert head == Head(state)
    assert middle == [Chunk(chunk) for chunk in chunks]
    assert isinstance(end, End) and end.size == len(raw)


@given(states())
def test_one_state_has_one_form(state: DeviceState) -> None:
    assert save(state) == save(replace(state)) == save(read(save(state))[0].state)  # type: ignore[union-attr]


def test_a_stream_can_come_byte_by_byte() -> None:
    state, chunks = SAMPLES["files"]
    assert read(save(state, chunks), 1) == read(save(state, chunks))


def test_largest_chunk_passes_unchanged() -> None:
    data = bytes(range(256)) * (MAX_CHUNK // 256)
    assert read(save(FILES, [data]), 65536)[1] == Chunk(data)


@pytest.mark.parametrize("data", [b"", bytes(MAX_CHUNK + 1)])
def test_chunk_of_another_size_is_the_callers_mistake(data: bytes) -> None:
    encoder = Encoder()
    encoder.begin(FILES)
    with pytest.raises(ValueError, match="1 to 1048576 bytes"):
        encoder.internal(data)


def test_internal_state_without_owner_is_the_callers_mistake() -> None:
    encoder = Encoder()
    encoder.begin(BLOCK)
    with pytest.raises(ValueError, match="owner"):
        encoder.internal(b"x")


@pytest.mark.parametrize("name", SAMPLES)
def test_files_of_format_1_0_stay_readable(name: str) -> None:
    raw = (RELEASED / f"1.0-{name}.state").read_bytes()
    state, chunks = SAMPLES[name]
    head, *middle, _ = read(raw)
    assert head == Head(state)
    assert middle == [Chunk(chunk) for chunk in chunks]


@pytest.mark.parametrize("name", SAMPLES)
def test_files_of_format_1_0_are_what_is_written_now(name: str) -> None:
    assert save(*SAMPLES[name]) == (RELEASED / f"1.0-{name}.state").read_bytes()


def test_every_file_of_a_released_version_is_read() -> None:
    assert {path.name for path in RELEASED.iterdir()} == {f"1.0-{name}.state" for name in SAMPLES}


def test_unknown_optional_section_is_passed_over_and_told() -> None:
    extra = {"name": "example.com/x", "critical": False, "anything": [1, b"2", {"3": None}]}

    def change(parts: list[Any]) -> None:
        parts.insert(2, extra)
        parts.insert(-1, {"name": "later", "critical": False})
        parts[0].update(sections=["config", "example.com/x", "vring", "inflight", "later"])
        parts[-1].update(sections=6)

    raw = changed("block", change)
    assert read(raw)[0] == Head(replace(BLOCK, unknown=("example.com/x", "later")))


def test_newer_minor_version_may_have_more_fields() -> None:
    raw = changed(
        "block",
        lambda parts: [
            parts[0].update(version=[1, 3], more=1),
            *(part.update(more=[2]) for part in parts[1:]),
        ],
    )
    assert read(raw)[0] == Head(replace(BLOCK, version=(1, 3)))


def test_what_was_read_from_a_newer_version_is_written_as_ours() -> None:
    newer = replace(BLOCK, version=(1, 3), unknown=("later",))
    assert save(newer) == save(BLOCK)


def test_another_major_version_is_refused_with_both_versions_and_the_producer() -> None:
    # All but the version may be different there.
    raw = stream([{"version": [2, 1], "producer": "vhost-bridge 9", "x": 1}, {"y": 2}])
    with pytest.raises(StateError) as refused:
        read(raw)
    assert "2.1" in refused.value.message and "1.x" in refused.value.message
    assert "vhost-bridge 9" in refused.value.hint


def test_unknown_critical_section_is_refused_by_name() -> None:
    raw = changed("block", lambda parts: parts.insert(1, {"name": "dirty-log", "critical": True}))
    with pytest.raises(StateError) as refused:
        read(raw)
    assert "'dirty-log'" in refused.value.message
    assert BLOCK.producer in refused.value.hint


IMPOSSIBLE = {
    "features beyond 128 bits": replace(BLOCK, features=1 << 128),
    "negative features": replace(BLOCK, features=-1),
    "another transport": replace(BLOCK, transport="pci"),
    "split ring of an odd size": replace(BLOCK, vrings=(replace(BLOCK.vrings[0], size=100),)),
    "split base of 17 bits": replace(BLOCK, vrings=(replace(BLOCK.vrings[0], base=1 << 16),)),
    "vrings in another order": replace(BLOCK, vrings=BLOCK.vrings[::-1]),
    "requests on no vring": replace(BLOCK, vrings=BLOCK.vrings[:1]),
    "a head beyond the ring": replace(BLOCK, inflight=(InflightVring(1, (256,)),)),
    "a head twice": replace(BLOCK, inflight=(InflightVring(1, (5, 5)),)),
    "no heads": replace(BLOCK, inflight=(InflightVring(1, ()),)),
    "an address of 65 bits": replace(NET, vrings=(replace(NET.vrings[0], driver_area=1 << 64),)),
    "an owner on two lines": replace(FILES, internal_owner="a\nb"),
    "a producer without a name": replace(EMPTY, producer=""),
    "control state with a fraction": replace(NET, control={"x": 1.5}),
    "control state with numbers for keys": replace(NET, control={"x": {1: 2}}),
    "control state with an object": replace(NET, control={"x": object()}),
    "configuration of 64 KiB and one": replace(BLOCK, config=bytes(65537)),
    "control state above 1 MiB": replace(NET, control={"x": bytes(1 << 20)}),
}


@pytest.mark.parametrize("state", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_state_that_could_not_be_read_is_not_written(state: DeviceState) -> None:
    with pytest.raises(StateError, match="not a valid device state"):
        Encoder().begin(state)


def test_state_that_is_too_large_to_read_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vhostbridge.backends.state.MAX_HEAD", len(Encoder().begin(BLOCK)) - 1)
    with pytest.raises(StateError, match="larger than"):
        Encoder().begin(BLOCK)


def test_the_helpers_make_the_stream_that_they_take_apart() -> None:
    """So that what the damage tests change is all that is wrong."""
    for name, (state, chunks) in SAMPLES.items():
        assert changed(name, lambda parts: section(parts, "end")) == save(state, chunks)
