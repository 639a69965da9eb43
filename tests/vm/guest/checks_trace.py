"""What a trace says of a vDPA device's calls is what strace saw of them."""

from __future__ import annotations

import contextlib
import re
import struct
import time
from pathlib import Path

from vhostbridge.backends.errors import KernelRefused
from vhostbridge.backends.trace import Item, Tracer
from vhostbridge.backends.vdpa import tracing
from vhostbridge.backends.vdpa.chardev import Chardev
from vhostbridge.bridge.trace import format as trace_format
from vhostbridge.bridge.trace.entry import Entry, parse
from vhostbridge.bridge.trace.reader import read
from vhostbridge.native import lib

from . import libblkio
from .checks_model import resume, suspend
from .devices import block_device, serving
from .libblkio import USER

MIB = 1 << 20
# Whole, or its two halves where another thread came between.
CALL = re.compile(
    r"(?P<pid>\d+) +(?P<call>ioctl|write|openat|close)\((?P<arguments>.*?)"
    r"(?P<end>\) += (?P<result>-?\d+)(<.*?>)?( (?P<errno>E\w+))?.*| <unfinished \.\.\.>)$"
)
RESUMED = re.compile(r"(?P<pid>\d+) +<\.\.\. \w+ resumed>(?P<rest>.*)$")
Call = tuple[str, int, str]


def joined(text: str) -> list[str]:
    """Lines of strace, each call in one, in the order in which they ended."""
    begun: dict[str, str] = {}
    lines = []
    for line in text.splitlines():
        if resumed := RESUMED.match(line):
            lines.append(begun.pop(resumed["pid"]) + resumed["rest"])
        elif line.endswith("<unfinished ...>"):
            begun[line.split()[0]] = line.removesuffix(" <unfinished ...>")
        else:
            lines.append(line)
    return lines


def seen_by_strace(text: str) -> list[Call]:
    """Name, result and error of each call on the device."""
    calls: list[Call] = []
    kinds = {
        getattr(lib, f"VHOST_IOTLB_{kind}"): f"VHOST_IOTLB_{kind}"
        for kind in ("UPDATE", "INVALIDATE", "BATCH_BEGIN", "BATCH_END")
    }
    for line in joined(text):
        found = CALL.match(line)
        if found is None:
            continue
        what = found["arguments"].split(", ")
        result = int(found["result"])
        name = {"openat": "open", "close": "close"}.get(found["call"], "")
        if found["call"] == "ioctl":
            name = tracing.names()[int(what[1], 16)]
        elif found["call"] == "write":
            data = bytes.fromhex(what[1].strip('"').replace("\\x", ""))
            name = kinds[struct.unpack("=IIQQQBB38x", data)[6]]
            result = 0 if result == len(data) else result
        elif name == "open":
            result = min(result, 0)
        calls.append((name, result, found["errno"] or ""))
    return calls


def traced(entries: list[Entry]) -> list[Call]:
    return [(e.name, e.result, e.errno) for e in entries if e.kind == "ioctl"]


def check_trace_has_every_call_that_strace_saw() -> None:
    """A load, suspended and resumed; opened, programmed, mapped, unmapped, reset and closed."""
    path, log = Path("/tmp/it.trace"), Path("/tmp/it.strace")
    for file in (path, log):
        file.unlink(missing_ok=True)
    with block_device() as node:
        strace = ["strace", "-D", "-f", "--seccomp-bpf", "-X", "raw", "-xx", "-s", "80"]
        strace += ["-P", node, "-e", "trace=ioctl,write,openat,close", "-e", "signal=none"]
        with serving(
            ("it", "vdpa:blk0"),
            prefix=[*strace, "-o", str(log)],
            more=["--trace", str(path)],
            patience=120,  # a process of its own, and watched
        ) as bridge:
            libblkio.run(USER, bridge.socket, "write-read", size=4 * MIB, depth=8, seed=3)
            libblkio.run(USER, bridge.socket, "fill", size=4 * MIB, depth=8, seed=4)
        deadline = time.monotonic() + 20
        while "exited with" not in log.read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
    entries = [entry for entry, _ in read(str(path), note=lambda text: None)]
    expected, found = seen_by_strace(log.read_text()), traced(entries)
    assert found == expected, (found, expected, log.read_text()[-4000:])
    names = {name for name, _, _ in found}
    assert names >= {
        *("open", "close", "VHOST_SET_OWNER", "VHOST_SET_FEATURES", "VHOST_VDPA_SUSPEND"),
        *("VHOST_IOTLB_UPDATE", "VHOST_IOTLB_INVALIDATE", "VHOST_GET_VRING_BASE"),
    }, names
    assert all(e.duration > 0 and e.receiver == node for e in entries if e.kind == "ioctl")
    assert {e.bridge for e in entries if e.kind == "ioctl"} == {"it"}
    features = next(e.fields for e in entries if e.name == "VHOST_SET_FEATURES")
    assert features and "ACCESS_PLATFORM" in str(features["names"]), features
    assert "bit_" not in str(features["names"]), features


def check_refused_calls_are_traced_with_their_error() -> None:
    trace, items = Tracer("it"), list[Item]()
    trace.attach(items.append)
    with block_device() as node:
        device = Chardev(Path(node), trace)
        for index, size in ((0, 3), (1000, 2)):
            with contextlib.suppress(KernelRefused):
                device.set_vring_num(index, size)
        with contextlib.suppress(KernelRefused):
            device.iotlb_unmap(0x1000, 0x1000, asid=1 << 20)
        device.close()
    found = traced([parse(line) for item in items for line in trace_format.lines(item)])
    assert [found[0], found[1], found[-1]] == [
        ("open", 0, ""),
        ("VHOST_SET_OWNER", 0, ""),
        ("close", 0, ""),
    ]
    assert found[2:4] == [
        ("VHOST_SET_VRING_NUM", -1, "EINVAL"),
        ("VHOST_SET_VRING_NUM", -1, "ENOBUFS"),
    ], found
    assert found[4][:2] == ("VHOST_IOTLB_INVALIDATE", -1) and found[4][2], found


def check_trace_of_an_operators_suspend() -> None:
    """The daemon's own events stand between the calls that they brought about."""
    path = Path("/tmp/op.trace")
    path.unlink(missing_ok=True)
    with block_device(), serving(("op", "vdpa:blk0"), more=["--trace", str(path)]) as bridge:
        load = libblkio.start(USER, bridge.socket, "randread", seconds=60)
        try:
            bridge.wait_for("running vrings")
            suspend("op")
            resume("op")
        finally:
            libblkio.kill(load)
    entries = [entry for entry, _ in read(str(path), note=lambda text: None)]
    names = [e.name for e in entries]
    text = [str((e.fields or {}).get("text")) for e in entries]
    asked = next(n for n, t in enumerate(text) if t.startswith("suspend asked for"))
    done, again = text.index("suspended"), text.index("resumed")
    assert "VHOST_VDPA_SUSPEND" in names[asked:done], names[asked:done]
    assert "VHOST_VDPA_RESUME" in names[done:again], names[done:again]
    states = [(e.fields or {})["now"] for e in entries[asked:again] if e.name == "state"]
    assert states == ["suspended", "running"], states
