"""The exception tree: whose fault it was, what holds now, and what to do about it.

::

    BridgeError                     anything we report on one line; carries a hint
    ├── InvalidTransition           the caller asked at the wrong time
    ├── Unsupported                 the device lacks what the operation needs
    ├── TargetError                 no such device or socket, busy, not permitted
    ├── ConfigError                 a wrong option, URI or configuration file
    ├── StateError                  a saved state is damaged, too new, or can't be read or written
    ├── PeerError                   the other side broke the vhost-user protocol
    ├── TransportLost               socket or character device went away
    │   └── Unanswered              it is there, and does not answer
    └── KernelRefused               an ioctl or IOTLB write failed; carries errno
"""

from __future__ import annotations

import errno
import os


class BridgeError(Exception):
    """An error that a person can act on.

    ``message`` says what failed and why, in one line; ``hint`` says what to do, or is empty.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class InvalidTransition(BridgeError):
    """The lifecycle table has no such transition; nothing was done."""


class Unsupported(BridgeError):
    """The device, kernel or back-end does not offer what the operation needs."""


class TargetError(BridgeError):
    """A device or socket could not be found or opened."""


class ConfigError(BridgeError):
    """An option, URI or configuration file is wrong; nothing was started."""


class StateError(BridgeError):
    """A device state can't be written, read, or understood; no device was touched for it."""


class PeerError(BridgeError):
    """The peer of a vhost-user socket sent something that the protocol does not allow."""


class TransportLost(BridgeError):
    """The socket or device went away; whether the last operation happened is unknown."""


class Unanswered(TransportLost):
    """A peer that is there did not answer in time; it may still act."""


# 524 is the kernel-internal ENOTSUPP that some vDPA parents let through; of 95, Python may tell the
# other name.
_NAMES = {524: "ENOTSUPP", errno.EOPNOTSUPP: "EOPNOTSUPP"}


def errno_name(code: int) -> str:
    """The name of an error number, as programs print it."""
    return _NAMES.get(code) or errno.errorcode.get(code, str(code))


class KernelRefused(BridgeError):
    """An ioctl or IOTLB write failed; ``errno`` is the kernel's."""

    def __init__(self, operation: str, code: int, hint: str = "") -> None:
        name = errno_name(code)
        text = "not supported by the driver" if code == 524 else os.strerror(code)
        super().__init__(f"{operation}: {text} ({name})", hint)
        self.errno = code


def find_bridge_error(error: BaseException) -> BridgeError | None:
    """The first ``BridgeError`` in ``error``, which may be a (nested) exception group.

    ``None`` when there is none, or when something that is no ``BridgeError`` is in there too:
    that is a bug, and must not hide behind a clean message.
    """
    if isinstance(error, BridgeError):
        return error
    if isinstance(error, BaseExceptionGroup):
        found = [find_bridge_error(inner) for inner in error.exceptions]
        return found[0] if all(found) else None
    return None
