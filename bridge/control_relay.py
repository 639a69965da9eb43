"""A control vring that the guest has: each command passes through the bridge, which so knows what
the device was told, and can tell it again."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

import trio

from vhostbridge.backends.errors import BridgeError, PeerError, TransportLost, Unsupported
from vhostbridge.backends.fds import OwnedFd, signal_eventfds
from vhostbridge.backends.guest import MemoryRegion, VringSetup

from .command_ring import CommandRing
from .control_commands import ERR, OK, command_name
from .control_state import ControlState, refusal
from .guest_commands import GuestCommands
from .shadow_rings import GuestMap

_log = logging.getLogger("vhostbridge.control")


class ControlRelay:
    """Between a guest's control vring and a device's. One task at a time, but for ``start``'s own.

    Attributes:
        vring: the guest's; it has a base while it is not relayed. ``None``: the guest has none.
        known: what the device was told, as far as it agreed.
    """

    def __init__(self, target: str, fail: Callable[[str], None]) -> None:
        self._target = target
        self._fail = fail
        self.vring: VringSetup | None = None
        self.known = ControlState()
        self._features = 0
        self._ring: CommandRing | None = None
        self._guest: GuestCommands | None = None
        self._map = GuestMap()
        self._scope: trio.CancelScope | None = None
        # Held while a command is on its way, which then gets there.
        self._lock = trio.Lock()
        self._thread = trio.CapacityLimiter(1)
        self._call = False

    def introduce(self, ring: CommandRing, features: int) -> None:
        """Tell a device that was just started all that the guest told one. Blocks.

        Raises:
            Unsupported: it refuses.
            TransportLost: it does not answer.
        """
        for command in self.known.commands(features):
            if ring.send(command)[0] != OK:
                raise Unsupported(
                    f"{self._target} refused {command_name(command)}, which the guest's driver "
                    "had set",
                    "its features are those of another device, but it takes less: choose another",
                )

    async def start(
        self,
        nursery: trio.Nursery,
        ring: CommandRing,
        features: int,
        regions: Sequence[MemoryRegion],
    ) -> None:
        """Relay from where ``vring`` is, beginning with what is available already."""
        vring = self.vring
        if vring is None or self._guest is not None or vring.base is None or not vring.enabled:
            return
        self._ring, self._features = ring, features
        self._map.update(regions)
        try:
            self._guest = GuestCommands(features, vring, self._map)
        except Unsupported as error:
            await self._break(error)
            return
        self.vring = replace(vring, base=None)
        self._scope = trio.CancelScope()
        kick = None if vring.kick is None else vring.kick.dup()
        nursery.start_soon(self._serve, self._scope, kick)
        # Interrupts from before may have found nobody.
        await signal_eventfds(vring.call)

    async def stop(self) -> None:
        """Relay no more, when the command on its way is answered; ``vring`` has its base then."""
        async with self._lock:
            if self._scope is not None:
                self._scope.cancel()
                self._scope = None
            if self._guest is not None and self.vring is not None:
                self.vring = replace(self.vring, base=self._guest.base)
                self._guest.close()
            self._guest = None
            self._map.close()

    def forget(self) -> None:
        """The device was reset, or another driver begins: it was told nothing."""
        self.known = ControlState()

    async def _serve(self, scope: trio.CancelScope, kick: OwnedFd | None) -> None:
        try:
            with scope:
                while True:
                    await self._relay(scope)
                    if kick is None:
                        return
                    await trio.lowlevel.wait_readable(kick.fileno())
                    # The guest's side may read it too, and must not make us wait.
                    with suppress(BlockingIOError):
                        os.preadv(kick.fileno(), [bytearray(8)], -1, os.RWF_NOWAIT)
        finally:
            if kick is not None:
                kick.close()

    async def _relay(self, scope: trio.CancelScope) -> None:
        more = True
        while more:
            async with self._lock:
                if scope is not self._scope or self._guest is None:
                    return
                with trio.CancelScope(shield=True):
                    more = await self._one(self._guest)

    async def _one(self, guest: GuestCommands) -> bool:
        try:
            more = await trio.to_thread.run_sync(self._pass, guest, limiter=self._thread)
        except PeerError as error:
            await self._break(error)
            return False
        except TransportLost as error:
            self._fail(str(error))
            return False
        if self._call and self.vring is not None:
            self._call = False
            await signal_eventfds(self.vring.call)
        return more

    # In a thread: a command, if there is one, there and back.
    def _pass(self, guest: GuestCommands) -> bool:
        fetched = guest.fetch()
        if fetched is None:
            return False
        command, room = fetched
        self._call = guest.give(self._answer(command, room)) or self._call
        return True

    def _answer(self, command: bytes, room: int) -> bytes:
        assert self._ring is not None
        if why := refusal(command, self._features):
            _log.warning("%s: refused the guest's %s: %s", self._target, command_name(command), why)
            return bytes((ERR,))
        reply = self._ring.send(command, room)
        if reply[0] == OK:
            self.known = self.known.after(command)
        return reply

    # The guest resets its device then, or not: the other vrings go on.
    async def _break(self, error: BridgeError) -> None:
        _log.error("%s: %s", self._target, error)
        if self.vring is not None:
            await signal_eventfds(self.vring.err)
