"""Rates of vrings from what is known of them at several moments."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tests.unit.controlled import FakeBridge
from vhostbridge.bridge.rates import Rate, rates
from vhostbridge.bridge.status import BridgeStatus
from vhostbridge.bridge.status_text import status_report, status_text


def at(moment: float, *, shadow: str = "", **vring: int | None) -> list[BridgeStatus]:
    status = FakeBridge().status()
    (known,) = status.vrings
    return [
        replace(
            status,
            moment=moment,
            shadow=shadow,
            vrings=(replace(known, **vring),),  # type: ignore[arg-type]
        )
    ]


def test_index_that_goes_on_is_a_rate_also_past_its_end() -> None:
    assert rates(at(1, used=100), at(1.5, used=600)) == {("vm1", 0): Rate(1000)}
    assert rates(at(1, used=65500), at(2, used=64)) == {("vm1", 0): Rate(100)}


@pytest.mark.parametrize("per_second", [0, 3, 20_000, 700_000])
def test_look_long_before_makes_it_exact(per_second: int) -> None:
    before, first, second = (at(t, used=int(t * per_second) % 65536) for t in (10.0, 12.0, 12.05))
    (rate,) = rates(first, second, before).values()
    assert rate.requests == pytest.approx(per_second, rel=1e-3, abs=0.6)


def test_shadow_vrings_tell_more() -> None:
    first = at(1, shadow="x", requests=5, bytes=1000, kicks=2, calls=1)
    second = at(3, shadow="x", requests=9, bytes=9000, kicks=4, calls=2)
    assert rates(first, second) == {("vm1", 0): Rate(2, 4000, 1, 0.5)}


def test_nothing_is_told_where_nothing_is_known() -> None:
    assert rates(at(1, used=None), at(2, used=5)) == {}
    assert rates(at(2, used=1), at(2, used=5)) == {}
    assert rates([], at(2, used=5)) == {}
    assert rates(at(1, shadow="x", requests=9), at(2, shadow="x", requests=5)) == {}


def test_columns_are_those_of_what_is_known() -> None:
    (status,) = at(1, used=5)
    head, row = list(status_text([status], {("vm1", 0): Rate(4.25)}))[-2:]
    assert head.split()[-2:] == ["FLIGHT", "REQUESTS/S"] and row.split()[-1] == "4.2"
    lines = list(status_text([status], {("vm1", 0): Rate(12345, 5 << 20, 7, 0)}))
    assert lines[-1].split()[-5:] == ["12345", "5.0", "Mi", "7.0", "0"]
    assert "REQUESTS/S" not in list(status_text([status], {}))[-2]


def test_json_has_rates_and_is_json() -> None:
    (status,) = at(1, used=5)
    report = json.loads(json.dumps(status_report(status, {("vm1", 0): Rate(2)})))
    assert report["vrings"][0]["rate"] == {
        "requests": 2, "bytes": None, "kicks": None, "calls": None,
    }  # fmt: skip
