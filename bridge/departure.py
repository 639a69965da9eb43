"""What becomes of a device whose front-end has gone: reset, or kept as it is for the next one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vhostbridge.backends.errors import BridgeError
from vhostbridge.backends.lifecycle import State

from .config import OnDisconnect
from .incoming import Incoming, Origin, strangeness

if TYPE_CHECKING:
    from .device_user import DeviceUser
    from .vring import FrontendVring


async def clear_device(user: DeviceUser, policy: OnDisconnect) -> None:
    """Take the guest's memory from a device whose front-end has gone.

    It is suspended first, so that requests in flight are complete. A state that still waits is for
    the next front-end.

    Raises:
        BridgeError: the device is neither suspended nor reset.
    """
    device = user.device
    waiting = user.incoming
    if waiting is not None and waiting.origin is not Origin.FRONT_END:
        await device.set_memory([])
        return
    user.incoming = None
    if device.state is State.RUNNING:
        await device.suspend()
    keep = policy is OnDisconnect.KEEP and waiting is None
    if keep and device.state is State.SUSPENDED and device.vrings:
        try:
            user.incoming = Incoming(await device.capture(), Origin.KEPT)
        except BridgeError as error:
            user.log.warning("%s: its state can't be kept: %s", user.name, error)
        else:
            user.log.info("%s: kept suspended for the next front-end", user.name)
            await device.set_memory([])
            return
    await device.reset()
    await device.set_memory([])


async def give_up(user: DeviceUser, why: str) -> None:
    """Reset a device that was kept: its front-end begins anew.

    Raises:
        BridgeError: the device can't be reset.
    """
    user.log.info("%s: the kept state is given up: %s", user.name, why)
    user.incoming = None
    await user.device.reset()


async def recognise(user: DeviceUser, features: int, vrings: Sequence[FrontendVring]) -> None:
    """Before the vrings start: if they are not those of the state that was kept, give it up.

    Raises:
        BridgeError: the device can't be reset.
    """
    waiting = user.incoming
    if waiting is None or waiting.origin is not Origin.KEPT:
        return
    setups = [v.setup(user.memory, user.packed) for v in vrings]
    bases = {v.index: v.base for v in vrings}
    why = strangeness(waiting.state, features, setups, bases, user.memory.regions)
    if why:
        await give_up(user, why)
    else:
        user.log.info("%s: the front-end goes on where the device was kept", user.name)
