"""SET_DEVICE_STATE_FD and CHECK_DEVICE_STATE: the VMM carries a device's state in its migration.

QEMU saves when the vrings are stopped and the status is 0, and loads before it says anything else
about the guest. What travels is the bridge's own stream, with the back-end's state in it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from vhostbridge.backends.errors import BridgeError, StateError
from vhostbridge.backends.fds import OwnedFd
from vhostbridge.backends.foreign_fds import Kind, kind_of
from vhostbridge.backends.lifecycle import State
from vhostbridge.backends.state_stream import CheckedFd, Copy, check_stream
from vhostbridge.backends.vhostuser.payloads import U64, Payload, StateTransfer
from vhostbridge.backends.vhostuser.transfer import LOAD, SAVE

from .given_state import GivenState
from .incoming import Incoming, Origin
from .state_transfer import Progress, load_device, misfits, save_device

if TYPE_CHECKING:
    from vhostbridge.backends.state import DeviceState
    from vhostbridge.backends.vhostuser.codec import Message

    from .session import Session

# No descriptor comes with the reply: the front-end's is used.
_ACCEPTED, _REFUSED = 0x100, 0x101

# How long a transfer may take in all, and without any progress, in seconds. The VMM stands still
# meanwhile, and the operator waits while the front-end reads.
TRANSFER_SECONDS = 300.0
STALL_SECONDS = 30.0

# How much a front-end may have us keep, in bytes: more than any device is known to have.
STATE_MAX = 1 << 30


class Transfer:
    """One state on its way. ``done`` is set at its end, good or bad."""

    def __init__(self, direction: int, fd: OwnedFd) -> None:
        self.direction = direction
        self.done = trio.Event()
        self.error = ""
        self.loaded: tuple[DeviceState, CheckedFd] | None = None
        self._fd = fd

    async def run(self, session: Session) -> None:
        """Move the bytes; afterwards the descriptor is closed, which is how the peer sees the end.

        Whatever goes wrong is for CHECK_DEVICE_STATE to tell.
        """
        self.error = (
            f"it took more than {TRANSFER_SECONDS:g} s, or stood still for {STALL_SECONDS:g} s"
        )
        end = trio.current_time() + TRANSFER_SECONDS
        try:
            with trio.move_on_after(STALL_SECONDS) as scope:

                def progress(count: int) -> None:
                    scope.deadline = min(end, trio.current_time() + STALL_SECONDS)
                    if self.direction != SAVE and count > STATE_MAX:
                        raise StateError(f"it has more than {STATE_MAX} bytes")

                if self.direction == SAVE:
                    async with session.lock:
                        await _save(session, self._fd, progress)
                else:
                    self.loaded = await check_stream(self._fd.dup(), progress)
                self.error = ""
        except BridgeError as error:
            self.error = str(error)
        finally:
            self._fd.close()
            self.done.set()

    def close(self) -> None:
        """Give up what was read and not loaded."""
        self._fd.close()
        if self.loaded is not None:
            self.loaded[1].close()
            self.loaded = None


# Once it has given all of its own state, a back-end may end.
async def _save(session: Session, fd: OwnedFd, progress: Progress) -> None:
    device, absence = session.device, session.absence
    if absence.copy is not None and absence.copy.device is not device:
        await absence.copy.write(fd, progress)
        return
    absence.keep_copy(None)
    copy = Copy()
    try:
        await save_device(device, fd, progress, copy)
        if (whole := copy.take()) is not None:
            absence.keep_copy(GivenState(device, whole))
    finally:
        copy.close()


async def set_device_state_fd(session: Session, message: Message) -> Payload:
    """Begin a transfer. The reply comes first: a pipe holds less than a state."""
    wanted = message.payload
    assert isinstance(wanted, StateTransfer)
    reason = ""
    if wanted.direction not in (SAVE, LOAD) or wanted.phase != 0:
        reason = f"direction {wanted.direction}, phase {wanted.phase} is unknown"
    elif kind_of(message.fds[0]) not in (Kind.PIPE, Kind.SOCKET, Kind.MEMORY):
        reason = "its descriptor is neither a pipe nor a UNIX socket nor memory"
    elif session.transfer is not None and not session.transfer.done.is_set():
        reason = "another transfer is under way"
    elif session.device.state not in (State.SUSPENDED, State.RESET):
        reason = f"the device is {session.device.state.value}"
    if reason:
        session.log.warning("%s: refused to transfer the state: %s", session.name, reason)
        return U64(_REFUSED)
    session.begin_transfer(Transfer(wanted.direction, message.fds.pop()))
    return U64(_ACCEPTED)


async def check_device_state(session: Session, message: Message) -> Payload:
    """Whether the transfer, which has ended, worked; what was read is loaded now, or nothing is."""
    transfer, session.transfer = session.transfer, None
    if transfer is None:
        return U64(1)
    try:
        if transfer.error:
            raise StateError(transfer.error)
        if transfer.loaded is not None:
            await _load(session, *transfer.loaded)
    except BridgeError as error:
        what = "save" if transfer.direction == SAVE else "load"
        session.log.error("%s: could not %s the state: %s", session.name, what, error)
        return U64(1)
    finally:
        transfer.close()
    return U64(0)


async def _load(session: Session, state: DeviceState, checked: CheckedFd) -> None:
    reasons = await misfits(session.device, state)
    if reasons:
        raise StateError(f"it does not fit {session.device.info.target}: {'; '.join(reasons)}")
    session.absence.keep_copy(None)
    await load_device(session.device, state, checked, lambda count: None)
    # One that never ran has no vrings to go on with.
    session.incoming = Incoming(state, Origin.FRONT_END) if state.vrings else None
