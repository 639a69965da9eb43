"""A device's state as a stream: saved from a suspended device, loaded into one that fits."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress

from vhostbridge.backends.device import Device
from vhostbridge.backends.errors import PeerError, Unsupported
from vhostbridge.backends.fds import OwnedFd
from vhostbridge.backends.lifecycle import State
from vhostbridge.backends.state import DeviceState, compatibility
from vhostbridge.backends.state_stream import (
    CheckedFd,
    Copy,
    Sink,
    Source,
    load_internal,
    save_stream,
)
from vhostbridge.backends.virtio_config import config_sizes

Progress = Callable[[int], None]


async def save_device(
    device: Device, sink: OwnedFd, progress: Progress, copy: Copy | None = None
) -> int:
    """Write the state of a device to ``sink``, which stays the caller's; returns its bytes.

    The device is SUSPENDED, or RESET: one that never ran may have state of its own too.

    Raises:
        BridgeError: it can't be saved. What was written is no whole stream.
    """
    if device.state is State.RESET:
        state = device.state_of(await device.full_config())
    else:
        state = await device.capture()
    with Sink(sink.dup(), copy) as target:
        if state.internal_owner is None:
            return await save_stream(state, None, target, progress)
        async with AsyncExitStack() as transfer:
            pipe = await transfer.enter_async_context(device.internal_source())
            with _Internal(pipe.dup(), transfer) as internal:
                return await save_stream(state, internal, target, progress)


async def pack_state(device: Device | None, known: DeviceState | None = None) -> OwnedFd:
    """The state of a device as a stream in memory; of one that is not there, what is ``known``.

    Raises:
        BridgeError: it can't be saved.
    """
    stream = OwnedFd(os.memfd_create("device-state", os.MFD_CLOEXEC))
    try:
        if device is not None:
            await save_device(device, stream, lambda count: None)
        elif known is not None:
            with Sink(stream.dup()) as sink:
                await save_stream(known, None, sink, lambda count: None)
        os.lseek(stream.fileno(), 0, os.SEEK_SET)
    except BaseException:
        stream.close()
        raise
    return stream


async def misfits(device: Device, state: DeviceState) -> list[str]:
    """Why a state does not fit a device; all of it."""
    config = await _config_to_compare(device, state)
    return compatibility(state, device.info, device.capabilities, config, device.internal_owner)


async def load_device(
    device: Device, state: DeviceState, checked: CheckedFd, progress: Progress
) -> None:
    """Load a state that fits.

    Raises:
        BridgeError: the device refused its internal state, and is FAILED.
    """
    device.load(state)
    if state.internal_owner is not None:
        async with device.internal_sink() as pipe:
            with Sink(pipe.dup()) as sink:
                await load_internal(checked, sink, progress)


# A vhost-user back-end refuses to be read past the end of what it has, and doesn't say where it is.
async def _config_to_compare(device: Device, state: DeviceState) -> bytes:
    if device.transport == "vdpa":
        return await device.full_config()
    sizes = [len(state.config)] if state.config else []
    if sizes and state.device_id is not None:
        sizes += [n for n in config_sizes(state.device_id, state.features) if n < sizes[0]]
    for size in sizes:
        with suppress(PeerError, Unsupported):
            return await device.read_config(0, size)
    return b""


class _Internal(Source):
    """A back-end's internal state, which counts as whole only when the back-end says so."""

    def __init__(self, fd: OwnedFd, transfer: AsyncExitStack) -> None:
        super().__init__(fd)
        self._transfer = transfer

    async def read_chunk(self) -> bytes:
        """The next piece. At the end the back-end is asked, before anybody believes the stream."""
        data = await super().read_chunk()
        if not data:
            await self._transfer.aclose()
        return data
