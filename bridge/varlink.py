"""The varlink protocol without input and output: framing, messages, interfaces, standard errors.

Bytes and descriptors go in, whole messages come out (https://varlink.org/Method-Call). A message
is a JSON object and a NUL; descriptors travel beside it by SCM_RIGHTS, as systemd's do.
"""

from __future__ import annotations

import array
import json
import re
import socket
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn, Protocol

from vhostbridge.backends.errors import BridgeError
from vhostbridge.backends.fds import OwnedFd, close_all

#: The longest message, in bytes, that is taken; its NUL is not counted.
MESSAGE_MAX = 1 << 20
#: The most descriptors that one message may bring.
FDS_MAX = 8
#: Room for more than may come, so that too many are seen as such.
ANCILLARY = socket.CMSG_SPACE(2 * FDS_MAX * array.array("i").itemsize)

Values = Mapping[str, object]


class WireError(BridgeError):
    """The other end of a control socket does not speak varlink, or breaks its limits."""


class VarlinkError(Exception):
    """An error reply: its qualified name and its parameters."""

    def __init__(self, name: str, parameters: Values) -> None:
        super().__init__(f"{name} {json.dumps(parameters)}")
        self.name = name
        self.parameters = parameters


def service_error(name: str, **parameters: str) -> VarlinkError:
    """One of the errors that every service has."""
    return VarlinkError(f"{SERVICE}.{name}", parameters)


# Framing


@dataclass(slots=True)
class Frame:
    """The bytes of one message, and the descriptors that came with it."""

    data: bytes
    fds: list[OwnedFd]


class Framer:
    """Cuts a stream into frames.

    The kernel ends a read behind the piece that carries descriptors, and senders attach them to
    the first byte of a message: they belong to the last message that was begun in their read.

    Descriptors are the framer's until the frame is handed out; after an error, or ``close``, it
    has none.
    """

    def __init__(self) -> None:
        self._begun = bytearray()
        self._fds: list[OwnedFd] = []

    @property
    def at_boundary(self) -> bool:
        """Whether no message is begun."""
        return not self._begun

    def feed(self, data: bytes, fds: Iterable[OwnedFd] = ()) -> list[Frame]:
        """The messages that ``data`` completes, in order. Takes ``fds`` over.

        Raises:
            WireError: a message is too long, or has too many descriptors.
        """
        *ends, rest = data.split(b"\0")
        frames: list[Frame] = []
        brought = list(fds)
        try:
            for end in ends:
                self._grow(end)
                frames.append(Frame(bytes(self._begun), self._fds))
                self._begun, self._fds = bytearray(), []
            self._grow(rest)
            owner = self._fds if rest or not frames else frames[-1].fds
            if len(owner) + len(brought) > FDS_MAX:
                raise WireError(f"sent a message with more than {FDS_MAX} descriptors")
            owner += brought
        except WireError:
            close_all(brought)
            close_frames(frames)
            self.close()
            raise
        return frames

    def _grow(self, data: bytes) -> None:
        if len(self._begun) + len(data) > MESSAGE_MAX:
            raise WireError(f"sent a message of more than {MESSAGE_MAX} bytes")
        self._begun += data

    def close(self) -> None:
        """Forget what was begun. Idempotent."""
        close_all(self._fds)
        self._begun, self._fds = bytearray(), []


def close_frames(frames: Iterable[Frame]) -> None:
    """Close the descriptors of frames that nobody will look at."""
    for frame in frames:
        close_all(frame.fds)


def received_fds(ancillary: Sequence[tuple[int, int, bytes]], flags: int) -> list[OwnedFd]:
    """The descriptors of one ``recvmsg``.

    Raises:
        WireError: there were more than fit; all are closed.
    """
    numbers = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
    fds = [OwnedFd(number) for number in numbers]
    if flags & socket.MSG_CTRUNC:
        close_all(fds)
        raise WireError(f"sent a message with more than {FDS_MAX} descriptors")
    return fds


def sent_fds(fds: Sequence[OwnedFd]) -> list[tuple[int, int, array.array[int]]]:
    """The ancillary data that sends descriptors with ``sendmsg``."""
    numbers = array.array("i", [fd.fileno() for fd in fds])
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)] if fds else []


# Messages


def encode(message: Values) -> bytes:
    """A message as it goes out, its NUL included."""
    return json.dumps(message, separators=(",", ":"), allow_nan=False).encode() + b"\0"


def decode(data: bytes) -> dict[str, object]:
    """The object of a message.

    Raises:
        WireError: it is no JSON object in UTF-8, or nested so deep that nobody means it.
    """
    try:
        value = json.loads(data.decode(), parse_constant=_refuse_constant)
    except RecursionError:
        raise WireError("sent JSON that is nested too deep") from None
    except ValueError:  # also of UTF-8, and of numbers with thousands of digits
        raise WireError("sent something that is no JSON") from None
    if not isinstance(value, dict):
        raise WireError("sent JSON that is no object")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)


@dataclass(frozen=True, slots=True)
class Call:
    """A method call. The descriptors are the holder's to close."""

    method: str
    parameters: Values
    more: bool = False
    oneway: bool = False
    fds: Sequence[OwnedFd] = ()

    def encode(self) -> bytes:
        message: dict[str, object] = {"method": self.method, "parameters": self.parameters}
        message.update({key: True for key in ("more", "oneway") if getattr(self, key)})
        return encode(message)


