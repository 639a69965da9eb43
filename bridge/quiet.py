"""Waiting for a front-end that may be done with its set-up, or not."""

from __future__ import annotations

import select
from collections.abc import Iterable

import trio

# How long a front-end must be silent before an incomplete set-up is taken as complete, in
# seconds. Front-ends send a set-up in one go, microseconds apart.
QUIET = 0.02


async def message_comes_first(channel: int, kicks: Iterable[int]) -> bool:
    """Whether ``channel`` is readable before one of the ``kicks`` is, and within ``QUIET``."""
    # Mostly it is readable already, and a task for each vring would cost more than the message.
    if _readable(channel):
        return True
    first = False
    with trio.move_on_after(QUIET):
        async with trio.open_nursery() as nursery:

            async def wait(fd: int, is_message: bool) -> None:
                nonlocal first
                await trio.lowlevel.wait_readable(fd)
                first = is_message
                nursery.cancel_scope.cancel()

            nursery.start_soon(wait, channel, True)
            for number in set(kicks):
                nursery.start_soon(wait, number, False)
    return first


def _readable(number: int) -> bool:
    poll = select.poll()
    poll.register(number, select.POLLIN)
    return bool(poll.poll(0))


async def either(*events: trio.Event) -> None:
    """Wait for one of several events."""
    async with trio.open_nursery() as nursery:

        async def wait(event: trio.Event) -> None:
            await event.wait()
            nursery.cancel_scope.cancel()

        for event in events:
            nursery.start_soon(wait, event)
