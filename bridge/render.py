"""Reports as text for people: columns and wrapped lists, no colours, no control characters."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence

Row = Sequence[str]

# Where the values of inspect's lines start, and how far lists go.
_INDENT = 15
_WIDTH = 96


def table(head: Row, rows: Iterable[Row], indent: str = "") -> Iterator[str]:
    """Lines of aligned columns under a heading; none at all without rows."""
    lines = list(rows)
    if not lines:
        return
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    for line in (head, *lines):
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        yield (indent + "  ".join(cells)).rstrip()


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}


def _items(value: object) -> Sequence[object]:
    return value if isinstance(value, (list, tuple)) else ()


def _words(value: object) -> str:
    return ", ".join(str(item) for item in _items(value))


def holder_text(holder: Mapping[str, object]) -> str:
    """A process: the name of its bridge, or its command, and its pid."""
    pid = holder.get("pid")
    if pid is None:
        return "a process of another user"
    if "bridge" in holder:
        return f"bridge {holder['bridge']} (pid {pid})"
    return f"{_program(holder)} (pid {pid})"


# The kernel cuts the command's name off after 15 bytes.
def _program(holder: Mapping[str, object]) -> str:
    comm = str(holder.get("comm") or "a process")
    first = str(next(iter(_items(holder.get("command"))), "")).rpartition("/")[2]
    return first if len(comm) == 15 and first.startswith(comm) else comm


def _holders(report: Mapping[str, object]) -> str:
    return ", ".join(holder_text(_mapping(one)) for one in _items(report.get("held_by")))


# list


def list_text(report: Mapping[str, object]) -> Iterator[str]:
    """The lines of ``vhost-bridge list``."""
    devices = _mapping(report.get("dev"))
    bridges = [_mapping(one) for one in _items(report.get("bridges"))]
    blocks = (
        table(
            ("MANAGEMENT DEVICE", "CLASSES", "VRINGS"),
            (
                (name, _words(one.get("supported_classes")), str(one.get("max_supported_vqs", "")))
                for name, value in _mapping(report.get("mgmtdev")).items()
                if (one := _mapping(value)) is not None
            ),
        ),
        table(
            ("VDPA DEVICE", "TYPE", "DRIVER", "NODE", "HELD BY"),
            (_device_row(name, _mapping(value)) for name, value in devices.items()),
        ),
        table(
            ("BRIDGE", "PID", "FRONT-END", "BACK-END"),
            (
                (
                    str(one.get("name", "?")),
                    str(one["pid"]),
                    _front_end(one),
                    str(one.get("backend", one.get("config", "?"))),
                )
                for one in bridges
            ),
        ),
    )
    apart = False
    for block in blocks:
        for number, line in enumerate(block):
            if number == 0 and apart:
                yield ""
            apart = True
            yield line


def _device_row(name: str, one: Mapping[str, object]) -> Row:
    used_as = _words(one.get("interfaces"))
    return (
        name,
        str(one.get("type", "?")),
        str(one.get("driver") or "none"),
        str(one.get("node", "")),
        _holders(one) or (f"this host, as {used_as}" if used_as else ""),
    )


def _front_end(bridge: Mapping[str, object]) -> str:
    for key in ("listen", "connect", "fd"):
        if key in bridge:
            return f"{key} {bridge[key]}"
    return "?"


# inspect


def inspect_text(report: Mapping[str, object]) -> Iterator[str]:
    """The lines of ``vhost-bridge inspect``."""
    yield from _identity(report)
    yield from _features(report)
    yield from _config(report)
    yield from _vrings(report)
    yield from _transport(report)
    yield from _abilities(report)
    yield from _statistics(report)


def _line(name: str, value: object) -> Iterator[str]:
    yield from textwrap.wrap(
        str(value),
        _WIDTH,
        initial_indent=name.ljust(_INDENT - 1) + " ",
        subsequent_indent=" " * _INDENT,
        break_on_hyphens=False,
        break_long_words=False,
    )


def _identity(report: Mapping[str, object]) -> Iterator[str]:
    kind = report.get("type", "device of unknown type")
    yield f"{report.get('target')}: {kind}, {report.get('transport')}"
    if report.get("opened") is False:
        yield from _line("not opened", report.get("not_opened"))
        if report.get("not_opened_hint"):
            yield from _line("", report["not_opened_hint"])
        yield from _line("", "what follows is what the kernel tells without opening it")
    for key in ("name", "node", "driver", "interfaces", "mgmtdev", "socket"):
        if report.get(key):
            value = report[key]
            yield from _line(key, _words(value) if isinstance(value, list) else value)
    if "vendor_id" in report:
        yield from _line("vendor id", f"{report['vendor_id']:#x}")
    if "served_by" in report:
        yield from _line("served by", holder_text(_mapping(report["served_by"])))
    if "held_by" in report:
        nobody = "nobody" if report.get("opened") else "nobody that this user may see"
        yield from _line("held by", _holders(report) or nobody)


def _features(report: Mapping[str, object]) -> Iterator[str]:
    features = _mapping(report.get("features"))
    if features:
        yield ""
        yield from _line("features", features.get("mask"))
        yield from _line("  of device", " ".join(map(str, _items(features.get("device")))))
        yield from _line("  to the VMM", " ".join(map(str, _items(features.get("offered")))))
        for name, why in _mapping(features.get("hidden")).items():
            yield from _line("  kept back", f"{name}: {why}")
        if "negotiated" in features:
            yield from _line("  negotiated", " ".join(map(str, _items(features["negotiated"]))))
    protocol = _mapping(report.get("protocol_features"))
    if protocol:
        yield from _line("protocol", protocol.get("mask", "vhost-user, towards the VMM"))
        if "device" in protocol:
            yield from _line("  of back-end", " ".join(map(str, _items(protocol["device"]))))
        yield from _line("  to the VMM", " ".join(map(str, _items(protocol.get("offered")))))


def _config(report: Mapping[str, object]) -> Iterator[str]:
    if "config" in report or "config_problem" in report:
        yield ""
        size = report.get("config_size")
        problem = report.get("config_problem", "")
        yield from _line("config", problem or (f"{size} bytes" if size is not None else "decoded"))
        for name, value in _mapping(report.get("config")).items():
            yield f"  {name.ljust(32)} {value}"


def _vrings(report: Mapping[str, object]) -> Iterator[str]:
    vrings = [_mapping(one) for one in _items(report.get("vrings"))]
    if vrings:
        yield ""
        keys = ("index", "name", "max_size", "group", "descriptor_group")
        shown = [key for key in keys if any(key in vring for vring in vrings)]
        head = ["vring" if key == "index" else key.replace("_", " ") for key in shown]
        yield from table(head, ([str(one.get(key, "")) for key in shown] for one in vrings))
    if "queue_num" in report:
        unit = {"net": " (pairs)", None: " (pairs for net, else vrings)"}.get(_type(report), "")
        yield from _line("queues", f"{report['queue_num']}{unit} to the VMM")


def _type(report: Mapping[str, object]) -> str | None:
    return str(report["type"]) if "type" in report else None


def _transport(report: Mapping[str, object]) -> Iterator[str]:
    if "memory_regions" in report:
        yield from _line("memory regions", f"{report['memory_regions']} at most")
    if "groups" in report:
        yield from _line("groups", f"{report['groups']}, address spaces {report['address_spaces']}")
    if iova := _mapping(report.get("iova")):
        yield from _line("IOVA range", f"{iova['first']}-{iova['last']}")
    if backend := _mapping(report.get("backend_features")):
        yield from _line("vhost-vdpa", " ".join(map(str, _items(backend.get("names")))))


def _abilities(report: Mapping[str, object]) -> Iterator[str]:
    capabilities = _mapping(report.get("capabilities"))
    if capabilities:
        yield ""
        rows = (
            (name.replace("_", " "), str(one["how"]), str(one["why"]))
            for name, value in capabilities.items()
            if (one := _mapping(value))
        )
        yield from table(("can", "how", "why"), rows)
    for number, (verb, reasons) in enumerate(_mapping(report.get("obstacles")).items()):
        if number == 0:
            yield ""
        for reason in _items(reasons):
            yield from _line(f"can't {verb}", reason)


def _statistics(report: Mapping[str, object]) -> Iterator[str]:
    for value in _items(report.get("statistics")):
        vring = _mapping(value)
        yield ""
        yield f"statistics of vring {vring.get('index')} ({vring.get('name')})"
        for name, count in _mapping(vring.get("counters")).items():
            yield f"  {name.ljust(32)} {count}"
