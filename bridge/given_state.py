"""A state that the front-end has been given, until its device runs again.

A back-end may end with that: passt does, since the guest's connections are elsewhere then. If the
guest goes on here after all, because its migration failed, the next back-end is given them.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vhostbridge.backends.errors import StateError
from vhostbridge.backends.state_stream import Sink, Source, check_stream

from .state_transfer import load_device, misfits

if TYPE_CHECKING:
    from vhostbridge.backends.device import Device
    from vhostbridge.backends.fds import OwnedFd

    from .state_transfer import Progress


class GivenState:
    """Owns ``copy``, a file with the whole stream.

    Args:
        device: what it was saved from, and what can go on by itself while it is there.
    """

    def __init__(self, device: Device, copy: OwnedFd) -> None:
        self.device = device
        #: Where the vrings stopped.
        self.state = device.state_of(b"")
        self._copy = copy

    async def load(self, device: Device) -> None:
        """Let ``device``, which is RESET, go on from there.

        Raises:
            BridgeError: it does not fit, or was refused; the device has failed then.
        """
        state, checked = await check_stream(self._again(), lambda count: None)
        with checked:
            if reasons := await misfits(device, state):
                raise StateError(f"the state does not fit {device.info.target}: {reasons[0]}")
            await load_device(device, state, checked, lambda count: None)

    async def write(self, to: OwnedFd, progress: Progress) -> None:
        """Give it once more."""
        with Source(self._again()) as source, Sink(to.dup()) as sink:
            written = 0
            while data := await source.read_chunk():
                await sink.write(data)
                written += len(data)
                progress(written)

    def _again(self) -> OwnedFd:
        os.lseek(self._copy.fileno(), 0, os.SEEK_SET)
        return self._copy.dup()

    def close(self) -> None:
        self._copy.close()
