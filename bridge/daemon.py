"""The daemon: bridges side by side, each in a nursery of its own."""

from __future__ import annotations

import logging
import resource
import signal
from contextlib import suppress

import trio

from .bridge import Bridge
from .config import DaemonConfig

_log = logging.getLogger("vhostbridge.daemon")


def raise_memlock() -> None:
    """Lift RLIMIT_MEMLOCK as far as we may: hardware pins all guest memory, root's too."""
    unlimited = resource.RLIM_INFINITY
    _, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    for limit in ((unlimited, unlimited), (hard, hard)):
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_MEMLOCK, limit)
            return


async def serve(config: DaemonConfig) -> None:
    """Run bridges until SIGTERM or SIGINT; devices are suspended and reset before it returns.

    Raises:
        BridgeError: a bridge could not start; the others are stopped again.
    """
    raise_memlock()
    bridges = [Bridge(one) for one in config.bridges]
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:

            async def stop_on_signal() -> None:
                async for number in signals:
                    _log.info("stopping: %s", signal.Signals(number).name)
                    nursery.cancel_scope.cancel()

            async with trio.open_nursery() as running:
                nursery.start_soon(stop_on_signal)
                for bridge in bridges:
                    await running.start(bridge.run)
                if config.control is not None:
                    from .control import serve_control

                    named = {bridge.name: bridge for bridge in bridges}
                    await nursery.start(serve_control, config.control, named)
                _log.info("serving %d bridge%s", len(bridges), "s" if len(bridges) > 1 else "")
            nursery.cancel_scope.cancel()
