"""A state that waits for a front-end goes from one process to the next."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from vhostbridge.backends.errors import BridgeError, StateError, TargetError
from vhostbridge.backends.state_stream import check_stream

from .incoming import Incoming, Origin
from .state_transfer import pack_state

if TYPE_CHECKING:
    from vhostbridge.backends.device import Device
    from vhostbridge.backends.state_stream import CheckedFd

    from .keeping import Keeper

_log = logging.getLogger("vhostbridge.daemon")


async def leave_state(keeper: Keeper, name: str, device: Device | None, waiting: Incoming) -> bool:
    """Let the process after this one have a state that waits in ``device``, if that is there.

    False, and a line in the log, if it can't be saved or nobody keeps it.
    """
    owner = waiting.state.internal_owner
    try:
        if device is None and owner is not None:
            raise StateError(f"what {owner} had of it is lost")
        with await pack_state(device, waiting.state) as stream:
            if not keeper.keep_state(name, waiting.origin.name, stream):
                raise TargetError("the service manager does not keep it")
    except BridgeError as error:
        _log.error("%s: the waiting state can't be handed over: %s", name, error)
        return False
    _log.info("%s: the waiting state is handed over", name)
    return True


async def find_state(keeper: Keeper, name: str) -> tuple[Incoming, CheckedFd] | None:
    """What the process before left for a bridge, and the stream that it came in.

    ``None`` if there is nothing, or, with a line in the log, if it can't be used.
    """
    if (left := keeper.states.pop(name, None)) is None:
        return None
    origin, fd = left
    with fd:
        try:
            state, stream = await check_stream(fd.dup(), lambda count: None)
        except BridgeError as error:
            _log.error("%s: the waiting state is given up: %s", name, error)
            return None
        return Incoming(state, Origin.__members__.get(origin, Origin.LOADED)), stream
