"""The schema of docs/device-state.cddl accepts what is written, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cbor2
import pytest
from cddl_verifier import Validator
from hypothesis import given, settings

from tests.unit.states import BLOCK, FILES, SAMPLES, changed, items, save, stream
from tests.unit.test_state import RELEASED, states
from tests.unit.test_state_damage import BLOCK_FAULTS, INTERNAL_FAULTS, Parts
from vhostbridge.backends.state import FORMAT_VERSION, LABEL, DeviceState

SCHEMA = Validator(Path(__file__).parents[2] / "docs/device-state.cddl")
# What lies in how items relate to each other is for device-state.md to say.
BEYOND_A_SCHEMA = {
    "too few vrings",
    "wrong section list",
    "vring missing",
    "vring twice",
    "vrings in another order",
    "layout not negotiated",
    "producer with an escape",
    "head beyond the ring",
    "head twice",
    "inflight of no vring",
    "too many sections",
    "bytes of internal state",
    "chunk missing",
}


def accepts(raw: bytes) -> bool:
    """Whether the array of a stream's items is one by the schema."""
    count = 1 + len(items(raw))
    array_head = cbor2.dumps([0] * count)[:-count]
    return bool(SCHEMA.validate(array_head + raw, root_type="device-state").valid)


@pytest.mark.parametrize("path", sorted(RELEASED.iterdir()), ids=lambda path: path.name)
def test_schema_accepts_files_of_released_versions(path: Path) -> None:
    assert accepts(path.read_bytes())


@settings(max_examples=30, deadline=None)
@given(states())
def test_schema_accepts_whatever_is_written(state: DeviceState) -> None:
    assert accepts(save(state, [b"1", b"2"] if state.internal_owner is not None else []))


def test_schema_accepts_the_largest_chunk_and_optional_sections_of_others() -> None:
    assert accepts(save(FILES, [bytes(1 << 20)]))
    extra = {"name": "example.com/x", "critical": False, "more": [{"a": b""}]}
    assert accepts(changed("block", lambda parts: parts.insert(3, extra)))


@pytest.mark.parametrize(
    ("sample", "change"),
    [
        *(("block", f) for name, (f, _) in BLOCK_FAULTS.items() if name not in BEYOND_A_SCHEMA),
        *(("files", f) for name, (f, _) in INTERNAL_FAULTS.items() if name not in BEYOND_A_SCHEMA),
    ],
    ids=[name for name in [*BLOCK_FAULTS, *INTERNAL_FAULTS] if name not in BEYOND_A_SCHEMA],
)
def test_schema_rejects_what_the_decoder_refuses(
    sample: str, change: Callable[[Parts], object]
) -> None:
    assert not accepts(changed(sample, change))


@pytest.mark.parametrize("name", SAMPLES)
def test_schema_rejects_every_field_that_is_missing_or_of_another_type(name: str) -> None:
    whole = items(save(*SAMPLES[name]))
    wrong = {bool: 7, int: "7", str: 7, bytes: "x", list: 7, dict: 7}
    for at, item in enumerate(whole):
        for key in item if isinstance(item, dict) else ():
            without = {k: v for k, v in item.items() if k != key}
            others: list[dict[str, Any]] = [item | {key: wrong[type(item[key])]}]
            others += [] if key == "device_id" else [without]
            for other in others:
                assert not accepts(plain([*whole[:at], other, *whole[at + 1 :]])), (at, key)


def plain(parts: list[Any]) -> bytes:
    """A stream whose digest is left as it is."""
    return stream([*parts, None])[:-1]


def test_schema_rejects_another_label() -> None:
    raw = save(BLOCK)
    assert not accepts(raw.replace(b"vbds", b"vbdt", 1)) and not accepts(raw[len(LABEL) :])


def test_guide_and_schema_are_of_the_version_that_is_written() -> None:
    version = ".".join(map(str, FORMAT_VERSION))
    docs = Path(__file__).parents[2] / "docs"
    assert f"This is format **{version}**." in (docs / "device-state.md").read_text()
    assert f"format {version}:" in (docs / "device-state.cddl").read_text()
