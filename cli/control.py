"""The commands that ask a running daemon: ``status``, ``suspend``, ``save`` and the like."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import sleep
from typing import TYPE_CHECKING, NoReturn

import click

from vhostbridge.backends.errors import BridgeError, ConfigError, TargetError

from .common import (
    REFUSED,
    F,
    complain,
    complete_bridge,
    complete_target,
    control_option,
    debug_option,
    json_option,
    print_json,
    print_lines,
    progress_line,
    size_text,
)

if TYPE_CHECKING:
    from vhostbridge.backends.fds import OwnedFd
    from vhostbridge.bridge.status import BridgeStatus


def _name_argument(function: F) -> F:
    return click.argument("name", metavar="NAME", shell_complete=complete_bridge)(function)


@click.command()
@click.argument("name", metavar="[NAME]", required=False, shell_complete=complete_bridge)
@click.option(
    "--watch",
    metavar="SECONDS",
    type=click.FloatRange(min=0.1),
    is_flag=False,
    flag_value=2.0,
    help="Show it again and again, every 2 seconds if not told otherwise, until interrupted.",
)
@control_option
@json_option
@debug_option
def status(name: str | None, watch: float | None, control: Path | None, as_json: bool) -> None:
    """Show bridges: their device, its state, pauses so far, and where each vring stands.

    Without NAME all bridges of all daemons that this user may control are shown.

    BASE is the device's position while it is suspended, AVAILABLE and USED are the indices in
    the guest's memory. A vring where they disagree has a line that says so. Rates are those of the
    last moment; with --watch, those since the last time. Only where requests pass through shadow
    vrings are bytes, kicks and calls known.

    \b
    Examples:
      vhost-bridge status
      vhost-bridge status vm1
      vhost-bridge status --watch 1 vm1
      vhost-bridge status -j vm1 | jq '.bridges[0].state'
    """
    problems, before = _show_status(name, control, as_json, ())
    while watch is not None:
        sleep(watch)
        problems, before = _show_status(name, control, as_json, before, clear=True)
    if problems:
        sys.exit(REFUSED)


def _show_status(
    name: str | None,
    control: Path | None,
    as_json: bool,
    before: Sequence[BridgeStatus],
    *,
    clear: bool = False,
) -> tuple[Sequence[BridgeError], Sequence[BridgeStatus]]:
    from vhostbridge.bridge.rates import SAMPLE, rates
    from vhostbridge.bridge.status_text import status_report, status_text

    problems: list[BridgeError] = []
    first = found = _statuses(name, control, problems)
    if any(vring.running for one in first for vring in one.vrings):
        sleep(SAMPLE)
        problems = []
        found = _statuses(name, control, problems)
    rate = rates(first, found, before)
    if as_json:
        print_json({"bridges": [status_report(one, rate) for one in found]})
    else:
        if clear and sys.stdout.isatty():
            click.clear()
        print_lines(status_text(found, rate))
    for problem in problems:
        complain(problem.message, problem.hint)
    return problems, found


def _statuses(
    name: str | None, control: Path | None, problems: list[BridgeError]
) -> list[BridgeStatus]:
    from vhostbridge.bridge.control_client import daemon_of, every_daemon

    if name is not None:
        with daemon_of(name, control) as daemon:
            return daemon.status(name)
    found: list[BridgeStatus] = []
    for daemon in every_daemon(control):
        try:
            found += daemon.status()
        except BridgeError as error:  # the others have something to say
            problems.append(error)
    return found


@click.command()
@_name_argument
@control_option
@json_option
@debug_option
def suspend(name: str, control: Path | None, as_json: bool) -> None:
    """Suspend a device: freeze it with everything it knows.

    When the command returns, the device touches neither the guest's memory nor its disk or network
    for it. The guest's requests wait; nothing fails and nothing is lost. A device that can't be
    suspended runs on, and the reason is told.

    \b
    Examples:
      vhost-bridge suspend vm1
      vhost-bridge suspend vm1 && vhost-bridge save vm1 vm1.state
    """
    _operate("Suspend", name, control, as_json)


@click.command()
@_name_argument
@control_option
@json_option
@debug_option
def resume(name: str, control: Path | None, as_json: bool) -> None:
    """Resume a suspended device: it goes on where it stopped.

    \b
    Examples:
      vhost-bridge resume vm1
    """
    _operate("Resume", name, control, as_json)


@click.command()
@_name_argument
@control_option
@json_option
@debug_option
def reset(name: str, control: Path | None, as_json: bool) -> None:
    """Reset a device, whatever its state: all that it knows of its driver is lost.

    A guest that uses the device has to reload its driver or reboot.

    \b
    Examples:
      vhost-bridge reset vm1
    """
    _operate("Reset", name, control, as_json)


def _operate(method: str, name: str, control: Path | None, as_json: bool) -> None:
    from vhostbridge.bridge.control_client import daemon_of

    with daemon_of(name, control) as daemon:
        state = daemon.operate(method, name)
    if as_json:
        print_json({"name": name, "state": state})
    else:
        click.echo(f"{name}: {state}")


@click.command()
@_name_argument
@click.argument("file", metavar="FILE", type=click.Path(allow_dash=True))
@control_option
@json_option
@debug_option
def save(name: str, file: str, control: Path | None, as_json: bool) -> None:
    """Save the state of a suspended device to FILE, or to standard output with "-".

    The file appears when it is whole and on its disk, with mode 0600; what had its name before is
    replaced then, and stays if saving fails. The device is not changed: it may be saved again,
    resumed, or left.

    \b
    Examples:
      vhost-bridge save vm1 vm1.state
      vhost-bridge save vm1 - | ssh host2 vhost-bridge load vm1 -
    """
    from vhostbridge.bridge.control_client import daemon_of

    with (
        daemon_of(name, control) as daemon,
        _sink(file) as sink,
        progress_line(f"{name}: saving,") as progress,
    ):
        size = daemon.save(name, sink, progress)
    to_output = file == "-"
    if as_json:
        print_json({"name": name, "file": file, "bytes": size}, err=to_output)
    else:
        click.echo(f"{name}: {size_text(size)} saved", err=to_output)


@contextmanager
def _sink(file: str) -> Iterator[OwnedFd]:
    from vhostbridge.backends.fds import OwnedFd
    from vhostbridge.backends.state_stream import atomic_file

    if file == "-":
        if sys.stdout.isatty():
            raise ConfigError("a device state is not for a terminal", "name a file, or use a pipe")
        with OwnedFd(os.dup(sys.stdout.fileno())) as sink:
            yield sink
    else:
        with atomic_file(Path(file)) as sink:
            yield sink


@click.command()
@_name_argument
@click.argument("file", metavar="FILE", type=click.Path(allow_dash=True))
@click.option("--dry-run", is_flag=True, help="Only tell whether it would load, and all why not.")
@control_option
@json_option
@debug_option
def load(name: str, file: str, dry_run: bool, control: Path | None, as_json: bool) -> None:
    """Load a state from FILE, or from standard input with "-", into a device.

    The state is read to its end and checked before the device is touched. Afterwards the device
    is suspended: "resume" lets it go on. A running device must be suspended before.

    If the state doesn't fit the device, all the reasons are told, the device is left as it was,
    and the exit code is 1, with --dry-run too.

    \b
    Examples:
      vhost-bridge load vm1 vm1.state --dry-run
      vhost-bridge load vm1 vm1.state && vhost-bridge resume vm1
      ssh host1 vhost-bridge save vm1 - | vhost-bridge load vm1 -
    """
    from vhostbridge.bridge.control_client import Incompatible, daemon_of

    state = ""
    reasons: list[str] = []
    with (
        daemon_of(name, control) as daemon,
        _source(file) as source,
        progress_line(f"{name}: loading,", _whole(source)) as progress,
    ):
        try:
            state, reasons = daemon.load(name, source, progress, dry_run=dry_run)
        except Incompatible as error:
            reasons = error.reasons
    fits = not reasons
    if as_json:
        report = {"name": name, "file": file, "fits": fits, "loaded": fits and not dry_run}
        print_json({**report, "reasons": reasons, **({"state": state} if state else {})})
    elif fits:
        click.echo(f"{name}: the state fits" if dry_run else f"{name}: loaded, {state}")
    if reasons:
        _complain_of_reasons(f"{name} can't take the state of {file} over", reasons)


def _complain_of_reasons(what: str, reasons: list[str]) -> NoReturn:
    count = f"{len(reasons)} reasons" if len(reasons) > 1 else "one reason"
    complain(f"{what}, for {count}:", "")
    for reason in reasons:
        click.echo(f"  {reason}", err=True)
    sys.exit(REFUSED)


@click.command()
@_name_argument
@click.argument("backend", metavar="BACKEND", shell_complete=complete_target)
@click.option("--dry-run", is_flag=True, help="Only tell whether it would work, and all why not.")
@control_option
@json_option
@debug_option
def switch(name: str, backend: str, dry_run: bool, control: Path | None, as_json: bool) -> None:
    """Move a running VM's device to another back-end.

    BACKEND is written as for "serve", on the same transport or the other one. Both have to reach
    the same disk or network. It is opened, compared and given the guest's memory while the guest
    runs; then the guest's requests wait for as long as it takes to suspend the one and start the
    other. If anything fails the old one goes on. The daemon's configuration file is not changed.

    If the other back-end can't take over, all the reasons are told, nothing is done, and the exit
    code is 1, with --dry-run too.

    \b
    Examples:
      vhost-bridge switch vm1 vdpa:blk0 --dry-run
      vhost-bridge switch vm1 vdpa:blk0
      vhost-bridge switch vm1 vhost-user:/run/storage.sock
    """
    from vhostbridge.bridge.control_client import Incompatible, daemon_of
    from vhostbridge.bridge.status import SwitchReport

    with daemon_of(name, control) as daemon:
        try:
            report = daemon.switch(name, backend, dry_run=dry_run)
        except Incompatible as error:
            report = SwitchReport(reasons=error.reasons)
    if as_json:
        times = {"prepare": report.prepare, "pause": report.pause, "phases": report.phases}
        fits = {"fits": not report.reasons, "reasons": report.reasons, "switched": report.moved}
        print_json({"name": name, "backend": backend, **fits, "state": report.state, **times})
    elif report.moved:
        click.echo(f"{name}: {backend}, {report.state}, after a pause of {report.told}")
    elif not report.reasons:
        click.echo(f"{name}: {backend} can take over")
    if report.reasons:
        _complain_of_reasons(f"{backend} can't take {name} over", report.reasons)


@contextmanager
def _source(file: str) -> Iterator[OwnedFd]:
    from vhostbridge.backends.fds import OwnedFd

    if file == "-":
        if sys.stdin.isatty():
            raise ConfigError("a device state is not typed", "name a file, or use a pipe")
        number = os.dup(sys.stdin.fileno())
    else:
        try:
            number = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise TargetError(f"cannot read {file}: {os.strerror(error.errno or 0)}") from None
    with OwnedFd(number) as source:
        yield source


def _whole(source: OwnedFd) -> int | None:
    found = os.fstat(source.fileno())
    return found.st_size if stat.S_ISREG(found.st_mode) else None


COMMANDS = (status, suspend, resume, reset, save, load, switch)
