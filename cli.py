"""The command line: parse, call, print. Only this module prints and exits.

What a command needs is imported in it: ``--help``, ``--version`` and completion stay fast.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from vhostbridge import __version__
from vhostbridge.backends.errors import BridgeError, ConfigError, TransportLost, find_bridge_error

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from vhostbridge.bridge.config import BridgeConfig

F = TypeVar("F", bound=Callable[..., Any])

PROGRAM = "vhost-bridge"
REFUSED, USAGE, LOST = 1, 2, 3
INTERRUPTED = 130

EXIT_CODES = """\
\b
Exit codes:
  0  done
  1  refused or failed
  2  wrong usage: options, back-end URI, configuration file
  3  the connection to a device or back-end was lost
"""


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
                f"did you mean {close[0]}?" if close else f"{PROGRAM} --help lists them",
            )
        return super().resolve_command(ctx, args)


def _set_debug(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        context.ensure_object(Options).debug = True


def _debug_option(function: F) -> F:
    return click.option(
        "-v",
        "--debug",
        is_flag=True,
        expose_value=False,
        callback=_set_debug,
        help="Debug messages, and tracebacks of errors.",
    )(function)


def _json_option(function: F) -> F:
    return click.option(
        "-j", "--json", "as_json", is_flag=True, help="Print one JSON document instead of text."
    )(function)


@click.group(
    cls=Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=EXIT_CODES,
)
@click.version_option(__version__, prog_name=PROGRAM, message="%(prog)s %(version)s")
@_debug_option
@click.pass_context
def cli(context: click.Context) -> None:
    """Serve vDPA devices and vhost-user back-ends to VMMs.

    The VMM needs vhost-user only, whatever the device is: QEMU, cloud-hypervisor, DPDK, libblkio.

    \b
    Examples:
      vhost-bridge list
      vhost-bridge inspect blk0
      vhost-bridge serve --name vm1 --listen /run/vm1.sock --backend vdpa:blk0

    "vhost-bridge COMMAND --help" describes a command.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help(), err=True)
        context.exit(USAGE)


# Completion of arguments


