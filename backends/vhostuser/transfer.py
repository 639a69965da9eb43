"""A back-end's internal state through SET_DEVICE_STATE_FD and CHECK_DEVICE_STATE."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from vhostbridge.backends.errors import PeerError
from vhostbridge.backends.fds import OwnedFd, close_all
from vhostbridge.backends.foreign_fds import Kind, kind_of

from .client import Client
from .messages import Request
from .payloads import U64, StateTransfer

#: Directions.
SAVE, LOAD = 0, 1

# In the reply: no descriptor comes with it, ours is used.
_NO_FD = 0x100

# How long a back-end may take to say whether the transfer worked, in seconds.
CHECK_SECONDS = 30.0


@asynccontextmanager
async def transfer(client: Client, direction: int) -> AsyncIterator[OwnedFd]:
    """Our end of the pipe that carries the state; the block's end asks whether it was all.

    Raises:
        PeerError: the back-end refused, or says that it failed.
        TransportLost: the back-end went away.
    """
    ours = await _begin(client, direction)
    try:
        yield ours
    finally:
        # The end of the data, for a back-end that reads. One must be asked even when we gave up:
        # only then is it ready for another transfer.
        ours.close()
        answer = 1
        with trio.move_on_after(CHECK_SECONDS, shield=True):
            payload = await client.request(Request.CHECK_DEVICE_STATE)
            assert isinstance(payload, U64)
            answer = payload.value
    if answer:
        done = "save" if direction == SAVE else "load"
        raise PeerError(
            f"back-end {client.target} failed to {done} its internal state (CHECK_DEVICE_STATE "
            f"answered {answer})",
            "its own log says why",
        )


# The back-end may answer with a descriptor of its own, to be used instead of ours.
async def _begin(client: Client, direction: int) -> OwnedFd:
    reader, writer = (OwnedFd(fd) for fd in os.pipe2(os.O_CLOEXEC))
    ours, theirs = (reader, writer) if direction == SAVE else (writer, reader)
    try:
        with theirs:
            payload, fds = await client.exchange(
                Request.SET_DEVICE_STATE_FD, StateTransfer(direction, 0), [theirs]
            )
    except BaseException:
        ours.close()
        raise
    assert isinstance(payload, U64)
    refused = payload.value & 0xFF
    promised = not payload.value & _NO_FD
    if refused or promised != bool(fds):
        close_all([ours, *fds])
        raise PeerError(
            f"back-end {client.target} "
            + ("refused to transfer its state" if refused else "announced a missing descriptor")
            + f" (SET_DEVICE_STATE_FD answered {payload.value:#x})",
            "its own log says why",
        )
    if not fds:
        return ours
    ours.close()
    if kind_of(fds[0]) not in (Kind.PIPE, Kind.SOCKET, Kind.MEMORY):
        fds[0].close()
        raise PeerError(
            f"back-end {client.target} transfers its state through neither pipe nor UNIX socket"
        )
    return fds[0]
