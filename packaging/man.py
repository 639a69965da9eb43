"""Make ``vhost-bridge.1`` from the command line's own help: ``python packaging/man.py FOLDER``."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from inspect import cleandoc
from pathlib import Path

import click

from vhostbridge import __version__
from vhostbridge.cli import PROGRAM, cli

SEE_ALSO = ("vdpa(8)", "qemu(1)", "virtiofsd(1)", "qemu-storage-daemon(1)", "systemd.exec(5)")
FILES = (
    ("/run/vhost-bridge", "control sockets of root's daemons, one each"),
    ("/dev/vhost-vdpa-N", "a vDPA device that the driver vhost_vdpa has"),
    ("/sys/bus/vdpa/devices", "the vDPA devices of this host"),
)


def escape(text: str) -> str:
    """Make text safe for roff: backslashes, hyphens that mean themselves, leading dots."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq")
    return re.sub(r"^\.", r"\\&.", escaped, flags=re.MULTILINE)


def paragraphs(help_text: str) -> Iterator[str]:
    r"""Lines of roff for a click help text; blocks that start with ``\b`` keep their lines."""
    blocks = [block for block in cleandoc(help_text).split("\n\n") if block.strip("\n")]
    for block in blocks:
        lines = block.strip("\n").split("\n")
        yield ".PP"
        if lines[0].strip() != "\b":
            yield escape(" ".join(line.strip() for line in lines))
            continue
        yield ".nf"
        yield from (escape(line) or "\\&" for line in lines[1:])
        yield ".fi"


def option_lines(parameter: click.Option) -> Iterator[str]:
    """One option: its names in bold, its metavar in italics, its help."""
    names = ", ".join(f"\\fB{escape(name)}\\fR" for name in parameter.opts)
    yield ".TP"
    yield names if parameter.is_flag else f"{names} \\fI{escape(parameter.metavar or 'VALUE')}\\fR"
    yield escape(re.sub(r"\s+", " ", parameter.help or ""))


def options(command: click.Command, context: click.Context) -> list[click.Option]:
    """The options of a command, ``--help`` too."""
    return [one for one in command.get_params(context) if isinstance(one, click.Option)]


def synopsis(command: click.Command, context: click.Context) -> str:
    """Name, options and arguments of a command in one line."""
    words = [f".B {escape(full_name(context))}\n.RI [ OPTION ]...\n"]
    for parameter in command.get_params(context):
        if isinstance(parameter, click.Argument):
            name = parameter.metavar or (parameter.name or "").upper()
            words.append(f".I {escape(name)}\n")
    return "".join(words).rstrip("\n")


def command_lines(command: click.Command, parent: click.Context) -> Iterator[str]:
    """A subsection for one command: synopsis, text, options. Those of a group's commands follow."""
    context = click.Context(command, info_name=command.name, parent=parent)
    yield f".SS {escape(full_name(context))}"
    yield f".B {escape(PROGRAM)}"
    yield synopsis(command, context)
    yield from paragraphs(command.help or "")
    for option in options(command, context):
        if "--help" not in option.opts:
            yield from option_lines(option)
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            yield from command_lines(command.commands[name], context)


def full_name(context: click.Context) -> str:
    """A command's name, with that of the group it is in."""
    return context.command_path.removeprefix(f"{PROGRAM} ")


def page() -> str:
    """The whole manual page."""
    context = click.Context(cli, info_name=PROGRAM)
    summary, _, description = (cli.help or "").partition("\n\n")
    lines = [
        '.\\" Made by packaging/man.py from the help of the commands: change it there.',
        f'.TH VHOST\\-BRIDGE 1 "" "{PROGRAM} {__version__}" "User Commands"',
        ".SH NAME",
        f"{escape(PROGRAM)} \\- {escape(summary[:1].lower() + summary[1:].rstrip('.'))}",
        ".SH SYNOPSIS",
        f".B {escape(PROGRAM)}",
        ".RI [ OPTION ]...",
        ".I COMMAND",
        ".RI [ ARGUMENT ]...",
        ".SH DESCRIPTION",
        *paragraphs(description),
        ".SH OPTIONS",
        *(line for option in options(cli, context) for line in option_lines(option)),
        ".SH COMMANDS",
    ]
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None
        lines.extend(command_lines(command, context))
    title, *codes = cleandoc(cli.epilog or "").replace("\b\n", "").strip("\n").split("\n")
    lines += [f".SH {escape(title.rstrip(':').upper().replace('CODES', 'STATUS'))}"]
    for code in codes:
        number, _, meaning = code.strip().partition("  ")
        lines += [".TP", f".B {number}", escape(meaning.strip())]
    lines += [".SH FILES"]
    for path, what in FILES:
        lines += [".TP", f".I {escape(path)}", escape(what)]
    lines += [".SH SEE ALSO", escape(", ".join(SEE_ALSO))]
    return "\n".join(lines) + "\n"


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "man")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{PROGRAM}.1").write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
