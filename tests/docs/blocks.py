"""The fenced blocks of the documents, and the commands in them. Python's library only: the virtual
machine reads its guides by this too.

=========  ================================================================================
language   what it is
=========  ================================================================================
sh         commands of a host, one a line; a backslash at its end goes on, `#` begins a comment
console    commands after a prompt, each followed by what it prints (`…` stands for anything)
qemu       options for QEMU's command line
toml, xml  a file that is named in the text before it
others     no command: text, json, yaml, python, magic
=========  ================================================================================
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

COMMANDS = ("sh", "console", "qemu")
FILES = ("toml", "xml", "ini")
OTHERS = ("text", "json", "python", "magic", "c", "yaml")
PROMPTS = {"$ ": "host", "guest# ": "guest", "(qemu) ": "qemu", "testpmd> ": "testpmd"}


@dataclass(frozen=True, slots=True)
class Command:
    """One command as it is written, its lines joined."""

    text: str
    where: str  # host, guest (in the virtual machine that is served), qemu (its monitor), testpmd
    place: str  # file:line, for people
    output: str = ""  # what the document says that it prints


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block under a heading."""

    section: str  # docs/x.md#heading, as a link; the page alone before its first heading
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.section.partition('#')[0]}:{self.line}"

    def commands(self) -> list[Command]:
        """Its commands; none in a block that is no list of commands."""
        if self.language == "qemu":
            return [Command(" ".join(self.text.split()), "options", self.place)]
        if self.language == "console":
            return list(self._dialogue())
        return list(self._script()) if self.language == "sh" else []

    def _script(self) -> Iterator[Command]:
        begun = ""
        for number, line in enumerate(self.text.splitlines(), self.line + 1):
            begun += line.strip() if begun else line
            if begun.endswith("\\"):
                begun = begun[:-1]
                continue
            text = re.sub(r"(^|\s+)#\s.*", "", begun)
            begun = ""
            if text.strip():
                yield Command(text.strip(), "host", f"{self.section.partition('#')[0]}:{number}")

    def _dialogue(self) -> Iterator[Command]:
        command: Command | None = None
        for number, line in enumerate(self.text.splitlines(), self.line + 1):
            prompt = next((prompt for prompt in PROMPTS if line.startswith(prompt)), None)
            if prompt is None:
                if command is not None and command.text.endswith("\\"):
                    text = command.text[:-1] + line.strip()
                    command = Command(text, command.where, command.place)
                elif command is not None:
                    output = f"{command.output}{line}\n"
                    command = Command(command.text, command.where, command.place, output)
                continue
            if command is not None:
                yield command
            text = re.sub(r"\s+#\s.*", "", line.removeprefix(prompt))
            place = f"{self.section.partition('#')[0]}:{number}"
            command = Command(text, PROMPTS[prompt], place)
        if command is not None:
            yield command


def blocks_of(root: Path, path: str) -> Iterator[Block]:
    """The blocks of a document, in their order. `path` is relative to the checkout, `root`."""
    section, fence, language, start = path, "", "", 0
    lines: list[str] = []
    for number, line in enumerate((root / path).read_text().splitlines(), 1):
        mark = re.match(r"\s*(`{3,})\s*(\S*)", line)
        if fence:
            if mark and len(mark[1]) >= len(fence) and not mark[2]:
                yield Block(section, start, language, "".join(f"{line}\n" for line in lines))
                fence = ""
            else:
                lines.append(line)
        elif mark:
            fence, language, start, lines = mark[1], mark[2], number, []
        elif heading := re.match(r"##+ (.*)", line):
            section = f"{path}#{anchor(heading[1])}"


def anchor(heading: str) -> str:
    """What links call a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def documents(root: Path) -> list[str]:
    """Every document that people follow, relative to the checkout."""
    paths = [*root.glob("*.md"), *root.glob("docs/**/*.md")]
    return sorted(str(path.relative_to(root)) for path in paths)


def section(root: Path, name: str) -> list[Block]:
    """The blocks directly under a heading, such as `docs/x.md#first-steps`.

    Raises:
        LookupError: there is no such section, or nothing in it.
    """
    found = [block for block in blocks_of(root, name.partition("#")[0]) if block.section == name]
    if not found:
        raise LookupError(f"no blocks in {name}")
    return found
