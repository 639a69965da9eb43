"""What the documents say and the code says as well is the same."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from vhostbridge.backends.lifecycle import TRANSITIONS
from vhostbridge.backends.vhostuser.messages import Request
from vhostbridge.bridge.handlers import HANDLERS

ROOT = Path(__file__).parents[2]


def table(path: str) -> Iterator[list[str]]:
    """The rows of a document's tables, headings too, as cells."""
    for line in (ROOT / path).read_text().splitlines():
        if line.startswith("|"):
            yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))]


def test_every_message_is_in_the_protocol_map() -> None:
    named = {name for row in table("docs/protocol-map.md") for name in row[0].split(", ")}
    assert {request.name for request in Request} == named - {"message", "---"}


def test_protocol_map_offers_what_has_a_handler() -> None:
    refused = {
        name
        for row in table("docs/protocol-map.md")
        if "not offered" in row[1] and "forwarded" not in row[2]
        for name in row[0].split(", ")
    }
    assert refused == {request.name for request in Request} - {
        Request(number).name for number in HANDLERS
    }


def test_lifecycle_of_the_documents_is_that_of_the_code() -> None:
    rows = {row[0]: row[1] for row in table("docs/architecture.md") if row[0].isupper()}
    documented = {
        state: [verb for verb in rows[state].partition(";")[0].split(", ") if verb]
        for state in (state.name for state in TRANSITIONS)
    }
    assert documented == {
        state.name: [verb.value for verb in verbs] for state, verbs in TRANSITIONS.items()
    }


@pytest.mark.parametrize(
    "path",
    sorted(str(p.relative_to(ROOT)) for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]),
)
def test_links_between_documents_lead_somewhere(path: str) -> None:
    text = (ROOT / path).read_text()
    links = re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", text)
    assert [link for link in links if not (ROOT / path).parent.joinpath(link).exists()] == []
