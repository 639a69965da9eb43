"""How fast a peer is served. Whoever asks for more than any real one does waits, alone."""

from __future__ import annotations

import trio


class Pace:
    """So many things at once, and after that so many a second.

    Args:
        rate: a second.
        burst: that may come at once, after a while in which little came.
    """

    def __init__(self, rate: float, burst: int) -> None:
        self._rate = rate
        self._burst = burst
        self._left = float(burst)
        self._when: float | None = None

    def _refill(self) -> None:
        now = trio.current_time()
        if self._when is not None:
            self._left = min(self._burst, self._left + (now - self._when) * self._rate)
        self._when = now

    async def take(self, count: int = 1) -> None:
        """Wait for the turn of one thing, or of one that counts for several. Cancelled, it has had
        its turn.
        """
        self._refill()
        self._left -= count
        if self._left < 0:
            await trio.sleep(-self._left / self._rate)

    def spare(self) -> bool:
        """Whether it is one thing's turn now; if so it has had it."""
        self._refill()
        if self._left < 1:
            return False
        self._left -= 1
        return True
