"""``serve``: the daemon."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vhostbridge.backends.errors import ConfigError

from .common import Options, complete_backend, debug_option

if TYPE_CHECKING:
    from vhostbridge.bridge.config import BridgeConfig, DaemonConfig

HELP = """\
Serve devices to VMMs until SIGTERM or SIGINT.

At SIGHUP a --config file is read again: bridges that changed there are started anew, those that
did not are not touched. A file with a mistake changes nothing.

Each bridge has one front-end socket (exactly one of --listen, --connect and --fd) and one
device. It serves one VMM at a time; when a VMM leaves, the device is stopped and reset (or
kept, see --on-disconnect), and the next one may come. A back-end that goes away is opened again
when it is back.

Root and the daemon's own user can suspend, resume, save and load the devices meanwhile, through
the control socket.

The VMM must share the guest's memory: QEMU with memory-backend-memfd,share=on and
cloud-hypervisor with --memory shared=on.

\b
Examples:
  vhost-bridge serve --name vm1 --listen /run/vm1.sock --backend vdpa:blk0
  vhost-bridge serve --name vm2 --listen /run/vm2.sock --socket-mode 660 \\
                     --backend vhost-user:/run/blk.sock
  vhost-bridge serve --name vm1 --listen /run/vm1.sock --backend vdpa:blk1 \\
                     --incoming vm1.state
  vhost-bridge serve --name vm3 --listen /run/vm3.sock --backend vdpa:net0 \\
                     --mac 52:54:00:12:34:56
  vhost-bridge serve --name vm4 --listen /run/vm4.sock --backend vhost-user:/run/fs.sock \\
                     --backend-command 'virtiofsd --socket-path /run/fs.sock --shared-dir /srv'
  vhost-bridge serve --config /etc/vhost-bridge.toml --trace /var/tmp/vhost-bridge.trace

\b
The same in a file (before it control = "PATH" or false, metrics = "ADDRESS", trace = "PATH"):
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


