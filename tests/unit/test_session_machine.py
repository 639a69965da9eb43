"""A session and a front-end that sends anything: see ``tests.fuzz.session_machine``."""

from __future__ import annotations

from hypothesis import given, settings

from tests.fuzz.session_machine import Step, run, steps


@given(program=steps)
@settings(max_examples=150)
def test_session_survives_any_front_end(program: list[Step]) -> None:
    """It ends with an error for the front-end or goes on; the device is left reset and empty, no
    descriptor stays open."""
    run(program)
