"""``state``: look at saved states, without a daemon or device."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING

import click

from vhostbridge.backends.errors import ConfigError, StateError, TargetError

from .common import (
    REFUSED,
    Commands,
    complain,
    debug_option,
    json_option,
    need_command,
    print_json,
    print_lines,
    progress_line,
    size_text,
)

if TYPE_CHECKING:
    from vhostbridge.bridge.saved import Saved


@click.group(cls=Commands, invoke_without_command=True)
@debug_option
@click.pass_context
def state(context: click.Context) -> None:
    """Look at saved device states.

    FILE is what "vhost-bridge save" wrote, or "-" for standard input. A file is read to its end
    and checked, whatever the command is. No daemon is needed.

    \b
    Examples:
      vhost-bridge state show vm1.state
      vhost-bridge state diff before.state after.state
      vhost-bridge state verify *.state
    """
    need_command(context)


@state.command("show")
@click.argument("file", metavar="FILE", type=click.Path(allow_dash=True))
@json_option
@debug_option
def show(file: str, as_json: bool) -> None:
    """Show what a state holds.

    \b
    Examples:
      vhost-bridge state show vm1.state
      vhost-bridge save vm1 - | vhost-bridge state show -j - | jq .vrings
    """
    from vhostbridge.bridge.saved import saved_report, saved_text

    report = saved_report(_read(file))
    if as_json:
        print_json(report)
    else:
        print_lines(saved_text(file, report))


@state.command("diff")
@click.argument("before", metavar="A", type=click.Path(allow_dash=True))
@click.argument("after", metavar="B", type=click.Path(allow_dash=True))
@json_option
@debug_option
def diff(before: str, after: str, as_json: bool) -> None:
    """Show in what two states differ.

    Exit code 0: in nothing; 1: in what is printed.

    \b
    Examples:
      vhost-bridge state diff before.state after.state
    """
    from vhostbridge.bridge.saved import differences, saved_report

    if before == after == "-":
        raise ConfigError("only one of A and B can be standard input")
    reports = [saved_report(_read(file)) for file in (before, after)]
    found = differences(*reports)
    if as_json:
        print_json({"differences": [{"what": k, "a": a, "b": b} for k, a, b in found]})
    else:
        print_lines(f"{what}: {a} -> {b}" for what, a, b in found)
    if found:
        sys.exit(REFUSED)


@state.command("verify")
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=click.Path())
@json_option
@debug_option
def verify(files: tuple[str, ...], as_json: bool) -> None:
    """Check that states are whole, undamaged and understood.

    All files are checked; exit code 1 if one of them fails.

    \b
    Examples:
      vhost-bridge state verify vm1.state
      vhost-bridge state verify -j /srv/states/* | jq -r '.files[] | select(.ok | not).file'
    """
    reports: list[dict[str, object]] = []
    for file in files:
        try:
            saved = _read(file)
        except (StateError, TargetError) as error:
            reports.append({"file": file, "ok": False, "problem": error.message})
            if not as_json:
                complain(f"{file}: {error.message}", error.hint)
            continue
        reports.append({"file": file, "ok": True, "bytes": saved.size, "sha256": saved.digest})
        if not as_json:
            click.echo(f"{file}: whole, {size_text(saved.size)}")
    if as_json:
        print_json({"files": reports})
    if not all(report["ok"] for report in reports):
        sys.exit(REFUSED)


def _read(file: str) -> Saved:
    from vhostbridge.bridge.saved import read_saved

    with ExitStack() as stack:
        if file == "-":
            if sys.stdin.isatty():
                raise ConfigError("a device state is not typed", "name a file, or use a pipe")
            stream = sys.stdin.buffer
        else:
            try:
                stream = stack.enter_context(open(file, "rb", buffering=0))
            except OSError as error:
                reason = os.strerror(error.errno or 0)
                raise TargetError(f"cannot read {file}: {reason}") from None
        whole = None if file == "-" else os.fstat(stream.fileno()).st_size
        progress = stack.enter_context(progress_line(f"{file}: reading,", whole))
        return read_saved(stream, progress)


COMMANDS = (state,)