@click.command(help=HELP)
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
    shell_complete=complete_backend,
    help="The device: vdpa:NAME, vdpa:/dev/vhost-vdpa-N, vhost-user:SOCK (connect), "
    "vhost-user-listen:SOCK (the back-end connects) or vhost-user-fd:N (inherited).",
)
@click.option(
    "--backend-command",
    metavar="CMD",
    help="Start this program first: it is the vhost-user back-end. It is started again when it "
    "dies, and ended with the bridge.",
)
@click.option(
    "--backend-timeout",
    type=float,
    metavar="SECONDS",
    help="Cut the VMM off when its back-end was away for so long.  [default: never]",
)
@click.option(
    "--type",
    "device_type",
    metavar="TYPE",
    help="What a vhost-user back-end is (net, block, fs, ...): nothing else tells. States that are "
    "saved and loaded are checked by it.",
)
@click.option(
    "--incoming",
    metavar="FILE",
    type=click.Path(allow_dash=True),
    help="Load this state first (- for standard input): the front-end that comes finds the device "
    "as it was saved.",
)
@click.option(
    "--dirty-log",
    metavar="HOW",
    help="How a VMM that migrates is told which memory the device wrote: auto (the device itself, "
    "or shadow vrings), shadow (always those), all (all memory, when the VM stops) or refuse.  "
    "[default: auto]",
)
@click.option(
    "--shadow",
    is_flag=True,
    default=None,
    help="Let requests always pass through shadow vrings: slower, but the bridge then knows which "
    "ones are in flight, whatever becomes of the back-end.",
)
@click.option(
    "--on-disconnect",
    metavar="WHAT",
    help="What becomes of the device when its VMM goes or dies: reset, or keep (suspended, and the "
    "next VMM goes on if it has the same memory and vrings).  [default: reset]",
)
@click.option(
    "--mac",
    metavar="MAC",
    help="Give a vDPA network device this address, the one that the VM's network device has.",
)
@click.option(
    "--without-features",
    metavar="NAMES",
    help="Offer the VMM a device without these features (MQ,SIZE_MAX,...), so that its guest can "
    "move to a back-end that lacks them.",
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
@click.option(
    "--control",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Socket for status, suspend, save and the like.  [default: /run/vhost-bridge/NAME.sock, "
    "or that of the file's name; users other than root: $XDG_RUNTIME_DIR for /run]",
)
@click.option("--no-control", is_flag=True, help="No such socket.")
@click.option(
    "--metrics",
    metavar="ADDRESS",
    help="Serve Prometheus metrics here: 127.0.0.1:9273, [::1]:9273, or the path of a socket.",
)
@click.option(
    "--trace",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write every message, ioctl and event to FILE; vhost-bridge trace show reads it. FILE is "
    "appended to; when it is full it becomes FILE.1 and begins anew.",
)
@click.option(
    "--trace-size",
    type=click.IntRange(1, (1 << 20) - 1),
    metavar="MIB",
    help="When FILE is full.  [default: 64]",
)
@debug_option
@click.pass_context
def serve(
    context: click.Context,
    /,
    config_file: Path | None,
    control: Path | None,
    no_control: bool,
    metrics: str | None,
    trace: Path | None,
    trace_size: int | None,
    **single: Any,
) -> None:
    if control is not None and no_control:
        raise ConfigError(
            "--control and --no-control exclude each other", "without both the usual one is made"
        )

    def configure() -> DaemonConfig:
        config = _daemon_config(single, config_file)
        if control is not None or no_control:
            config = replace(config, control=control)
        return _with_tracing(_with_metrics(config, metrics), trace, trace_size)

    config = configure()
    import logging

    import trio

    from vhostbridge.bridge.daemon import serve as serve_bridges
    from vhostbridge.bridge.journald import log_to

    log_to(sys.stderr, logging.DEBUG if context.ensure_object(Options).debug else logging.INFO)
    trio.run(serve_bridges, config, configure if config_file is not None else None)


def _with_metrics(config: DaemonConfig, address: str | None) -> DaemonConfig:
    if address is None:
        return config
    from vhostbridge.bridge.config import parse_address

    parse_address(address)
    return replace(config, metrics=address)


def _with_tracing(config: DaemonConfig, trace: Path | None, size: int | None) -> DaemonConfig:
    if trace is not None:
        config = replace(config, trace=trace)
    return config if size is None else replace(config, trace_limit=size << 20)


# From the options of a single bridge, by their parameters' names.
def _daemon_config(single: dict[str, Any], config_file: Path | None) -> DaemonConfig:
    from vhostbridge.bridge.config import DaemonConfig, load_config, usual_control

    if config_file is not None:
        given = [name for name, value in single.items() if value is not None]
        if given:
            option = given[0].removeprefix("device_").replace("_", "-")
            raise ConfigError(
                f"--config and --{option} exclude each other",
                "the file says everything of its bridges",
            )
        return load_config(config_file)
    bridge = _bridge_config(single)
    return DaemonConfig(bridges=[bridge], control=usual_control(bridge.name))


def _bridge_config(single: dict[str, Any]) -> BridgeConfig:
    from vhostbridge.backends.virtio import device_id_of
    from vhostbridge.bridge.config import (
        BridgeConfig,
        parse_command,
        parse_feature_names,
        parse_mac,
        parse_mode,
        parse_on_disconnect,
        parse_timeout,
        parse_tracking,
    )

    for name in ("name", "backend"):
        if single[name] is None:
            raise ConfigError(
                f"serve needs --{name}", "or --config with a file that names the bridges"
            )
    mode = single["socket_mode"]
    if mode is not None and single["listen"] is None:
        raise ConfigError("--socket-mode is for a --listen socket")
    patience = single["backend_timeout"]
    return BridgeConfig(
        name=single["name"],
        backend=single["backend"],
        listen=single["listen"],
        connect=single["connect"],
        fd=single["fd"],
        socket_mode=parse_mode(mode or "600"),
        device_id=device_id_of(single["device_type"]) if single["device_type"] else None,
        incoming=single["incoming"],
        tracking=parse_tracking(single["dirty_log"] or "auto"),
        shadow=bool(single["shadow"]),
        on_disconnect=parse_on_disconnect(single["on_disconnect"] or "reset"),
        mac=parse_mac(single["mac"]) if single["mac"] is not None else None,
        backend_timeout=math.inf if patience is None else parse_timeout(patience),
        backend_command=parse_command(command) if (command := single["backend_command"]) else (),
        without_features=parse_feature_names(names)
        if (names := single["without_features"])
        else (),
    )


COMMANDS = (serve,)
