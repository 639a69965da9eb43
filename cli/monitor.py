"""``monitor`` and ``metrics``: what happens to bridges, and what has been counted."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vhostbridge.backends.errors import ConfigError

from .common import TIMED_OUT, complete_bridge, control_option, debug_option

if TYPE_CHECKING:
    from vhostbridge.bridge.events import Event

STATES = ("reset", "configured", "running", "suspended", "failed", "closed")


@click.command()
@click.argument("names", metavar="[NAME]...", nargs=-1, shell_complete=complete_bridge)
@click.option(
    "--until",
    metavar="WHAT",
    help="End at the first event of this name, or once a device is in this state: exit code 0.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="Follow for so long. The exit code is 4 if --until was not met by then, else 0.",
)
@control_option
@click.option("-j", "--json", "as_json", is_flag=True, help="Print one JSON object a line.")
@debug_option
def monitor(
    names: tuple[str, ...],
    until: str | None,
    timeout: float | None,
    control: Path | None,
    as_json: bool,
) -> None:
    """Follow what happens to bridges: one line for each event.

    Without NAME all bridges of all daemons that this user may control are followed. The first lines
    tell the state that each device is in.

    \b
    Events:
      state                                   a device came to a state (reset, configured, running,
                                              suspended, failed, closed)
      pause                                   it stood still and runs again: why and how long
      front-end-connected, front-end-left     a VMM
      back-end-ready, back-end-failed
      shadow-on, shadow-off                   requests pass through shadow vrings, or not any more
      dirty-log-on, dirty-log-off             a VMM migrates
      vring-broken                            a vring stopped, because a rule was broken
      switched, saved, loaded                 an operator's
      bridge-added, bridge-removed, reloaded  the daemon's
      error                                   a front-end was cut off, a reload failed
      lost                                    events that came faster than they were read

    \b
    Examples:
      vhost-bridge monitor
      vhost-bridge monitor -j vm1 | jq 'select(.event == "pause")'
      vhost-bridge monitor vm1 --until running --timeout 10
    """
    from vhostbridge.bridge.events import Kind
    from vhostbridge.bridge.monitoring import Monitor

    known = (*(kind.value for kind in Kind), *STATES)
    if until is not None and until not in known:
        from difflib import get_close_matches

        close = get_close_matches(until, known, 1)
        raise ConfigError(
            f"there is no event or state {until!r}",
            f"did you mean {close[0]}?" if close else f"one of {', '.join(known)}",
        )
    try:
        with Monitor(names, control) as follow:
            for event in follow.events(timeout):
                click.echo(_as_json(event) if as_json else event_line(event))
                if until is not None and until in (event.kind, _state(event)):
                    return
    except BrokenPipeError:  # whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    if until is not None:
        sys.exit(TIMED_OUT)


def _state(event: Event) -> str:
    return str(event.details.get("state", "")) if event.kind == "state" else ""


def _as_json(event: Event) -> str:
    import json

    return json.dumps(
        {
            "time": event.time,
            "bridge": event.bridge,
            "event": event.kind,
            "text": event.text,
            **event.details,
        }
    )


def event_line(event: Event) -> str:
    """An event for people, with the time here."""
    from datetime import datetime

    when = datetime.fromtimestamp(event.time).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
    return f"{when} {event.bridge or '-'} {event.kind}{f': {event.text}' if event.text else ''}"


@click.command()
@control_option
@debug_option
def metrics(control: Path | None) -> None:
    """Print the metrics of all bridges in Prometheus' text format.

    "serve --metrics" lets Prometheus fetch the same. What is a daemon's own (process_...) is left
    out, but for the one that --control names.

    \b
    Examples:
      vhost-bridge metrics
      vhost-bridge metrics > /var/lib/node_exporter/vhost-bridge.prom.new &&
        mv /var/lib/node_exporter/vhost-bridge.prom.new /var/lib/node_exporter/vhost-bridge.prom
    """
    from vhostbridge.bridge.control_client import every_daemon
    from vhostbridge.bridge.metrics import merged

    texts = [daemon.metrics() for daemon in every_daemon(control)]
    click.echo(texts[0] if control is not None else merged(texts), nl=False)


COMMANDS = (monitor, metrics)
