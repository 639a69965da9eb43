"""``list`` and ``inspect``: what there is, and what it can do."""

from __future__ import annotations

import click

from .common import (
    complain,
    complete_target,
    debug_option,
    json_option,
    print_json,
    print_lines,
    type_option,
)


@click.command("list")
@json_option
@debug_option
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
        print_json(report)
    else:
        print_lines(list_text(report))
    if "note" in report:
        complain(f"note: {report['note']}", str(report.get("note_hint", "")))


@click.command()
@click.argument("target", shell_complete=complete_target)
@type_option("with it features, vrings and configuration have names")
@json_option
@debug_option
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
        print_json(report)
    else:
        print_lines(inspect_text(report))


COMMANDS = (list_, inspect)
