"""One fuzzer of Python code: ``python -m tests.fuzz.target HARNESS [libFuzzer's options]``."""

from __future__ import annotations

import sys

import atheris


def main() -> None:
    """Fuzz until libFuzzer ends the process."""
    with atheris.instrument_imports(include=["vhostbridge"]):
        from tests.fuzz.harnesses import HARNESSES
    run, longest = HARNESSES[sys.argv[1]]
    atheris.Setup([sys.argv[0], f"-max_len={longest}", *sys.argv[2:]], run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
