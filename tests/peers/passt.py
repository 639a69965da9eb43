"""passt: user-mode networking behind vhost-user, which knows the guest's connections itself."""

from __future__ import annotations

from pathlib import Path

from tests.rig.root import peer_argv, root_folder

from .network import Seat

# passt takes one helper, and lets it go with each front-end and after each state: there is always
# another one, until passt ends.
_WITH_HELPER = (
    'while kill -0 $$; do passt-repair "$0.repair"; sleep 0.02; done >/dev/null 2>&1 & exec "$@"'
)


# What its state begins with.
_MAGIC = bytes.fromhex("b1bb1d1b0bb1d1b0")


def keep_moving(seat: Seat) -> None:
    """Keep the connections that a passt in `seat` is given from standing still.

    passt (2025-05) counts what to acknowledge to the guest from the connection's beginning by what
    the kernel counts from the move on, unless the socket's send buffer is below 128 KiB.
    """
    seat.set("ipv4/tcp_wmem", "4096 16384 131071")


def passt_command(
    socket: Path,
    seat: Seat,
    *,
    helper: bool = True,
    debug: bool = False,
    program: str | Path = "passt",
) -> list[str]:
    """The command that serves a guest with what `seat` has of the network.

    With `helper`, which puts sockets into repair mode, connections can go to another passt. With
    `debug` it tells of each that it gives or takes, and of all else that it does.
    """
    argv: list[str | Path] = [
        *(program, "--foreground", "--vhost-user", "--socket", socket),
        *("--runas", "0", "--ipv4-only", "--no-map-gw", *(["--debug"] if debug else [])),
    ]
    if helper:
        argv = ["sh", "-c", _WITH_HELPER, socket, *argv]
    inner = peer_argv(argv, die_with_parent=True, pivot=True)
    return ["nsenter", f"--net={seat.place}", *inner]


def copy_passt(folder: Path, *, other_states: bool = False) -> Path:
    """passt's build for every processor, by itself in `folder`.

    With `other_states` it refuses those of passt, as one of a version that has others.
    """
    content = (root_folder() / "usr/bin/passt").read_bytes()
    assert _MAGIC in content
    program = folder / "passt"
    program.write_bytes(content.replace(_MAGIC, _MAGIC[::-1]) if other_states else content)
    program.chmod(0o755)
    return program
