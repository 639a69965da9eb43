"""Every input that a fuzzer of Python code begins with, once: also those that were findings."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.harnesses import HARNESSES

CORPUS = Path(__file__).parents[1] / "fuzz/corpus"


@pytest.mark.parametrize("name", HARNESSES)
def test_corpus_has_nothing_new_to_find(name: str) -> None:
    run, _ = HARNESSES[name]
    inputs = sorted((CORPUS / name).iterdir())
    assert inputs
    for path in inputs:
        run(path.read_bytes())


def test_corpora_stay_small() -> None:
    """Everybody who clones the project has them."""
    sizes = [path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()]
    assert sum(sizes) < 300 << 10
