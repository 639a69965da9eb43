"""What the documents say and the code says as well is the same."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from vhostbridge.backends.lifecycle import TRANSITIONS
from vhostbridge.backends.vhostuser.messages import Request
from vhostbridge.bridge.handlers import HANDLERS

ROOT = Path(__file__).parents[2]
SOURCES = ("cli", "bridge", "backends")
# What stands for something else in a message of errors.md: capital letters, numbers, dots.
PLACEHOLDER = re.compile(r"\b[A-Z][A-Z_]*\b|\b\d+\b|…|[()\[\]'`,]")


def table(path: str) -> Iterator[list[str]]:
    """The rows of a document's tables, headings too, as cells."""
    for line in (ROOT / path).read_text().splitlines():
        if line.startswith("|"):
            yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))]


def source_texts() -> Iterator[str]:
    """Every string of the product; what is filled in is a gap."""
    for source in SOURCES:
        top = ROOT / source
        for path in [top] if top.is_file() else top.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value
                elif isinstance(node, ast.JoinedStr):
                    parts = (p.value if isinstance(p, ast.Constant) else "\0" for p in node.values)
                    yield "".join(map(str, parts))


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


def test_messages_of_the_error_guide_are_those_of_the_code() -> None:
    texts = "\n".join(source_texts())
    guide = [row[0] for row in table("docs/errors.md") if not row[0].isdecimal()]
    fragments = [
        fragment.strip(" :;.-")
        for message in guide
        for part in message.split("; ")
        for fragment in PLACEHOLDER.split(part)
    ]
    skipped = {"exit code", "message"}
    unknown = [f for f in fragments if len(f) > 7 and f not in skipped and f not in texts]
    assert unknown == []


@pytest.mark.parametrize(
    "path", sorted(str(p.relative_to(ROOT)) for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
)
def test_links_between_documents_lead_somewhere(path: str) -> None:
    text = (ROOT / path).read_text()
    links = re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", text)
    assert [link for link in links if not (ROOT / path).parent.joinpath(link).exists()] == []
