"""Every error message that the sources can make, and those of docs/errors.md."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = ("cli", "bridge", "backends")
BASE = "BridgeError"
LONGEST = 400  # characters: longer texts are no messages
LOGGED = ("error", "warning", "exception", "critical")
GAP = "…"
SHARED = 0.7  # of the words of a message must be written out in its entry
# In errors.md these stand for something else: words in capital letters and numbers.
PLACEHOLDER = re.compile(r"[A-Z][A-Z_]*|\d+|…")


@dataclass(frozen=True, slots=True)
class Message:
    """What one place in the sources says; what is filled in is `…`."""

    text: str
    place: str


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of errors.md."""

    messages: tuple[str, ...]
    cause: str
    cure: str
    line: int


@cache
def modules() -> list[tuple[Path, ast.Module]]:
    paths = [path for source in SOURCES for path in sorted((ROOT / source).rglob("*.py"))]
    return [(path, ast.parse(path.read_text())) for path in paths]


@cache
def error_classes() -> frozenset[str]:
    """The names of BridgeError and of all that derive from it."""
    bases = {
        node.name: [ast.unparse(base).rpartition(".")[2] for base in node.bases]
        for _, tree in modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    known = {BASE}
    while more := {name for name, of in bases.items() if known & set(of)} - known:
        known |= more
    return frozenset(known)


def raised() -> Iterator[Message]:
    """What every error says that is made with a text of its own."""
    for path, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and _name(node) in error_classes() and node.args:
                more = ": …" if _name(node) == "KernelRefused" else ""  # the kernel's reason
                for text in texts(node.args[0]):
                    yield Message(text + more, f"{path.relative_to(ROOT)}:{node.lineno}")


def logged() -> Iterator[Message]:
    """What every line of the log says that is a warning or worse."""
    for path, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and node.args and _logs(ast.unparse(node.func)):
                for text in texts(node.args[0]):
                    yield Message(text, f"{path.relative_to(ROOT)}:{node.lineno}")


def _logs(function: str) -> bool:
    owner, _, name = function.rpartition(".")
    return name in LOGGED and "log" in owner.lower()


def written() -> set[str]:
    """Every text of the sources."""
    return {
        text
        for _, tree in modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.expr)
        for text in texts(node)
        if len(text) <= LONGEST
    }


def texts(node: ast.expr) -> Iterator[str]:
    """The texts that an expression may be; nothing for one that comes from elsewhere."""
    match node:
        case ast.Constant(value=str(text)):
            yield text
        case ast.JoinedStr(values=values):
            yield "".join(str(x.value) if isinstance(x, ast.Constant) else GAP for x in values)
        case ast.IfExp(body=one, orelse=other):
            yield from texts(one)
            yield from texts(other)
        case ast.BinOp(left=one, op=ast.Add(), right=other):
            for first in texts(one):
                for second in texts(other):
                    yield first + second


def _name(node: ast.Call) -> str:
    return ast.unparse(node.func).rpartition(".")[2]


def entries() -> Iterator[Entry]:
    """The rows of errors.md, exit codes excepted."""
    for number, line in enumerate((ROOT / "docs/errors.md").read_text().splitlines(), 1):
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == 3 and cells[0] not in ("message", "---"):
            yield Entry(tuple(cells[0].replace("`", "").split("; ")), cells[1], cells[2], number)


@cache
def words(text: str) -> list[str]:
    """The words of a message; what stands for something else is `…`."""
    plain = re.sub(r"%(\.\d+)?[sdrf]", GAP, text).replace("`", "").replace("'", "").replace('"', "")
    spaced = re.sub(r"(…|[\[\]():;,=+#{}/])", r" \1 ", plain)
    found = [GAP if PLACEHOLDER.fullmatch(word) else word for word in spaced.split()]
    return [word for word in found if word == GAP or re.search(r"\w", word)]


def agree(one: list[str], other: list[str]) -> int:
    """How many words two messages share if they can be the same, else -1. A gap is any words."""

    @cache
    def best(i: int, j: int) -> int:
        if i == len(one) and j == len(other):
            return 0
        found = -1
        if i < len(one) and j < len(other) and one[i] == other[j] != GAP:
            found = max(found, plus(best(i + 1, j + 1), 1))
        if i < len(one) and one[i] == GAP:
            found = max(found, best(i + 1, j), best(i, j + 1) if j < len(other) else -1)
        if j < len(other) and other[j] == GAP:
            found = max(found, best(i, j + 1), best(i + 1, j) if i < len(one) else -1)
        return found

    def plus(count: int, more: int) -> int:
        return -1 if count < 0 else count + more

    return best(0, 0)


def known(text: str, rows: Sequence[tuple[str, ...]], shared: float = SHARED) -> bool:
    """Whether a message is one of those: they share most of its words."""
    mine = words(text)
    own = [word for word in mine if word != GAP]
    for other in (words(other) for row in rows for other in row):
        # A look at the words alone is quick.
        if sum(word in other for word in own) >= len(own) * shared and (
            agree(mine, other) >= len(own) * shared
        ):
            return True
    return False
