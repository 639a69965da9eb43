"""What a device is, and the two transports. ``open_device`` is the only place that knows both."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING

from .errors import ConfigError
from .trace import OFF, Tracer

if TYPE_CHECKING:
    from .device import Device

BACKEND_FORMS = (
    "vdpa:NAME, vdpa:/dev/vhost-vdpa-N, vhost-user:SOCKET, vhost-user-listen:SOCKET or "
    "vhost-user-fd:N"
)


def check_backend(uri: str) -> tuple[str, str]:
    """Split a back-end URI into its scheme and the rest.

    Raises:
        ConfigError: it is none of ``BACKEND_FORMS``.
    """
    scheme, colon, rest = uri.partition(":")
    known = scheme in ("vdpa", "vhost-user", "vhost-user-listen", "vhost-user-fd")
    if not colon or not rest or not known or (scheme == "vhost-user-fd" and not rest.isdecimal()):
        raise ConfigError(f"{uri!r} is no back-end", f"a back-end is {BACKEND_FORMS}")
    return scheme, rest


def open_device(
    uri: str, device_id: int | None = None, trace: Tracer = OFF
) -> AbstractAsyncContextManager[Device]:
    """Open the device that a back-end URI names, for the length of an ``async with`` block.

    ``device_id`` is what a vhost-user back-end is, where the caller knows it. ``trace`` is told all
    that is said to the device.

    Raises:
        ConfigError: the URI is malformed.
        TargetError: there is no such device, it is busy, or not permitted.
    """
    scheme, rest = check_backend(uri)
    # Each transport is imported only when it is used: the command line starts faster.
    if scheme == "vdpa":
        from .vdpa.discovery import resolve
        from .vdpa.opening import open_vdpa

        return open_vdpa(uri, resolve(rest).node, trace)
    from .vhostuser import connect

    trace.device_id = device_id
    if scheme == "vhost-user":
        return connect.open_vhost_user(uri, rest, device_id, trace)
    if scheme == "vhost-user-listen":
        return connect.await_vhost_user(uri, rest, device_id, trace)
    return connect.adopt_vhost_user(uri, int(rest), device_id, trace)