def decode_call(frame: Frame) -> Call:
    """A frame as a call; ``null`` stands for what was left out. The call has the descriptors.

    Raises:
        WireError: it is no call; the frame still has its descriptors.
    """
    message = decode(frame.data)
    method = message.get("method")
    parameters = message.get("parameters")
    flags = {key: message.get(key) for key in ("more", "oneway", "upgrade")}
    if not isinstance(method, str):
        raise WireError("sent a message that calls no method")
    if not (parameters is None or isinstance(parameters, dict)):
        raise WireError("sent parameters that are no object")
    if any(not (flag is None or isinstance(flag, bool)) for flag in flags.values()):
        raise WireError("sent a flag that is neither true nor false")
    if flags["upgrade"]:
        raise WireError("asked for another protocol")
    return Call(
        method, parameters or {}, more=bool(flags["more"]), oneway=bool(flags["oneway"]),
        fds=frame.fds,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer; ``continues`` when it is not the last one."""

    parameters: Values
    error: str = ""
    continues: bool = False

    def encode(self) -> bytes:
        message: dict[str, object] = {"error": self.error} if self.error else {}
        message["parameters"] = self.parameters
        if self.continues:
            message["continues"] = True
        return encode(message)


def decode_reply(frame: Frame) -> Reply:
    """A frame as a reply.

    Raises:
        WireError: it is no reply.
    """
    message = decode(frame.data)
    parameters = message.get("parameters")
    error = message.get("error")
    if not (parameters is None or isinstance(parameters, dict)):
        raise WireError("sent parameters that are no object")
    if not (error is None or isinstance(error, str)):
        raise WireError("sent an error without a name")
    return Reply(parameters or {}, error or "", continues=message.get("continues") is True)


# Interfaces


class Answering(Protocol):
    """The call that a method answers."""

    @property
    def call(self) -> Call: ...

    @property
    def asked_by(self) -> str:
        """The process that called, for logs."""

    def progress(self, parameters: Values) -> None:
        """Tell the caller how far it is, if it wants to know; the latest of several is enough."""

    async def tell(self, parameters: Values) -> None:
        """Send a reply before the last one of a call with ``more``, once there is room for it."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """What a method takes: ``kind`` is ``str``, ``int``, ``bool`` or ``list`` (of strings)."""

    kind: type
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Method:
    """What answers a method, with values that were checked against ``parameters``."""

    parameters: Mapping[str, Parameter]
    run: Callable[[Answering], Awaitable[Values]]


@dataclass(frozen=True, slots=True)
class Interface:
    """An interface: its definition, and its methods by their short names."""

    name: str
    description: str
    methods: Mapping[str, Method]
    declared: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        declared = re.findall(r"^method (\w+)", self.description, flags=re.MULTILINE)
        object.__setattr__(self, "declared", frozenset(declared))


SERVICE = "org.varlink.service"
SERVICE_DESCRIPTION = """\
# What every varlink service has.
interface org.varlink.service

method GetInfo() -> (
  vendor: string,
  product: string,
  version: string,
  url: string,
  interfaces: []string
)

method GetInterfaceDescription(interface: string) -> (description: string)

error InterfaceNotFound(interface: string)
error MethodNotFound(method: string)
error MethodNotImplemented(method: string)
error InvalidParameter(parameter: string)
error ExpectedMore()
"""


class Service:
    """What one socket offers: its interfaces, and the one that tells of them."""

    def __init__(self, interfaces: Iterable[Interface], info: Mapping[str, str]) -> None:
        own = Interface(
            SERVICE,
            SERVICE_DESCRIPTION,
            {
                "GetInfo": Method({}, self._get_info),
                "GetInterfaceDescription": Method({"interface": Parameter(str)}, self._describe),
            },
        )
        self._info = info
        self._interfaces = {one.name: one for one in (own, *interfaces)}

    def find(self, call: Call) -> Method:
        """The method of a call, whose parameters are checked.

        Raises:
            VarlinkError: there is none, or a parameter is unknown, missing or of another type.
        """
        name, _, short = call.method.rpartition(".")
        interface = self._interface(name)
        if short not in interface.methods:
            known = short in interface.declared
            raise service_error(
                "MethodNotImplemented" if known else "MethodNotFound", method=call.method
            )
        method = interface.methods[short]
        for key in [*call.parameters, *method.parameters]:
            if not _acceptable(call.parameters.get(key), method.parameters.get(key)):
                raise service_error("InvalidParameter", parameter=key)
        return method

    def _interface(self, name: str) -> Interface:
        if name not in self._interfaces:
            raise service_error("InterfaceNotFound", interface=name)
        return self._interfaces[name]

    async def _get_info(self, answering: Answering) -> Values:
        return {**self._info, "interfaces": sorted(self._interfaces)}

    async def _describe(self, answering: Answering) -> Values:
        name = str(answering.call.parameters["interface"])
        return {"description": self._interface(name).description}


def _acceptable(value: object, wanted: Parameter | None) -> bool:
    if wanted is None:
        return False
    if isinstance(value, list) and not all(isinstance(one, str) for one in value):
        return False
    # A bool is an int to Python.
    return wanted.optional if value is None else type(value) is wanted.kind
