"""``conform``: whether a device keeps the contracts of suspend, resume, save and load."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import click

from .common import (
    REFUSED,
    complete_target,
    debug_option,
    json_option,
    print_json,
    print_lines,
    type_option,
)

if TYPE_CHECKING:
    from vhostbridge.bridge.conform.outcome import Conformance
    from vhostbridge.bridge.conform.plan import Allowed


def _complete_contract(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[str]:
    from vhostbridge.bridge.conform.contracts import CONTRACTS

    return [one.name for one in CONTRACTS if one.name.startswith(incomplete)]


@click.command()
@click.argument("target", shell_complete=complete_target)
@type_option("block and net devices are given requests")
@click.option(
    "--write",
    is_flag=True,
    help="Write to the last 256 KiB of a block device too. Their content is kept in a file "
    "meanwhile, and put back at the end.",
)
@click.option(
    "--traffic",
    is_flag=True,
    help="Have a network device transmit frames, to its own address, and receive.",
)
@click.option(
    "-c",
    "--contract",
    "contracts",
    metavar="NAME",
    multiple=True,
    shell_complete=_complete_contract,
    help="Try this one only; may be given several times. All are tried otherwise.",
)
@json_option
@debug_option
@click.pass_context
def conform(
    context: click.Context,
    target: str,
    device_type: str | None,
    write: bool,
    traffic: bool,
    contracts: tuple[str, ...],
    as_json: bool,
) -> None:
    """Check whether a device keeps the contracts of suspend, resume, save and load.

    TARGET is a device or back-end that nobody uses: the name of a vDPA device, a
    /dev/vhost-vdpa-N, the path of a vhost-user socket, or any back-end that serve takes.

    Each contract is tried with a small virtio driver, and the table says pass, fail, or not
    offered by the device; each fail comes with its evidence. Block devices are read; without
    --write nothing is written to them, and without --traffic a network device sends nothing. Of
    other types, vrings without requests are tried.

    The device is left as it was found: reset and without memory. Where that can't be, the last
    line says so; a back-end made for one connection (virtiofsd) ends with it.

    The exit code is 0 if no contract failed, 1 if one did.

    \b
    Examples:
      vhost-bridge conform blk0
      vhost-bridge conform /run/blk.sock --type block --write
      vhost-bridge conform -j vdpa:net0 --traffic | jq .summary
    """
    from vhostbridge.bridge.conform.plan import Allowed
    from vhostbridge.bridge.conform.report import conform_report, conform_text

    conformance = _run(target, device_type, Allowed(write, traffic), contracts)
    if as_json:
        print_json(conform_report(conformance))
    else:
        print_lines(conform_text(conformance))
    if conformance.failed:
        context.exit(REFUSED)


def _run(
    target: str, device_type: str | None, allowed: Allowed, names: tuple[str, ...]
) -> Conformance:
    import trio

    from vhostbridge.backends.virtio import device_id_of
    from vhostbridge.bridge.conform.contracts import named
    from vhostbridge.bridge.conform.runner import conform as check

    device_id = None if device_type is None else device_id_of(device_type)
    contracts = named(names)
    try:
        with _progress() as progress:
            return trio.run(
                partial(check, target, device_id, allowed, contracts=contracts, progress=progress)
            )
    except BaseExceptionGroup as error:
        # An interrupt arrives where the device is open, among its tasks.
        if error.subgroup(KeyboardInterrupt) is None:
            raise
        raise KeyboardInterrupt from None


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    if not sys.stderr.isatty():
        yield lambda what: None
        return
    erase = "\r\x1b[K"
    yield lambda what: click.echo(f"{erase}{what}", nl=False, err=True)
    click.echo(erase, nl=False, err=True)


COMMANDS = (conform,)
