"""Completion in bash, zsh and fish: click's, and candidates of our own.

Completion runs at every press of the key: nothing here is opened, and little is imported.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    add_completion_class,
    get_completion_class,
    split_arg_string,
)

from vhostbridge.backends.vdpa.discovery import DEV_ROOT, SYSFS_ROOT, bus_devices

PROGRAM = "vhost-bridge"
VARIABLE = "_VHOST_BRIDGE_COMPLETE"

# bash splits words at colons, which back-ends have: the line goes whole to the program, and what
# bash takes for done already is cut off the answers.
_BASH = """\
%(complete_func)s() {
    local line=${COMP_LINE:0:COMP_POINT} type value prefix=
    local word=${line##*[[:space:]]}
    if [[ $COMP_WORDBREAKS == *:* && $word == *:* ]]; then
        prefix=${word%%"${word##*:}"}
    fi
    COMPREPLY=()
    while IFS=, read -r type value; do
        case $type in
        dir) compopt -o dirnames ;;
        file) compopt -o default ;;
        plain)
            [[ $value == */ ]] && compopt -o nospace
            COMPREPLY+=("${value#"$prefix"}")
            ;;
        esac
    done <<<"$(env COMP_LINE="$line" %(complete_var)s=bash_complete "$1" 2>/dev/null)"
}

complete -o nosort -F %(complete_func)s %(prog_name)s
"""


class _Bash(BashComplete):
    name = "bash"
    source_template = _BASH

    def source(self) -> str:
        # Without click's look at the version of some bash: the script may be for another machine.
        return self.source_template % self.source_vars()

    def get_completion_args(self) -> tuple[list[str], str]:
        line = os.environ["COMP_LINE"]
        words = split_arg_string(line)
        incomplete = words.pop() if words and not line[-1].isspace() else ""
        return words[1:], incomplete


def register() -> None:
    """Make click complete for bash our way."""
    add_completion_class(_Bash)


def script(shell: str, cli: click.Command) -> str:
    """The script that makes ``shell`` (bash, zsh or fish) complete our command line."""
    register()
    found = get_completion_class(shell)
    assert found is not None
    return found(cli, {}, PROGRAM, VARIABLE).source()


def targets(incomplete: str) -> list[CompletionItem[str]]:
    """What ``inspect`` takes: names of vDPA devices, their nodes, sockets."""
    plain = [
        candidate
        for device in bus_devices(SYSFS_ROOT)
        for candidate in (
            device.name,
            f"{DEV_ROOT}/{device.char_device}" if device.char_device else device.name,
        )
    ]
    found = {name for name in plain if name.startswith(incomplete)}
    scheme, colon, rest = incomplete.partition(":")
    if colon:
        return [CompletionItem(f"{scheme}:{item}") for item in _after_scheme(scheme, rest)]
    found.update(_sockets(incomplete))
    return [CompletionItem(name) for name in sorted(found)]


def backends(incomplete: str) -> list[CompletionItem[str]]:
    """What ``--backend`` takes: ``vdpa:`` and a device, ``vhost-user:`` and a socket."""
    scheme, colon, rest = incomplete.partition(":")
    if colon:
        return [CompletionItem(f"{scheme}:{item}") for item in _after_scheme(scheme, rest)]
    devices = [f"vdpa:{device.name}" for device in bus_devices(SYSFS_ROOT)]
    offered = [*devices, *(f"vhost-user:{path}" for path in _sockets("/run/"))]
    return [CompletionItem(uri) for uri in offered if uri.startswith(incomplete)]


def bridges(incomplete: str, control: Path | None) -> list[str]:
    """Names of running bridges, of daemons that answer at once."""
    from .control_client import bridge_names

    return [name for name in bridge_names(control) if name.startswith(incomplete)]


def _after_scheme(scheme: str, rest: str) -> list[str]:
    if scheme == "vdpa":
        return [device.name for device in bus_devices(SYSFS_ROOT) if device.name.startswith(rest)]
    return sorted(_sockets(rest)) if scheme.startswith("vhost-user") else []


# Sockets and folders under a path that is being typed; folders end with a slash, to go on.
def _sockets(incomplete: str) -> Iterator[str]:
    folder, slash, begun = incomplete.rpartition("/")
    try:
        with os.scandir(folder + slash or ".") as entries:
            for entry in entries:
                if not entry.name.startswith(begun) or (not begun and entry.name[0] == "."):
                    continue
                if entry.is_dir():
                    yield f"{folder}{slash}{entry.name}/"
                elif stat.S_ISSOCK(entry.stat().st_mode):
                    yield f"{folder}{slash}{entry.name}"
    except OSError:
        return
