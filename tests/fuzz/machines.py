"""The hypothesis machines for as long as one wants: ``python -m tests.fuzz.machines SECONDS``."""

from __future__ import annotations

import sys
import time
import warnings

from hypothesis import HealthCheck, given, settings

from tests.fuzz.session_machine import Step, run, steps


def main() -> None:
    """Play new programs until the time is over; the first that fails is printed, shrunk."""
    warnings.simplefilter("error")
    until = time.monotonic() + float(sys.argv[1])
    played = 0

    @settings(
        max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(program=steps)
    def play(program: list[Step]) -> None:
        nonlocal played
        played += 1
        run(program)

    while time.monotonic() < until:
        play()
    print(f"{played} programs played")


if __name__ == "__main__":
    main()
