"""Where the corpora began: one input of each kind. ``python -m tests.fuzz.seeds FOLDER`` writes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.unit.states import SAMPLES, save
from vhostbridge.backends.vdpa.netlink_messages import Command, encode_request
from vhostbridge.backends.vhostuser.messages import HEADER
from vhostbridge.backends.vhostuser.payloads import Empty
from vhostbridge.backends.vhostuser.specs import BACKEND_SPECS, FRONTEND_SPECS

_TOML = """\
control = false
[[bridge]]
name = "vm1"
listen = "/run/vm1.sock"
backend = "vdpa:blk0"
socket-mode = "0660"
dirty-log = "auto"
shadow = true
[[bridge]]
name = "vm2"
connect = "/run/b"
backend = "vhost-user:/run/c"
type = "fs"
"""


def _pieces(data: bytes, size: int = 63) -> bytes:
    parts = [data[at : at + size + 1] for at in range(0, len(data), size + 1)]
    return b"".join(bytes([len(part) - 1 or 64]) + part for part in parts)


def _codec() -> Iterator[bytes]:
    sizes = {16: 2, 40: 3}
    for role, specs in enumerate((FRONTEND_SPECS, BACKEND_SPECS)):
        for request, spec in specs.items():
            size = 0 if spec.payload is Empty else 8
            for length in (size, *sizes):
                header = HEADER.pack(request, 1, length)
                yield (
                    bytes([role | 4, 11 | spec.fds[1] % 4 << 6])
                    + header
                    + (bytes([length - 1]) + bytes(length) if length else b"")
                )


def _varlink() -> Iterator[bytes]:
    for method in ("io.vhostbridge.Control.List", "org.varlink.service.GetInfo"):
        call: dict[str, object] = {
            "method": method,
            "parameters": {},
            "more": True,
            "oneway": False,
        }
        yield b"\1" + _pieces(json.dumps(call).encode() + b"\0")


def seeds() -> dict[str, list[bytes]]:
    """Inputs by harness."""
    samples = [save(*sample) for sample in SAMPLES.values()]
    return {
        "codec": list(_codec()),
        "varlink": list(_varlink()),
        "varlink_call": [
            b'\2{"name":"vm1"}',
            b'\3{"name":"a","path":"/x","fileDescriptor":0}',
            b'\5{"name":"a","backend":"vdpa:x","dryRun":true}',
        ],
        "state": [bytes([kind]) + sample for sample in samples for kind in (2, 255)],
        "config": [_TOML.encode()],
        "netlink": [b"\0" + encode_request(0x20, Command.DEV_GET, [("DEV_NAME", "a")], sequence=1)],
    }


if __name__ == "__main__":
    for name, inputs in seeds().items():
        folder = Path(sys.argv[1], name)
        folder.mkdir(parents=True, exist_ok=True)
        for number, data in enumerate(inputs):
            (folder / f"seed-{number}").write_bytes(data)
