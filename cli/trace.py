"""``trace``: what a daemon's ``--trace`` file says."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vhostbridge.backends.errors import ConfigError, TargetError

from .common import Commands, complain, debug_option, need_command

if TYPE_CHECKING:
    from vhostbridge.bridge.trace.entry import Entry
    from vhostbridge.bridge.trace.reader import Read

_COLOURS: dict[str, dict[str, object]] = {
    "start": {"bold": True},
    "message": {"bold": True},
    "ioctl": {"fg": "green"},
    "event": {"fg": "cyan"},
    "warning": {"fg": "yellow"},
    "failed": {"fg": "red", "bold": True},
    "quiet": {"dim": True},
}


@click.group(cls=Commands, invoke_without_command=True)
@debug_option
@click.pass_context
def trace(context: click.Context) -> None:
    """Read the traces that serve --trace writes.

    \b
    Examples:
      vhost-bridge trace show /tmp/vm1.trace
      vhost-bridge trace show /tmp/vm1.trace --html vm1.html
    """
    need_command(context)


@trace.command()
@click.argument(
    "files", metavar="FILE...", nargs=-1, required=True, type=click.Path(allow_dash=True)
)
@click.option("--bridge", metavar="NAME", help="Only what belongs to this bridge.")
@click.option(
    "--since",
    metavar="TIME",
    help="Only what happened from then on: seconds after the first record, or a time of day "
    "(HH:MM:SS) or YYYY-MM-DDTHH:MM:SS, both UTC.",
)
@click.option(
    "--only",
    type=click.Choice(["message", "ioctl", "event"]),
    multiple=True,
    help="Only records of this kind; may be given more than once.",
)
@click.option("--follow", is_flag=True, help="Go on with what is written, until Ctrl-C.")
@click.option("-j", "--json", "as_json", is_flag=True, help="Print the records, one JSON a line.")
@click.option("--svg", metavar="OUT", type=click.Path(), help="Draw a sequence diagram.")
@click.option(
    "--html", metavar="OUT", type=click.Path(), help="The same as a page, with every field."
)
@debug_option
def show(
    files: tuple[str, ...],
    bridge: str | None,
    since: str | None,
    only: tuple[str, ...],
    follow: bool,
    as_json: bool,
    svg: str | None,
    html: str | None,
) -> None:
    """Show what front-end, bridge and back-end said to each other, and what the bridge did.

    FILE is what serve --trace wrote; - is standard input. Of a trace that was put aside when it
    was full, name both: FILE.1 FILE. It has one line for each vhost-user message, each ioctl and
    IOTLB message of a vDPA device, and each event. Times are seconds from the first record, those
    in parentheses are how long a call or an answer took.

    --svg and --html write a picture instead, for one bridge: the page needs nothing but a browser,
    and is what to attach to a bug report.

    \b
    Examples:
      vhost-bridge trace show vm1.trace
      vhost-bridge trace show vm1.trace --only ioctl --since 12.5
      vhost-bridge trace show --follow vm1.trace
      vhost-bridge trace show vm1.trace -j | jq -r 'select(.errno) | .name'
      vhost-bridge trace show vm1.trace --html vm1.html --svg vm1.svg
    """
    picture = svg is not None or html is not None
    if as_json and picture:
        raise ConfigError("--json excludes --svg and --html", "run it twice")
    if follow and (picture or len(files) > 1 or files[0] == "-"):
        raise ConfigError("--follow is for the text of one file", "a picture is of what is there")
    from vhostbridge.bridge.trace.reader import read
    from vhostbridge.bridge.trace.selection import Selection

    selection = Selection(bridge, since, only)
    records = (
        one
        for file in files
        for one in read(file, follow=follow, note=lambda text: complain(text, ""))
        if selection.has(one[0])
    )
    if picture:
        _draw((entry for entry, _ in records), svg, html)
    elif as_json:
        _print_flushed(
            (line.decode("ascii", "replace").rstrip("\n") for _, line in records), follow
        )
    else:
        _print_flushed(_text(records), follow)
    if bridge is not None and not selection.matched:
        complain(f"no record of a bridge called {bridge} was found", selection.known)


def _text(records: Iterable[Read]) -> Iterator[str]:
    from vhostbridge.bridge.trace.text import HEADING, TextTrace

    text = TextTrace(_style if sys.stdout.isatty() else lambda text, style: text)
    first = True
    for entry, _ in records:
        yield text.line(entry)
        if first and entry.kind == "start":
            yield HEADING
        first = False


def _style(text: str, style: str) -> str:
    return click.style(text, **_COLOURS.get(style, {}))  # type: ignore[arg-type]


def _print_flushed(lines: Iterable[str], flush: bool) -> None:
    try:
        for line in lines:
            sys.stdout.write(f"{line}\n")
            if flush:
                sys.stdout.flush()
        sys.stdout.flush()
    except OSError as error:
        # Nothing is left to be flushed at the end.
        sys.stdout = open("/dev/null", "w", encoding="utf-8")  # noqa: SIM115
        if isinstance(error, BrokenPipeError):
            return  # whoever read it has seen enough
        raise TargetError(f"cannot write standard output: {error.strerror}") from None


def _draw(entries: Iterable[Entry], svg: str | None, html: str | None) -> None:
    from vhostbridge.bridge.trace.diagram import diagram

    drawn = diagram(entries)
    if svg is not None:
        from vhostbridge.bridge.trace.svg import svg_text

        _write(Path(svg), svg_text(drawn))
    if html is not None:
        from vhostbridge.bridge.trace.html import html_text

        _write(Path(html), html_text(drawn))


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise TargetError(f"cannot write {path}: {error.strerror}") from None


COMMANDS = (trace,)
