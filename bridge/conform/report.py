"""Outcomes for JSON and for people."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from vhostbridge.bridge.render import table

from .outcome import Conformance, Outcome, Result
from .runner import AS_FOUND

_WIDTH = 96


def conform_report(conformance: Conformance) -> dict[str, object]:
    """The stable form for JSON: keys are never renamed, later versions may add some."""
    subject = conformance.subject
    return {
        "target": subject.target,
        "transport": subject.transport,
        "device": subject.facts,
        "contracts": [
            {
                "name": one.name,
                "statement": one.statement,
                "result": one.result.value,
                "evidence": one.evidence,
                "seconds": one.seconds,
            }
            for one in conformance.outcomes
        ],
        "summary": {
            **{one.value: conformance.count(one) for one in Result},
            "left": conformance.left,
        },
    }


def conform_text(conformance: Conformance) -> Iterator[str]:
    """The lines of ``vhost-bridge conform``: the table, then each fail with its evidence."""
    subject = conformance.subject
    kind = subject.facts.get("type") or "device of unknown type"
    yield f"{subject.target}: {kind} on {subject.transport}, {subject.facts.get('vrings')} vrings"
    yield ""
    yield from table(("CONTRACT", "RESULT", "SECONDS"), map(_row, conformance.outcomes))
    yield ""
    for outcome in conformance.outcomes:
        if outcome.result is Result.FAIL:
            yield from _explain(outcome)
    yield from _reasons(conformance)
    counts = (f"{n} {one.value}" for one in Result if (n := conformance.count(one)))
    yield (
        f"{', '.join(counts)}; the device was left {conformance.left}"
        if (conformance.left == AS_FOUND)
        else f"{', '.join(counts)}; the device is not as it was: {conformance.left}"
    )


def _row(outcome: Outcome) -> tuple[str, str, str]:
    shown = outcome.result.value
    if outcome.result is Result.FAIL:
        shown = shown.upper()
    return (outcome.name, shown, f"{outcome.seconds:.2f}")


def _explain(outcome: Outcome) -> Iterator[str]:
    yield f"FAIL {outcome.name}: {outcome.statement}"
    yield from _wrapped(outcome.evidence)
    yield ""


# One reason often holds for several contracts.
def _reasons(conformance: Conformance) -> Iterator[str]:
    reasons: dict[str, list[str]] = {}
    for outcome in conformance.outcomes:
        if outcome.result in (Result.NOT_OFFERED, Result.NOT_RUN):
            reasons.setdefault(outcome.evidence, []).append(outcome.name)
    for reason, names in reasons.items():
        yield from _wrapped(f"{', '.join(names)}: {reason}", "")
    if reasons:
        yield ""


def _wrapped(text: str, indent: str = "  ") -> Iterator[str]:
    yield from textwrap.wrap(
        text, _WIDTH, initial_indent=indent, subsequent_indent="  ", break_on_hyphens=False
    )
