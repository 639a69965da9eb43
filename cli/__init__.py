"""The command line: parse, call, print. Only this package prints and exits.

What a command needs is imported in it: ``--help``, ``--version`` and completion stay fast.
"""

from __future__ import annotations

import errno
import os
import sys

import click

from vhostbridge import __version__
from vhostbridge.backends.errors import (
    BridgeError,
    ConfigError,
    TargetError,
    TransportLost,
    find_bridge_error,
)

from . import conform, control, monitor, serve, show, state, trace
from .common import (
    INTERRUPTED,
    LOST,
    PROGRAM,
    REFUSED,
    USAGE,
    Commands,
    Options,
    complain,
    debug_option,
    need_command,
)

__all__ = ["PROGRAM", "cli", "main"]

EXIT_CODES = """\
\b
Exit codes:
  0  done
  1  refused or failed
  2  wrong usage: options, back-end URI, configuration file
  3  the connection to a device, back-end or daemon was lost
  4  what "monitor --until" waited for did not happen in time
"""


@click.group(
    cls=Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=EXIT_CODES,
)
@click.version_option(__version__, prog_name=PROGRAM, message="%(prog)s %(version)s")
@debug_option
@click.pass_context
def cli(context: click.Context) -> None:
    """Serve vDPA devices and vhost-user back-ends to VMMs.

    The VMM needs vhost-user only, whatever the device is: QEMU, cloud-hypervisor, DPDK, libblkio.

    \b
    Examples:
      vhost-bridge list
      vhost-bridge inspect blk0
      vhost-bridge serve --name vm1 --listen /run/vm1.sock --backend vdpa:blk0
      vhost-bridge suspend vm1

    "vhost-bridge COMMAND --help" describes a command.
    """
    need_command(context)


@cli.command()
@click.argument("shell", metavar="SHELL", type=click.Choice(["bash", "zsh", "fish"]))
@debug_option
def completion(shell: str) -> None:
    """Print the script that completes commands in SHELL.

    SHELL is bash, zsh or fish. Options, names of devices and bridges, back-ends and sockets are
    completed.

    \b
    Examples:
      vhost-bridge completion bash > /etc/bash_completion.d/vhost-bridge
      vhost-bridge completion zsh > "${fpath[1]}/_vhost-bridge"
      vhost-bridge completion fish > ~/.config/fish/completions/vhost-bridge.fish
    """
    from vhostbridge.bridge.completion import script

    click.echo(script(shell, cli), nl=False)


for group in (serve, show, control, monitor, state, conform, trace):
    for command in group.COMMANDS:
        cli.add_command(command)


def _exit_code(error: BridgeError) -> int:
    if isinstance(error, ConfigError):
        return USAGE
    return LOST if isinstance(error, TransportLost) else REFUSED


def _usage_hint(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    return f"{context.command_path} --help" if context is not None else ""


# Where files of ours may lie it is caught: only our output is left.
def _full(error: Exception) -> BridgeError | None:
    if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return None
    # Nothing is left to be flushed at the end.
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    return TargetError(f"cannot write standard output: {error.strerror}")


def main() -> None:
    """Entry point: runs the command line, prints errors on one line, exits."""
    options = Options()
    if "_VHOST_BRIDGE_COMPLETE" in os.environ:
        from vhostbridge.bridge.completion import register

        register()
    try:
        # Without standalone mode click leaves errors to us, and returns what exit() was given.
        code = cli.main(prog_name=PROGRAM, standalone_mode=False, obj=options)
    except click.ClickException as error:
        message = error.format_message().replace("\n", " ").rstrip(".")
        complain(message[:1].lower() + message[1:], _usage_hint(error))
        sys.exit(USAGE if isinstance(error, click.UsageError) else REFUSED)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(INTERRUPTED)
    except Exception as error:
        known = find_bridge_error(error) or _full(error)
        if known is None or options.debug:
            raise
        complain(known.message, known.hint)
        sys.exit(_exit_code(known))
    sys.exit(code if isinstance(code, int) else 0)
