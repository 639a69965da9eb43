"""What the commands share: options, completion of arguments, and output."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

import click

from vhostbridge.backends.errors import ConfigError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

F = TypeVar("F", bound=Callable[..., Any])

PROGRAM = "vhost-bridge"
REFUSED, USAGE, LOST, TIMED_OUT = 1, 2, 3, 4
INTERRUPTED = 130


@dataclass(slots=True)
class Options:
    """What was given before or behind the command's name alike."""

    debug: bool = False


class Commands(click.Group):
    """A group that says which command was probably meant."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0] if args else ""
        if name and not ctx.resilient_parsing and self.get_command(ctx, name) is None:
            from difflib import get_close_matches

            close = get_close_matches(name, self.list_commands(ctx), 1)
            raise ConfigError(
                f"there is no command {name!r}",
                f"did you mean {close[0]}?" if close else f"{ctx.command_path} --help lists them",
            )
        return super().resolve_command(ctx, args)


def need_command(context: click.Context) -> None:
    """Print the help of a group that was given no command, and exit."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help(), err=True)
        context.exit(USAGE)


# Options


def _set_debug(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        context.ensure_object(Options).debug = True


def debug_option(function: F) -> F:
    """``-v``, before or behind the command's name."""
    return click.option(
        "-v",
        "--debug",
        is_flag=True,
        expose_value=False,
        callback=_set_debug,
        help="Debug messages, and tracebacks of errors.",
    )(function)


def json_option(function: F) -> F:
    """``-j``, as ``as_json``."""
    return click.option(
        "-j", "--json", "as_json", is_flag=True, help="Print one JSON document instead of text."
    )(function)


def type_option(use: str) -> Callable[[F], F]:
    """``--type``, as ``device_type``; ``use`` is what it is good for."""
    return click.option(
        "--type",
        "device_type",
        metavar="TYPE",
        shell_complete=complete_type,
        help="The virtio type of a vhost-user device (net, block, fs, ...), which vhost-user "
        f"itself doesn't tell: {use}.",
    )


def control_option(function: F) -> F:
    """``--control``, of the commands that ask a daemon."""
    return click.option(
        "--control",
        type=click.Path(path_type=Path),
        metavar="PATH",
        is_eager=True,  # completion of the name asks there
        help="The daemon's control socket.  [default: found in /run/vhost-bridge, or "
        "$XDG_RUNTIME_DIR/vhost-bridge]",
    )(function)


# Completion of arguments


def complete_target(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    from vhostbridge.bridge.completion import targets

    return targets(incomplete)


def complete_backend(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    from vhostbridge.bridge.completion import backends

    return backends(incomplete)


def complete_type(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    from vhostbridge.backends.virtio import DeviceId, device_name

    return [name for one in DeviceId if (name := device_name(one)).startswith(incomplete)]


def complete_bridge(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[str]:
    from vhostbridge.bridge.completion import bridges

    return bridges(incomplete, context.params.get("control"))


# Output


def print_json(report: object, *, err: bool = False) -> None:
    """Print one JSON document."""
    import json

    click.echo(json.dumps(report, indent=2), err=err)


def print_lines(lines: Iterable[str]) -> None:
    """Print text."""
    for line in lines:
        click.echo(line)


def complain(message: str, hint: str) -> None:
    """Print an error, or a note, and what to do about it."""
    mark = _journal_mark()
    click.echo(f"{mark}{PROGRAM}: {message}", err=True)
    if hint:
        click.echo(f"{mark}  hint: {hint}", err=True)


# Before a line that the journal reads from our stderr: it is an error's (sd-daemon(3)).
def _journal_mark() -> str:
    if "JOURNAL_STREAM" not in os.environ:
        return ""
    from vhostbridge.bridge.journald import leads_to_journal

    return "<3>" if leads_to_journal(sys.stderr) else ""


def size_text(count: int) -> str:
    """A number of bytes, for people."""
    size, unit = float(count), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{count} bytes" if unit == "bytes" else f"{size:.1f} {unit}"


@contextmanager
def progress_line(what: str, whole: int | None = None) -> Iterator[Callable[[int], None]]:
    """One line about how far it is, on a terminal only; it is gone when the block ends.

    Gives what is told the bytes so far; ``whole`` are all of them, where that is known.
    """
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    shown, last = 0, 0.0

    def show(count: int) -> None:
        nonlocal shown, last
        if monotonic() - last < 0.1:
            return
        last = monotonic()
        share = f" ({100 * min(count, whole) // whole} %)" if whole else ""
        line = f"{what} {size_text(count)}{share}"
        click.echo(f"\r{line.ljust(shown)}", nl=False, err=True)
        shown = len(line)

    try:
        yield show
    finally:
        if shown:
            click.echo(f"\r{' ' * shown}\r", nl=False, err=True)
