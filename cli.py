"""The command line: parse, call, print. Only this module prints and exits.

Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 3 the transport was lost on the way.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from vhostbridge import __version__
from vhostbridge.backends.errors import ConfigError, TransportLost, find_bridge_error


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 3 transport lost.",
)
@click.version_option(__version__, prog_name="vhost-bridge")
@click.option("--debug", is_flag=True, help="Show tracebacks and debug messages.")
@click.pass_context
def cli(context: click.Context, debug: bool) -> None:
    """Serve vDPA devices and vhost-user back-ends to any VMM that speaks vhost-user."""
    context.obj = debug


@cli.command()
@click.option("--name", metavar="N", help="What the bridge is called in logs and commands.")
@click.option("--listen", metavar="SOCK", help="Listen here; the VMM connects.")
@click.option("--connect", metavar="SOCK", help="Connect here; the VMM listens (server=on).")
@click.option("--fd", type=int, metavar="N", help="An inherited socket, listening or connected.")
@click.option(
    "--backend", metavar="URI", help="vdpa:NAME, vdpa:/dev/vhost-vdpa-N, vhost-user:SOCK."
)
@click.option(
    "--socket-mode",
    metavar="MODE",
    default="600",
    show_default=True,
    help="Permissions of the --listen socket, octal.",
)
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="TOML file with many bridges, instead of the options above.",
)
@click.pass_obj
def serve(
    debug: bool,
    name: str | None,
    listen: str | None,
    connect: str | None,
    fd: int | None,
    backend: str | None,
    socket_mode: str,
    config_file: Path | None,
) -> None:
    """Serve a device to a VMM.

    \b
    vhost-bridge serve --name vm1 --listen /run/vm1.sock --backend vdpa:blk0
    vhost-bridge serve --name vm1 --listen /run/vm1.sock --backend vhost-user:/run/blk.sock
    vhost-bridge serve --config /etc/vhost-bridge.toml
    """
    import logging

    import trio

    from vhostbridge.bridge.config import BridgeConfig, load_config, parse_mode
    from vhostbridge.bridge.daemon import serve as serve_bridges

    single = (name, listen, connect, fd, backend)
    if config_file is not None:
        if any(option is not None for option in single):
            raise ConfigError("--config replaces --name, --listen, --connect, --fd and --backend")
        configs = load_config(config_file)
    elif name is None or backend is None:
        raise click.UsageError("serve needs --name and --backend, or --config")
    else:
        configs = [
            BridgeConfig(
                name=name,
                backend=backend,
                listen=listen,
                connect=connect,
                fd=fd,
                socket_mode=parse_mode(socket_mode),
            )
        ]
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.INFO,
        format="%(levelname)s %(message)s",
        stream=sys.stderr,
    )
    trio.run(serve_bridges, configs)


def main() -> None:
    """Entry point: runs the command line, prints errors on one line."""
    debug = "--debug" in sys.argv[1:]
    try:
        cli.main(standalone_mode=True)
    except Exception as error:
        known = find_bridge_error(error)
        if known is None or debug:
            raise
        click.echo(f"vhost-bridge: {known.message}", err=True)
        if known.hint:
            click.echo(f"  hint: {known.hint}", err=True)
        code = 2 if isinstance(known, ConfigError) else 3 if isinstance(known, TransportLost) else 1
        sys.exit(code)


if __name__ == "__main__":
    main()
