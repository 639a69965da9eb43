"""What one bridge is told: from the command line or from a TOML file with many bridges."""

from __future__ import annotations

import math
import os
import re
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from vhostbridge.backends import check_backend
from vhostbridge.backends.errors import ConfigError
from vhostbridge.backends.virtio import device_id_of

from .tracking import Tracking

#: How large a trace becomes before it is put aside, in bytes.
TRACE_LIMIT = 64 << 20

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}\Z")
_KEYS: Mapping[str, type | tuple[type, ...]] = {
    "name": str,
    "listen": str,
    "connect": str,
    "fd": int,
    "backend": str,
    "socket-mode": str,
    "type": str,
    "dirty-log": str,
    "shadow": bool,
    "on-disconnect": str,
    "mac": str,
    "backend-command": (str, list),
    "backend-timeout": (int, float),
    "without-features": (str, list),
}


class OnDisconnect(Enum):
    """The choice of an operator."""

    #: the device is suspended and reset: the next front-end finds it as new
    RESET = "reset"
    #: the device is suspended and stays so: the next front-end goes on
    KEEP = "keep"


@dataclass(frozen=True, slots=True, kw_only=True)
class BridgeConfig:
    """One bridge: a front-end socket (exactly one of the three) and a back-end URI.

    Attributes:
        device_id: the virtio device type of a vhost-user back-end, which nothing else tells.
        incoming: a file with a state to load before the first front-end comes; "-" for stdin.
        tracking: by what means a migrating front-end is told what the device wrote.
        shadow: requests always pass through shadow vrings.
        on_disconnect: what becomes of the device when its front-end goes.
        mac: the address that a vDPA network device is given, 6 bytes.
        backend_timeout: seconds that a front-end waits for a back-end that went away.
        backend_command: a program that is the back-end, started with the bridge; empty for none.
        without_features: names of what front-ends are not offered, whatever the device has.

    Raises:
        ConfigError: on construction, when something is missing, too much or malformed.
    """

    name: str
    backend: str
    listen: str | None = None
    connect: str | None = None
    fd: int | None = None
    socket_mode: int = 0o600
    device_id: int | None = None
    incoming: str | None = None
    tracking: Tracking = Tracking.AUTO
    shadow: bool = False
    on_disconnect: OnDisconnect = OnDisconnect.RESET
    mac: bytes | None = None
    backend_command: tuple[str, ...] = ()
    backend_timeout: float = math.inf
    without_features: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not _NAME.match(self.name):
            raise ConfigError(
                f"{self.name!r} is no bridge name", "letters, digits, dot, dash and underscore"
            )
        given = [x for x in (self.listen, self.connect, self.fd) if x is not None]
        if len(given) != 1:
            raise ConfigError(
                f"bridge {self.name} needs exactly one of listen, connect and fd",
                "listen: the VMM connects to us; connect: the VMM listens (server=on)",
            )
        scheme, _ = check_backend(self.backend)
        if scheme == "vdpa" and self.device_id is not None:
            raise ConfigError(f"bridge {self.name}: a vDPA device tells its type itself")
        if self.backend_command and scheme not in ("vhost-user", "vhost-user-listen"):
            raise ConfigError(
                f"bridge {self.name}: {self.backend} is no back-end that a command starts",
                "a back-end command goes with vhost-user:SOCKET and vhost-user-listen:SOCKET",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonConfig:
    """What one daemon serves.

    Attributes:
        control: its control socket, ``None`` for none.
        metrics: where Prometheus finds its metrics, ``None`` for nowhere.
        trace: the file that all is traced to, and how many bytes it grows to.
    """

    bridges: list[BridgeConfig]
    control: Path | None = None
    metrics: str | None = None
    trace: Path | None = None
    trace_limit: int = TRACE_LIMIT


def control_folder() -> Path | None:
    """Where control sockets are found; ``None`` for a user without a runtime folder."""
    runtime = "/run" if os.geteuid() == 0 else os.environ.get("XDG_RUNTIME_DIR", "")
    return Path(runtime, "vhost-bridge") if runtime.startswith("/") else None


def usual_control(stem: str) -> Path | None:
    """The control socket of a daemon: called like its bridge, or like its file."""
    folder = control_folder()
    return None if folder is None else folder / f"{stem}.sock"


def parse_mode(text: str) -> int:
    """A socket's permission bits from octal digits.

    Raises:
        ConfigError: it is no such number.
    """
    if not re.fullmatch(r"0?[0-7]{3}", text):
        raise ConfigError(f"{text!r} is no socket mode", "three octal digits, such as 0660")
    return int(text, 8)


def parse_mac(text: str) -> bytes:
    """The bytes of a network device's address.

    Raises:
        ConfigError: it is no address that one device can have.
    """
    if re.fullmatch(r"([0-9a-fA-F]{2}:){5}[0-9a-fA-F]{2}", text):
        mac = bytes.fromhex(text.replace(":", ""))
        if any(mac) and not mac[0] & 1:
            return mac
    raise ConfigError(
        f"{text!r} is no MAC address of a device", "six bytes, such as 52:54:00:12:34:56"
    )


def parse_address(text: str) -> str | tuple[str, int]:
    """Where metrics are served: the path of a socket, or a host and a port.

    Raises:
        ConfigError: it is neither.
    """
    if text.startswith("/"):
        return text
    host, colon, port = text.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(
            f"{text!r} is no address for metrics", "127.0.0.1:9273, [::1]:9273 or /run/metrics.sock"
        )
    return host, int(port)


def parse_tracking(text: str) -> Tracking:
    """The means of dirty logging by its name.

    Raises:
        ConfigError: there is none of that name.
    """
    try:
        return Tracking(text)
    except ValueError:
        names = ", ".join(t.value for t in Tracking)
        raise ConfigError(f"{text!r} is no way to log writes", f"one of {names}") from None


def parse_on_disconnect(text: str) -> OnDisconnect:
    """What becomes of the device of a front-end that goes, by its name.

    Raises:
        ConfigError: there is none of that name.
    """
    try:
        return OnDisconnect(text)
    except ValueError:
        names = ", ".join(one.value for one in OnDisconnect)
        raise ConfigError(
            f"{text!r} is nothing to do when a front-end goes", f"one of {names}"
        ) from None


def parse_timeout(seconds: float) -> float:
    """How long a front-end waits for a back-end that went away, in seconds.

    Raises:
        ConfigError: that is no time.
    """
    if not seconds >= 0:
        raise ConfigError(f"{seconds:g} is no time to wait", "seconds; leave it out for ever")
    return float(seconds)


def parse_command(command: str | Sequence[object]) -> tuple[str, ...]:
    """The words of a command; none of none. Of a shell's ways a string may have the quotes only.

    Raises:
        ConfigError: it has quotes that do not end, or no program.
    """
    if command == ():
        return ()
    try:
        words = shlex.split(command) if isinstance(command, str) else list(command)
    except ValueError as error:
        raise ConfigError(f"{command!r} is no command: {error}") from None
    texts = tuple(word for word in words if isinstance(word, str) and "\0" not in word)
    if not texts or not texts[0] or len(texts) != len(words):
        raise ConfigError(f"{command!r} is no command", "a program and its arguments, as strings")
    return texts


def parse_feature_names(names: str | Sequence[object]) -> tuple[str, ...]:
    """The names of features: a list, or a string with commas between. What they mean depends on
    the type of device, so that it is not known here whether there are such features.

    Raises:
        ConfigError: something else is among them.
    """
    words = names.split(",") if isinstance(names, str) else list(names)
    texts = tuple(word.strip() for word in words if isinstance(word, str) and word.strip())
    if len(texts) != len(words):
        raise ConfigError(f"{names!r} is no list of features", "their names, such as MQ,SIZE_MAX")
    return texts


def load_config(path: Path) -> DaemonConfig:
    """Read a file of ``[[bridge]]`` tables, ``control`` (a path or false for no socket),
    ``metrics`` (an address), and ``trace`` with its ``trace-size`` in MiB.

    Raises:
        ConfigError: it can't be read, is no TOML, or a bridge in it is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
        document = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    tables = document.pop("bridge", None)
    control = document.pop("control", True)
    metrics = document.pop("metrics", None)
    trace, trace_limit = _trace(path, document)
    if document or not isinstance(tables, list) or not tables:
        raise ConfigError(
            f"{path}: expected [[bridge]] tables, control, metrics, trace and trace-size only"
        )
    if metrics is not None:
        _check_metrics(path, metrics)
    if not (isinstance(control, bool) or (isinstance(control, str) and control)):
        raise ConfigError(f"{path}: control must be a path, or false for no control socket")
    bridges = [_bridge(_Place(path, text, n), table) for n, table in enumerate(tables, 1)]
    for key in ("name", "listen"):
        seen = [getattr(bridge, key) for bridge in bridges if getattr(bridge, key) is not None]
        twice = {value for value in seen if seen.count(value) > 1}
        if twice:
            raise ConfigError(f"{path}: {key} {sorted(twice)[0]!r} is used twice")
    place = Path(control) if isinstance(control, str) else None
    if control is True:
        place = usual_control(path.stem)
    return DaemonConfig(
        bridges=bridges, control=place, metrics=metrics, trace=trace, trace_limit=trace_limit
    )


def _check_metrics(path: Path, metrics: object) -> None:
    if not isinstance(metrics, str):
        raise ConfigError(f"{path}: metrics must be an address, such as 127.0.0.1:9273")
    try:
        parse_address(metrics)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}", error.hint) from None


def _trace(path: Path, document: dict[str, object]) -> tuple[Path | None, int]:
    trace, size = document.pop("trace", None), document.pop("trace-size", None)
    if trace is not None and not (isinstance(trace, str) and trace):
        raise ConfigError(f"{path}: trace must be the path of a file")
    if size is not None and not (type(size) is int and 0 < size < 1 << 20):
        raise ConfigError(f"{path}: trace-size must be a number of MiB")
    limit = TRACE_LIMIT if size is None else size << 20
    return None if trace is None else Path(trace), limit


_TABLE = re.compile(r"\s*\[\[\s*bridge\s*\]\]")


@dataclass(frozen=True, slots=True)
class _Place:
    path: Path
    text: str
    number: int

    # With the line of a key, or of the table, where the file is written in the usual way.
    def __call__(self, key: str = "") -> str:
        lines = self.text.splitlines()
        heads = [at for at, line in enumerate(lines, 1) if _TABLE.match(line)]
        if self.number > len(heads):
            return f"{self.path}: bridge {self.number}"
        head, *after = [*heads[self.number - 1 :], len(lines) + 1]
        pattern = re.compile(rf"""\s*["']?{re.escape(key)}["']?\s*=""")
        found = [at for at in range(head + 1, after[0]) if key and pattern.match(lines[at - 1])]
        return f"{self.path}, line {[*found, head][0]}: bridge {self.number}"


def _bridge(place: _Place, table: object) -> BridgeConfig:
    if not isinstance(table, Mapping):
        raise ConfigError(f"{place()} is no table")
    for key, value in table.items():
        kind = _KEYS.get(key)
        if kind is None:
            raise ConfigError(f"{place(key)}: unknown key {key!r}", f"known: {', '.join(_KEYS)}")
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if type(value) not in kinds:
            wanted = " or ".join(one.__name__ for one in kinds)
            raise ConfigError(f"{place(key)}: {key} must be a {wanted}")
    missing = {"name", "backend"} - table.keys()
    if missing:
        raise ConfigError(f"{place()}: {sorted(missing)[0]} is missing")
    try:
        return BridgeConfig(
            name=table["name"],
            backend=table["backend"],
            listen=table.get("listen"),
            connect=table.get("connect"),
            fd=table.get("fd"),
            socket_mode=parse_mode(table.get("socket-mode", "600")),
            device_id=device_id_of(table["type"]) if "type" in table else None,
            tracking=parse_tracking(table.get("dirty-log", "auto")),
            shadow=table.get("shadow", False),
            on_disconnect=parse_on_disconnect(table.get("on-disconnect", "reset")),
            mac=parse_mac(table["mac"]) if "mac" in table else None,
            backend_command=parse_command(table.get("backend-command", ())),
            backend_timeout=parse_timeout(table.get("backend-timeout", math.inf)),
            without_features=parse_feature_names(table.get("without-features", [])),
        )
    except ConfigError as error:
        raise ConfigError(f"{place()}: {error.message}", error.hint) from None
