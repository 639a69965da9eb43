"""The other end of the control interface: what the command line asks daemons with. It blocks."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from vhostbridge.backends import errors
from vhostbridge.backends.errors import BridgeError, TargetError, TransportLost
from vhostbridge.backends.fds import OwnedFd

from .config import control_folder
from .status import BridgeStatus, SwitchReport, from_wire
from .varlink import (
    ANCILLARY,
    Call,
    Framer,
    Reply,
    Values,
    WireError,
    close_frames,
    decode_reply,
    received_fds,
    sent_fds,
)

INTERFACE = "io.vhostbridge.Control"

#: How long a daemon may take to say what it has, in seconds. Operations may take any time.
PATIENCE = 5.0


class Incompatible(BridgeError):
    """A state does not fit a device: all the reasons."""

    def __init__(self, reasons: Sequence[str]) -> None:
        super().__init__(f"the state does not fit: {'; '.join(reasons)}")
        self.reasons = list(reasons)


class ControlClient:
    """A connection to one daemon."""

    def __init__(self, path: Path) -> None:
        """Connect.

        Raises:
            TargetError: no daemon listens there, or it does not let us in.
        """
        self.path = path
        self._framer = Framer()
        self._replies: list[Reply] = []
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.settimeout(PATIENCE)
        try:
            self._sock.connect(str(path))
        except OSError as error:
            self._sock.close()
            raise _connect_error(path, error) from None

    def __enter__(self) -> ControlClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._framer.close()
        self._sock.close()

    def bridges(self, patience: float = PATIENCE) -> list[str]:
        """The names of the daemon's bridges."""
        return [str(name) for name in self._ask("List", patience)["bridges"]]

    def status(self, name: str | None = None) -> list[BridgeStatus]:
        """What is known of one bridge, or of all."""
        self.start("Status", name=name)
        found: list[BridgeStatus] = []
        more = True
        while more:  # daemons tell them one by one, older ones all in one reply
            reply = self.take()
            bridges: Any = reply.parameters["bridges"]
            found += map(from_wire, bridges)
            more = reply.continues
        return found

    def metrics(self) -> str:
        """All metrics in Prometheus' text format."""
        self.start("Metrics")
        text, more = "", True
        while more:
            reply = self.take()
            text += str(reply.parameters["text"])
            more = reply.continues
        return text

    # Several replies to one call

    def fileno(self) -> int:
        """The socket, to wait for replies on."""
        return self._sock.fileno()

    def start(self, method: str, **parameters: object) -> None:
        """Make a call that is answered more than once; ``take`` has the replies."""
        with self._losses():
            self._sock.settimeout(PATIENCE)
            self._sock.sendall(Call(f"{INTERFACE}.{method}", parameters, more=True).encode())

    def take(self) -> Reply:
        """The next reply, for which it waits ``PATIENCE`` at most.

        Raises:
            BridgeError: what the daemon answered, or that it does not.
        """
        with self._losses():
            reply = self._receive()
        if reply.error:
            raise self._error(reply)
        return reply

    @property
    def pending(self) -> bool:
        """Whether a reply is here already."""
        return bool(self._replies)

    def operate(self, method: str, name: str) -> str:
        """``Suspend``, ``Resume`` or ``Reset`` a bridge; returns the state of its device.

        Raises:
            BridgeError: what the daemon answered.
        """
        return str(self._ask(method, None, name=name)["state"])

    def save(self, name: str, sink: OwnedFd, progress: Callable[[int], None]) -> int:
        """Have the state of a bridge written to ``sink``; returns its bytes."""
        call = Call(
            f"{INTERFACE}.Save", {"name": name, "fileDescriptor": 0}, more=True, fds=(sink,)
        )
        return int(self._call(call, None, progress)["bytes"])

    def load(
        self, name: str, source: OwnedFd, progress: Callable[[int], None], *, dry_run: bool = False
    ) -> tuple[str, list[str]]:
        """Have a bridge take a state over; returns its device's state, and why not (dry run).

        Raises:
            Incompatible: it does not fit, and was to be loaded.
            BridgeError: what else the daemon answered.
        """
        parameters = {"name": name, "fileDescriptor": 0, "dryRun": dry_run}
        call = Call(f"{INTERFACE}.Load", parameters, more=True, fds=(source,))
        message = self._call(call, None, progress)
        return str(message["state"]), [str(reason) for reason in message["reasons"]]

    def switch(self, name: str, backend: str, *, dry_run: bool = False) -> SwitchReport:
        """Have a bridge go over to another back-end, or (dry run) tell why not.

        Raises:
            Incompatible: it can't, and was to.
            BridgeError: what else the daemon answered; the device goes on as before.
        """
        parameters = {"name": name, "backend": backend, "dryRun": dry_run}
        answer = self._call(Call(f"{INTERFACE}.Switch", parameters), None, lambda count: None)
        return SwitchReport(
            reasons=_words(answer, "reasons"),
            moved=not dry_run,
            prepare=answer["prepare"],
            phases=answer["phases"],
            state=str(answer["state"]),
        )

    def _ask(self, method: str, timeout: float | None = PATIENCE, **parameters: str | None) -> Any:
        return self._call(Call(f"{INTERFACE}.{method}", parameters), timeout, lambda count: None)

    def _call(
        self, call: Call, timeout: float | None, progress: Callable[[int], None]
    ) -> Mapping[str, Any]:
        with self._losses():
            self._sock.settimeout(timeout)
            data = call.encode()
            self._sock.sendmsg([data], sent_fds(call.fds))  # whole: it blocks, and calls are small
            while (reply := self._receive()).continues:
                count = reply.parameters.get("bytes")
                progress(count if isinstance(count, int) else 0)
        if reply.error:
            raise self._error(reply)
        return reply.parameters

    def _receive(self) -> Reply:
        while not self._replies:
            data, ancillary, flags, _ = self._sock.recvmsg(
                65536, ANCILLARY, socket.MSG_CMSG_CLOEXEC
            )
            if not data:
                raise ConnectionResetError
            frames = self._framer.feed(data, received_fds(ancillary, flags))
            close_frames(frames)  # replies bring no descriptors that we could want
            self._replies += map(decode_reply, frames)
        return self._replies.pop(0)

    @contextmanager
    def _losses(self) -> Iterator[None]:
        try:
            yield
        except TimeoutError:
            raise TargetError(
                f"the daemon at {self.path} does not answer within {PATIENCE:g} s",
                "its process is stopped, or busy",
            ) from None
        except WireError as error:
            raise WireError(f"the daemon at {self.path} {error.message}") from None
        except (BrokenPipeError, ConnectionResetError):
            raise TransportLost(
                f"the daemon at {self.path} closed the connection before it answered",
                "its log says why",
            ) from None
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            raise TransportLost(f"lost the daemon at {self.path}: {reason}") from None

    def _error(self, reply: Reply) -> BridgeError:
        interface, _, name = reply.error.rpartition(".")
        given = reply.parameters
        if (interface, name) == (INTERFACE, "Refused"):
            return _error_of(str(given.get("kind")), str(given["message"]), str(given["hint"]))
        if (interface, name) == (INTERFACE, "NoSuchBridge"):
            return no_such_bridge(str(given["name"]), _words(given, "known"))
        if (interface, name) == (INTERFACE, "Incompatible"):
            return Incompatible(_words(given, "reasons"))
        detail = ", ".join(str(value) for value in given.values())
        return BridgeError(
            f"the daemon at {self.path} answered {name} ({detail})", "is it of another version?"
        )


