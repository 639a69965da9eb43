"""A bridge's front-end comes from the process before this one, and goes to the next."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from vhostbridge.backends.errors import BridgeError, TargetError

from .handover import Arrival, pack, unpack
from .pauses import Reason

if TYPE_CHECKING:
    from vhostbridge.backends.fds import OwnedFd

    from .journal import Journal
    from .keeping import Keeper
    from .session import Session

_log = logging.getLogger("vhostbridge.daemon")


class Succession:
    """What the service manager keeps of a bridge's front-end while no process serves it."""

    def __init__(self, name: str, keeper: Keeper | None, journal: Journal) -> None:
        self._name = name
        self._keeper = keeper
        self._journal = journal
        #: The front-end that the process before left, until somebody takes it.
        self.arrival: Arrival | None = None

    def find(self) -> None:
        """See whether the process before left a front-end; one that can't be used is logged."""
        box = None if self._keeper is None else self._keeper.sessions.pop(self._name, None)
        try:
            self.arrival = None if box is None else Arrival(box)
        except BridgeError as error:
            _log.error("%s: %s", self._name, error)

    def take(self) -> Arrival:
        """The front-end that arrived, which is the caller's from now on."""
        arrival, self.arrival = self.arrival, None
        assert arrival is not None
        return arrival

    async def take_over(self, arrival: Arrival, session: Session) -> None:
        """Let a new session, whose device is RESET, be what arrived; that is closed.

        Raises:
            BridgeError: it does not fit the device; the front-end can't go on.
        """
        try:
            pause = await unpack(arrival, session, self._journal.pauses)
        finally:
            arrival.close()
        _log.info(
            "%s: front-end (pid %d) taken over, pause %.3g s", self._name, session.peer, pause
        )

    def hand_on(self) -> None:
        """Let the next process have a front-end that nobody has taken here, as it came."""
        if self.arrival is None:
            return
        try:
            self._keep(self.arrival.pack_again())
        except BridgeError as error:
            self._tell_refusal(error)
        else:
            _log.info("%s: front-end handed over as it came", self._name)

    async def hand_over(self, session: Session) -> bool:
        """Let the next process go on with a session that reads no more.

        False, and a line in the log, if that can't be.
        """
        try:
            with self._journal.because(Reason.RESTART):
                self._keep(await pack(session, self._journal.pauses))
        except BridgeError as error:
            self._tell_refusal(error)
            return False
        _log.info("%s: front-end (pid %d) handed over", self._name, session.peer)
        return True

    def _keep(self, box: OwnedFd) -> None:
        assert self._keeper is not None
        with box:
            if not self._keeper.keep_session(self._name, box):
                raise TargetError("the service manager does not keep it")

    def _tell_refusal(self, error: BridgeError) -> None:
        _log.error("%s: the front-end can't be handed over: %s", self._name, error)

    def close(self) -> None:
        """The bridge ends; what arrived and was not taken is closed."""
        if self.arrival is not None:
            self.arrival.close()
