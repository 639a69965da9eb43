"""The daemon: bridges side by side, each in a nursery of its own."""

from __future__ import annotations

import logging
import resource
import signal
from collections.abc import Sequence
from contextlib import suppress

import trio

from vhostbridge.backends import open_device
from vhostbridge.backends.device import Device, State
from vhostbridge.backends.errors import BridgeError, find_bridge_error
from vhostbridge.backends.vhostuser.channel import Channel
from vhostbridge.backends.vhostuser.specs import FRONTEND_SPECS

from .config import BridgeConfig
from .endpoint import Endpoint, open_endpoint
from .handlers import HANDLERS
from .session import Session

_log = logging.getLogger("vhostbridge.daemon")

# A back-end that went away is looked for this often, in seconds.
RETRY = 0.5


class Bridge:
    """One front-end socket and one device. The device stays open from front-end to front-end."""

    def __init__(self, config: BridgeConfig) -> None:
        self.config = config
        self.name = config.name

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve front-ends until cancelled, or until an inherited connection ends.

        Raises:
            BridgeError: the socket or the device could not be opened the first time.
        """
        endpoint = open_endpoint(self.config)
        try:
            started = False
            told = ""
            while True:
                try:
                    async with open_device(self.config.backend) as device:
                        if not started:
                            started = True
                            task_status.started()
                        _log.info("%s: %s is ready", self.name, self.config.backend)
                        if not await self._serve_front_ends(endpoint, device):
                            return
                        _log.error("%s: the back-end failed: %s", self.name, device.failure)
                except (BridgeError, BaseExceptionGroup) as error:
                    cause = find_bridge_error(error)
                    if cause is None or not started:
                        raise
                    if str(cause) != told:
                        told = str(cause)
                        _log.warning("%s: waiting for the back-end: %s", self.name, cause)
                await trio.sleep(RETRY)
        finally:
            endpoint.close()

    # True when the device failed and must be opened anew, False when no front-end can come again.
    async def _serve_front_ends(self, endpoint: Endpoint, device: Device) -> bool:
        while True:
            sock: trio.socket.SocketType | None = None
            with trio.CancelScope() as waiting:
                device.on_failure = lambda reason, scope=waiting: scope.cancel()  # type: ignore[misc]
                sock = await endpoint.next()
                if sock is None:
                    return False
            if sock is not None:
                await self._serve_one(sock, device)
            if device.state is State.FAILED:
                return True

    async def _serve_one(self, sock: trio.socket.SocketType, device: Device) -> None:
        channel = Channel(sock, FRONTEND_SPECS, replies=False, peer="front-end")
        peer = channel.peer_pid
        _log.info("%s: front-end connected (pid %d)", self.name, peer)
        left = False
        try:
            await Session(self.name, channel, device, HANDLERS).run()
            left = True
        except* BridgeError as group:
            _log.error(
                "%s: front-end (pid %d) cut off: %s", self.name, peer, find_bridge_error(group)
            )
        except* Exception:
            # A bug of ours costs this front-end its connection, not the other bridges theirs.
            _log.exception("%s: internal error, front-end (pid %d) cut off", self.name, peer)
        if left:
            _log.info("%s: front-end (pid %d) left", self.name, peer)


def raise_memlock() -> None:
    """Lift RLIMIT_MEMLOCK as far as we may: hardware pins all guest memory, root's too."""
    unlimited = resource.RLIM_INFINITY
    _, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    for limit in ((unlimited, unlimited), (hard, hard)):
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_MEMLOCK, limit)
            return


async def serve(configs: Sequence[BridgeConfig]) -> None:
    """Run bridges until SIGTERM or SIGINT; devices are suspended and reset before it returns.

    Raises:
        BridgeError: a bridge could not start; the others are stopped again.
    """
    raise_memlock()
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:

            async def stop_on_signal() -> None:
                async for number in signals:
                    _log.info("stopping: %s", signal.Signals(number).name)
                    nursery.cancel_scope.cancel()

            async with trio.open_nursery() as bridges:
                nursery.start_soon(stop_on_signal)
                for config in configs:
                    await bridges.start(Bridge(config).run)
                _log.info("serving %d bridge%s", len(configs), "s" if len(configs) > 1 else "")
            nursery.cancel_scope.cancel()