def _words(given: Values, key: str) -> list[str]:
    value = given.get(key)
    return [str(one) for one in value] if isinstance(value, list) else []


# An error of the class that the daemon had, so that the exit code is the same.
def _error_of(kind: str, message: str, hint: str) -> BridgeError:
    found: object = getattr(errors, kind, BridgeError)
    known = found if isinstance(found, type) and issubclass(found, BridgeError) else BridgeError
    error = known.__new__(known)
    BridgeError.__init__(error, message, hint)
    return error


def no_such_bridge(name: str, known: Sequence[str]) -> TargetError:
    """No daemon has a bridge of this name."""
    there = f"running: {', '.join(known)}" if known else "none runs that this user may control"
    return TargetError(f"no bridge {name!r}", f"{there}; --control PATH asks another daemon")


def _connect_error(path: Path, error: OSError) -> TargetError:
    if isinstance(error, FileNotFoundError):
        return TargetError(f"no daemon at {path}: there is no such socket", "is it running?")
    if isinstance(error, ConnectionRefusedError):
        return TargetError(f"no daemon at {path}: it has gone", "start it again")
    if isinstance(error, PermissionError):
        return TargetError(
            f"no permission to connect to {path}", "only root and the daemon's own user may"
        )
    if isinstance(error, TimeoutError | BlockingIOError):
        return TargetError(f"the daemon at {path} takes no connections", "it hangs, or is stopped")
    reason = os.strerror(error.errno) if error.errno else str(error)
    return TargetError(f"no daemon at {path}: {reason}")


# Finding daemons


def control_sockets() -> list[Path]:
    """The control sockets in the usual folder; those of daemons that died may be among them.

    Raises:
        TargetError: the folder is not ours to look into, or this user has none.
    """
    folder = control_folder()
    if folder is None:
        raise TargetError("this user has no runtime folder", "set XDG_RUNTIME_DIR, or --control")
    try:
        return sorted(path for path in folder.iterdir() if path.suffix == ".sock")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise TargetError(f"cannot look into {folder}: {os.strerror(error.errno or 0)}") from None


def daemon_of(name: str, control: Path | None) -> ControlClient:
    """A connection to the daemon that has the bridge ``name``, at ``control`` if that is given.

    Raises:
        TargetError: there is none.
    """
    if control is not None:
        paths = [control]
    else:
        paths = sorted(control_sockets(), key=lambda path: path.stem != name)
    known: list[str] = []
    problem: BridgeError | None = None
    for path in paths:
        try:
            with ExitStack() as stack:
                client = stack.enter_context(ControlClient(path))
                found = client.bridges()
                if name in found:
                    stack.pop_all()
                    return client
                known += found
        except BridgeError as error:
            # One that has died or hangs matters if it is the one that was meant.
            if control is not None or path.stem == name:
                problem = error
    raise problem or no_such_bridge(name, sorted(known))


def every_daemon(control: Path | None) -> Iterator[ControlClient]:
    """A connection to each daemon in the usual folder, or to the one at ``control``.

    Raises:
        TargetError: the one at ``control`` is not there.
    """
    if control is not None:
        with ControlClient(control) as client:
            yield client
        return
    for path in control_sockets():
        with suppress(TargetError), ControlClient(path) as client:
            yield client


def bridge_names(control: Path | None, patience: float = 0.3) -> list[str]:
    """The names of all bridges of daemons that answer at once, for completion."""
    names: list[str] = []
    with suppress(BridgeError):
        for client in every_daemon(control):
            with suppress(BridgeError):
                names += client.bridges(patience)
    return sorted(names)
