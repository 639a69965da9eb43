"""A state that waits for a front-end: in a device, and from one process to the next."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from vhostbridge.backends.errors import BridgeError, StateError, TargetError
from vhostbridge.backends.lifecycle import State
from vhostbridge.backends.state_stream import check_stream

from .incoming import Incoming, Origin
from .state_transfer import load_device, misfits, pack_state

if TYPE_CHECKING:
    from vhostbridge.backends.device import Device
    from vhostbridge.backends.fds import OwnedFd
    from vhostbridge.backends.state import DeviceState
    from vhostbridge.backends.state_stream import CheckedFd

    from .keeping import Keeper

_log = logging.getLogger("vhostbridge.daemon")


class Waiting:
    """The state that waits for a bridge's next front-end, if one does.

    It waits in the bridge's device. One that the process before this one left waits in its stream,
    until a device is there.
    """

    def __init__(self, name: str, keeper: Keeper | None) -> None:
        self._name = name
        self._keeper = keeper
        #: ``None`` if nothing waits. While a front-end is connected its session knows better.
        self.incoming: Incoming | None = None
        self._stream: CheckedFd | None = None

    async def find(self) -> None:
        """See whether the process before left a state; one that can't be used is logged."""
        left = None if self._keeper is None else self._keeper.states.pop(self._name, None)
        if left is None:
            return
        origin, fd = left
        with fd:
            try:
                state, self._stream = await check_stream(fd.dup(), lambda count: None)
            except BridgeError as error:
                _log.error("%s: the waiting state is given up: %s", self._name, error)
                return
        self.incoming = Incoming(state, Origin.__members__.get(origin, Origin.LOADED))

    async def load(self, device: Device) -> None:
        """Let it wait in ``device``, if that is RESET: another one than it was in, or the first.

        It is given up, with a line in the log, if it does not fit or not all of it is known here.

        Raises:
            BridgeError: the device does not tell whether it fits; it waits for another one.
        """
        if self.incoming is None or device.state is not State.RESET:
            return
        state = self.incoming.state
        reasons = await misfits(device, state)
        if state.internal_owner is not None and self._stream is None:
            reasons.append(f"what {state.internal_owner} had of it is lost")
        if not reasons:
            try:
                await self._load(device, state)
            except BridgeError as error:
                reasons.append(str(error))
        self._close_stream()
        if reasons:
            self.incoming = None
            _log.warning("%s: the waiting state is given up: %s", self._name, "; ".join(reasons))

    async def _load(self, device: Device, state: DeviceState) -> None:
        if self._stream is None:
            device.load(state)
        else:
            await load_device(device, state, self._stream, lambda count: None)

    async def leave(self, device: Device | None) -> None:
        """Let the next process have it; ``device`` is the one that it waits in, if that is there.

        It stays, with a line in the log, if it can't be saved or nobody keeps it.
        """
        if self.incoming is None:
            return
        assert self._keeper is not None
        state, origin = self.incoming.state, self.incoming.origin
        try:
            with await self._pack(device, state) as stream:
                if not self._keeper.keep_state(self._name, origin.name, stream):
                    raise TargetError("the service manager does not keep it")
        except BridgeError as error:
            _log.error("%s: the waiting state can't be handed over: %s", self._name, error)
        else:
            _log.info("%s: the waiting state is handed over", self._name)
            self.incoming = None

    # As it came, if no device has taken it. A device is asked only for what it alone has: it may be
    # about to end, too.
    async def _pack(self, device: Device | None, state: DeviceState) -> OwnedFd:
        if self._stream is not None:
            return self._stream.dup()
        if state.internal_owner is None:
            return await pack_state(None, state)
        if device is None:
            raise StateError(f"what {state.internal_owner} had of it is lost")
        return await pack_state(device)

    def _close_stream(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def close(self) -> None:
        """The bridge ends; what still waits is lost."""
        self._close_stream()
        if self.incoming is not None:
            _log.warning("%s: the waiting state is given up: the bridge ends", self._name)
