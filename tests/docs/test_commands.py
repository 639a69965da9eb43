"""Every command of the documents is one that exists, and is run by a test or listed as one that
can't be."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import click
import pytest

from vhostbridge.bridge.config import load_config
from vhostbridge.cli import cli
from vhostbridge.cli.common import Options

from .blocks import COMMANDS, FILES, OTHERS, Block, anchor, blocks_of, documents, section
from .not_run import BY_OTHER_TESTS, NOT_RUN

ROOT = Path(__file__).parents[2]
DOCUMENTS = documents(ROOT)
BLOCKS = [block for path in DOCUMENTS for block in blocks_of(ROOT, path)]
# Where sections are followed: any string there that names one counts.
FOLLOWERS = ("tests/host/test_guides*.py", "tests/vm/guest/checks_guides*.py")
PROGRAMS = (
    *("vhost-bridge", "qemu-system-x86_64", "qemu-storage-daemon", "systemctl", "modprobe"),
    *("vdpa", "make", "virsh", "virtiofsd", "dpdk-testpmd", "cloud-hypervisor", "install", "pip"),
)
BRIDGE = """
[[bridge]]
name = "x"
listen = "/run/x.sock"
backend = "vdpa:blk0"
"""


def ours(text: str) -> Iterator[list[str]]:
    """The arguments of each `vhost-bridge` in a command."""
    lexer = shlex.shlex(text.replace("$(", " ( "), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words = [word.strip('"') for word in lexer]
    for at, word in enumerate(words):
        if word == "vhost-bridge":
            rest = words[at + 1 :]
            ends = [i for i, other in enumerate(rest) if set(other) <= set("|&;()<>")]
            yield rest[: ends[0]] if ends else rest


def parse(arguments: list[str]) -> None:
    """Let click look at a command line without doing what it says. A bare name will do."""
    command: click.Command = cli
    context = click.Context(cli, info_name="vhost-bridge", obj=Options())
    while isinstance(command, click.Group) and arguments and not arguments[0].startswith("-"):
        name, *arguments = arguments
        found = command.get_command(context, name)
        assert found is not None, f"there is no command {name}"
        command = found
    if arguments and not isinstance(command, click.Group):
        command.make_context(command.name, list(arguments), parent=context)


def inline(path: str) -> Iterator[str]:
    """Command lines of ours in running text."""
    text = re.sub(r"(?ms)^\s*```.*?^\s*```", "", (ROOT / path).read_text())
    for code in re.findall(r"`(vhost-bridge [a-z][^`]*)`", text):
        if "…" not in code:
            yield code


def helped() -> Iterator[tuple[str, str]]:
    """The examples of every command's help."""

    def walk(command: click.Command, name: str) -> Iterator[tuple[str, str]]:
        _, _, examples = (command.help or "").partition("Examples:")
        for line in examples.replace("\\\n", " ").splitlines():
            if line.strip().startswith("vhost-bridge "):
                yield name, re.sub(r"\s+#\s.*", "", line.strip())
        if isinstance(command, click.Group):
            for key, child in command.commands.items():
                yield from walk(child, f"{name} {key}")

    return walk(cli, "vhost-bridge")


LINES = [
    *((c.place, c.text) for block in BLOCKS for c in block.commands() if c.where == "host"),
    *((path, text) for path in DOCUMENTS for text in inline(path)),
    *helped(),
]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.place)
def test_block_says_what_it_is(block: Block) -> None:
    """So that no command hides in one that nobody looks at."""
    assert block.language in (*COMMANDS, *FILES, *OTHERS), "see tests/docs/blocks.py"
    if block.language not in COMMANDS:
        first = [line.split(" ")[0] for line in block.text.splitlines()]
        assert not set(first) & set(PROGRAMS), "commands are `sh` or `console`"


@pytest.mark.parametrize(("place", "text"), LINES, ids=[f"{a}: {b[:50]}" for a, b in LINES])
def test_command_line_of_ours_is_one_that_is_taken(place: str, text: str) -> None:
    for arguments in ours(text):
        try:
            parse(arguments)
        except click.ClickException as error:
            raise AssertionError(f"{place}: `{text}`: {error.format_message()}") from None


def test_make_targets_exist() -> None:
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        word
        for path in DOCUMENTS
        for word in re.findall(r"(?:`|^)make ([a-z-]+)", (ROOT / path).read_text(), re.MULTILINE)
    }
    assert named <= known


@pytest.mark.parametrize(
    "block", [b for b in BLOCKS if b.language == "toml"], ids=lambda block: block.place
)
def test_configuration_is_taken(block: Block, tmp_path: Path) -> None:
    """What has no bridge is the beginning of a file."""
    file = tmp_path / "x.toml"
    file.write_text(block.text if "[[bridge]]" in block.text else f"{block.text}{BRIDGE}")
    assert load_config(file).bridges


@pytest.mark.parametrize(
    "block", [b for b in BLOCKS if b.language == "xml"], ids=lambda block: block.place
)
def test_xml_is_whole(block: Block) -> None:
    ElementTree.fromstring(f"<all>{block.text}</all>")


def followed() -> set[str]:
    """Every section that a test follows."""
    sections = {block.section for block in BLOCKS}
    return {
        name
        for pattern in FOLLOWERS
        for path in ROOT.glob(pattern)
        for name in strings(path)
        if name in sections
    }


def strings(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text())
    yield from (
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def test_every_section_with_commands_is_followed_by_a_test() -> None:
    """A new command needs a test that runs it: name its section in one of the followers. What can't
    be run, or is run by another test, goes into tests/docs/not_run.py."""
    there = {block.section for block in BLOCKS if block.language in COMMANDS}
    assert sorted(there - followed() - set(BY_OTHER_TESTS) - set(NOT_RUN)) == []


def test_lists_of_exceptions_name_what_is_there() -> None:
    there = {block.section for block in BLOCKS if block.language in COMMANDS}
    assert sorted((set(BY_OTHER_TESTS) | set(NOT_RUN)) - there) == []
    assert sorted((set(BY_OTHER_TESTS) | set(NOT_RUN)) & followed()) == []
    for name, test in BY_OTHER_TESTS.items():
        file, _, function = test.partition("::")
        assert f"def {function}(" in (ROOT / file).read_text(), name


def test_options_of_the_readme_are_those_that_the_guide_runs() -> None:
    (short,) = (b for b in section(ROOT, "README.md#install-and-use") if b.language == "qemu")
    *_, qemu = (c for b in section(ROOT, "docs/guides/qemu.md#disk") for c in b.commands())
    words = shlex.split(qemu.text)
    assert [x for x in short.text.split() if not any(w.startswith(x) for w in words)] == []


@pytest.mark.parametrize("path", DOCUMENTS)
def test_links_lead_to_headings_that_are_there(path: str) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", (ROOT / path).read_text())
    for target, heading in links:
        file = (ROOT / path).parent / target if target else ROOT / path
        headings = re.findall(r"(?m)^#+ (.*)$", file.read_text())
        assert heading in map(anchor, headings), f"{path}: {target}#{heading}"
