"""docs/errors.md has every error message of the sources, and each with cause and cure."""

from __future__ import annotations

import re

from .messages import GAP, ROOT, entries, error_classes, known, logged, raised, words, written

PART = 0.5
ENTRIES = list(entries())
ROWS = [entry.messages for entry in ENTRIES]


def test_every_error_is_in_the_guide() -> None:
    """Put a row into docs/errors.md: what it says, why, and what to do."""
    messages = list(raised())
    assert len(messages) > 150 and len(error_classes()) > 10
    assert sorted(f"{m.place}: {m.text}" for m in messages if not known(m.text, ROWS)) == []


def test_every_warning_of_the_log_is_in_the_guide() -> None:
    messages = list(logged())
    assert len(messages) > 5
    assert sorted(f"{m.place}: {m.text}" for m in messages if not known(m.text, ROWS)) == []


def test_every_entry_is_of_the_sources() -> None:
    """What was reworded there must not stay here. Parts may be filled in or put around it."""
    sources = [(f"… {text} …", set(words(text))) for text in written() if " " in text]
    unknown = []
    for entry in ENTRIES:
        for message in entry.messages:
            mine = set(words(message)) - {GAP}
            near = [(text,) for text, other in sources if len(mine & other) >= len(mine) * PART]
            if not known(message, near, PART):
                unknown.append(f"docs/errors.md:{entry.line}: {message}")
    assert unknown == [], "\n".join(unknown)


def test_every_entry_has_cause_and_cure() -> None:
    poor = [entry.line for entry in ENTRIES if not entry.cause or not entry.cure]
    assert poor == [], "lines of docs/errors.md"


def test_messages_that_guides_quote_are_entries() -> None:
    """In their tables of what goes wrong, behind `log:`."""
    quotes = [
        (f"{path.name}: {quote}", quote)
        for path in sorted((ROOT / "docs/guides").glob("*.md"))
        for log in re.findall(r"(?m)^\| [^|]*log: ([^|]*)", path.read_text())
        for quote in re.findall(r"`([^`]+)`", log)
    ]
    assert len(quotes) > 5
    assert [place for place, quote in quotes if not known(f"… {quote} …", ROWS, 1)] == []


def test_messages_are_told_apart() -> None:
    """The comparison itself: a gap is any words, but most words must be shared."""
    rows = [("vring I wants N entries, DEV has M at most", "NODE: SUSPEND: …")]
    assert known("vring … wants … entries, … has … at most", rows)
    assert not known("vring … wants … entries, … has … at most", [("vring I wants N, …",)])
    assert known("…: SUSPEND: …", rows)
    assert not known("vring … needs …, … takes … at most", rows)
    assert not known("vring … wants … entries", rows)