def _complete_target(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    from vhostbridge.bridge.completion import targets

    return targets(incomplete)


def _complete_backend(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    from vhostbridge.bridge.completion import backends

    return backends(incomplete)


def _complete_type(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[str]:
    from vhostbridge.backends.virtio import DeviceId, device_name

    return [name for one in DeviceId if (name := device_name(one)).startswith(incomplete)]


# Commands


@cli.command()
@click.option("--name", metavar="N", help="What the bridge is called in logs and lists.")
@click.option(
    "--listen",
    metavar="SOCK",
    type=click.Path(),
    help="Listen here; the VMM connects. A socket that a dead server left is replaced.",
)
@click.option(
    "--connect",
    metavar="SOCK",
    type=click.Path(),
    help="Connect here; the VMM listens (server=on). Tried until it does.",
)
@click.option(
    "--fd", type=int, metavar="N", help="An inherited UNIX socket, listening or connected."
)
@click.option(
    "--backend",
    metavar="URI",
    shell_complete=_complete_backend,
    help="The device: vdpa:NAME, vdpa:/dev/vhost-vdpa-N, vhost-user:SOCK (connect), "
    "vhost-user-listen:SOCK (the back-end connects) or vhost-user-fd:N (inherited).",
)
@click.option(
    "--socket-mode",
    metavar="MODE",
    help="Permissions of the --listen socket, octal; connecting needs write permission.  "
    "[default: 600]",
)
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="TOML file with one or many bridges, instead of the options above.",
)
@_debug_option
@click.pass_context
def serve(
    context: click.Context,
    name: str | None,
    listen: str | None,
    connect: str | None,
    fd: int | None,
    backend: str | None,
    socket_mode: str | None,
    config_file: Path | None,
) -> None:
    """Serve devices to VMMs until SIGTERM or SIGINT.

    Each bridge has one front-end socket (exactly one of --listen, --connect and --fd) and one
    device. It serves one VMM at a time; when a VMM leaves, the device is stopped and reset, and
    the next one may come. A back-end that goes away is opened again when it is back.

    The VMM must share the guest's memory: QEMU with memory-backend-memfd,share=on and
    cloud-hypervisor with --memory shared=on.

    \b
    Examples:
      vhost-bridge serve --name vm1 --listen /run/vm1.sock --backend vdpa:blk0
      vhost-bridge serve --name vm2 --listen /run/vm2.sock --socket-mode 660 \\
                         --backend vhost-user:/run/blk.sock
      vhost-bridge serve --config /etc/vhost-bridge.toml

    \b
    The same in a file:
      [[bridge]]
      name = "vm1"
      listen = "/run/vm1.sock"
      backend = "vdpa:blk0"
    \b
      [[bridge]]
      name = "vm2"
      listen = "/run/vm2.sock"
      socket-mode = "660"
      backend = "vhost-user:/run/blk.sock"
    """
    single = {
        "--name": name,
        "--listen": listen,
        "--connect": connect,
        "--fd": fd,
        "--backend": backend,
        "--socket-mode": socket_mode,
    }
    configs = _bridge_configs(single, config_file)
    import logging

    import trio

    from vhostbridge.bridge.daemon import serve as serve_bridges

    debug = context.ensure_object(Options).debug
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.INFO,
        format="%(levelname)s %(message)s",
        stream=sys.stderr,
    )
    trio.run(serve_bridges, configs)


def _bridge_configs(single: dict[str, Any], config_file: Path | None) -> list[BridgeConfig]:
    from vhostbridge.bridge.config import BridgeConfig, load_config, parse_mode

    if config_file is not None:
        given = [option for option, value in single.items() if value is not None]
        if given:
            raise ConfigError(
                f"--config and {given[0]} exclude each other",
                "the file says everything of its bridges",
            )
        return load_config(config_file)
    for option in ("--name", "--backend"):
        if single[option] is None:
            raise ConfigError(
                f"serve needs {option}", "or --config with a file that names the bridges"
            )
    mode = single["--socket-mode"]
    if mode is not None and single["--listen"] is None:
        raise ConfigError("--socket-mode is for a --listen socket")
    return [
        BridgeConfig(
            name=single["--name"],
            backend=single["--backend"],
            listen=single["--listen"],
            connect=single["--connect"],
            fd=single["--fd"],
            socket_mode=parse_mode(mode or "600"),
        )
    ]


@cli.command("list")
@_json_option
@_debug_option
def list_(as_json: bool) -> None:
    """List vDPA management devices, vDPA devices and bridges.

    Devices are shown with who holds them: a bridge by its name, another process by its own.
    Bridges are found by their command lines. Nothing is opened. Without vDPA in the kernel the
    lists of devices are empty, and a note on standard error says so.

    \b
    Examples:
      vhost-bridge list
      vhost-bridge list -j | jq '.dev | keys'
    """
    from vhostbridge.bridge.listing import list_report
    from vhostbridge.bridge.render import list_text

    report = list_report()
    if as_json:
        _print_json(report)
    else:
        _print_lines(list_text(report))
    if "note" in report:
        _complain(f"note: {report['note']}", str(report.get("note_hint", "")))


@cli.command()
@click.argument("target", shell_complete=_complete_target)
@click.option(
    "--type",
    "device_type",
    metavar="TYPE",
    shell_complete=_complete_type,
    help="The virtio type of a vhost-user device (net, block, fs, ...), which vhost-user itself "
    "doesn't tell: with it features, vrings and configuration have names.",
)
@_json_option
@_debug_option
def inspect(target: str, device_type: str | None, as_json: bool) -> None:
    """Show what a device or back-end offers and can do.

    TARGET is the name of a vDPA device, a /dev/vhost-vdpa-N, the path of a vhost-user socket, or
    one of these with vdpa: or vhost-user: before it.

    A vDPA device that is free is opened and closed. That resets it, which changes nothing: it is
    at reset as long as nobody has it open. One that is in use is not opened: what netlink and
    sysfs tell is shown, and who holds it.

    A vhost-user socket is connected to, as a VMM does. A back-end made for one connection
    (virtiofsd) ends when inspect leaves. A back-end that is busy with a VMM does not answer: after
    3 seconds inspect gives up.

    \b
    Examples:
      vhost-bridge inspect blk0
      vhost-bridge inspect /dev/vhost-vdpa-0
      vhost-bridge inspect /run/blk.sock --type block
      vhost-bridge inspect -j vdpa:blk0 | jq .capabilities
    """
    from vhostbridge.bridge.inspect import inspect as inspect_target
    from vhostbridge.bridge.render import inspect_text

    report = inspect_target(target, device_type)
    if as_json:
        _print_json(report)
    else:
        _print_lines(inspect_text(report))


@cli.command()
@click.argument("shell", metavar="SHELL", type=click.Choice(["bash", "zsh", "fish"]))
@_debug_option
def completion(shell: str) -> None:
    """Print the script that completes commands in SHELL.

    SHELL is bash, zsh or fish. Options, device names, back-ends and sockets are completed.

    \b
    Examples:
      vhost-bridge completion bash > /etc/bash_completion.d/vhost-bridge
      vhost-bridge completion zsh > "${fpath[1]}/_vhost-bridge"
      vhost-bridge completion fish > ~/.config/fish/completions/vhost-bridge.fish
    """
    from vhostbridge.bridge.completion import script

    click.echo(script(shell, cli), nl=False)


# Output


def _print_json(report: object) -> None:
    import json

    click.echo(json.dumps(report, indent=2))


def _print_lines(lines: Iterable[str]) -> None:
    for line in lines:
        click.echo(line)


def _complain(message: str, hint: str) -> None:
    click.echo(f"{PROGRAM}: {message}", err=True)
    if hint:
        click.echo(f"  hint: {hint}", err=True)


def _exit_code(error: BridgeError) -> int:
    if isinstance(error, ConfigError):
        return USAGE
    return LOST if isinstance(error, TransportLost) else REFUSED


def _usage_hint(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    return f"{context.command_path} --help" if context is not None else ""


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
        _complain(message[:1].lower() + message[1:], _usage_hint(error))
        sys.exit(USAGE if isinstance(error, click.UsageError) else REFUSED)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(INTERRUPTED)
    except Exception as error:
        known = find_bridge_error(error)
        if known is None or options.debug:
            raise
        _complain(known.message, known.hint)
        sys.exit(_exit_code(known))
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
