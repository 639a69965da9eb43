"""What becomes of a device whose front-end has gone: reset, or kept as it is for the next one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vhostbridge.backends.errors import BridgeError
from vhostbridge.backends.lifecycle import State

from .config import OnDisconnect
from .incoming import Incoming, Origin, strangeness

if TYPE_CHECKING:
    from .session import Session
    from .vring import FrontendVring


async def clear_device(session: Session, policy: OnDisconnect) -> None:
    """Take the guest's memory from a device whose front-end has gone.

    It is suspended first, so that requests in flight are complete. A state that still waits is for
    the next front-end.

    Raises:
        BridgeError: the device is neither suspended nor reset.
    """
    device = session.device
    waiting = session.incoming
    if waiting is not None and waiting.origin is not Origin.FRONT_END:
        await device.set_memory([])
        return
    session.incoming = None
    if device.state is State.RUNNING:
        await device.suspend()
    keep = policy is OnDisconnect.KEEP and waiting is None
    if keep and device.state is State.SUSPENDED and device.vrings:
        try:
            session.incoming = Incoming(await device.capture(), Origin.KEPT)
        except BridgeError as error:
            session.log.warning("%s: its state can't be kept: %s", session.name, error)
        else:
            session.log.info("%s: kept suspended for the next front-end", session.name)
            await device.set_memory([])
            return
    await device.reset()
    await device.set_memory([])


async def give_up(session: Session, why: str) -> None:
    """Reset a device that was kept: its front-end begins anew.

    Raises:
        BridgeError: the device can't be reset.
    """
    session.log.info("%s: the kept state is given up: %s", session.name, why)
    session.incoming = None
    await session.device.reset()


async def recognise(session: Session, features: int, vrings: Sequence[FrontendVring]) -> None:
    """Before the vrings start: if they are not those of the state that was kept, give it up.

    Raises:
        BridgeError: the device can't be reset.
    """
    waiting = session.incoming
    if waiting is None or waiting.origin is not Origin.KEPT:
        return
    setups = [v.setup(session.memory, session.packed) for v in vrings]
    bases = {v.index: v.base for v in vrings}
    why = strangeness(waiting.state, features, setups, bases, session.memory.regions)
    if why:
        await give_up(session, why)
    else:
        session.log.info("%s: the front-end goes on where the device was kept", session.name)
