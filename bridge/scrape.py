"""The endpoint that Prometheus scrapes: as much of HTTP/1.1 as that takes.

Whoever connects is not trusted: what a request may be long, how long it and its answer may take,
and how many there are at a time is limited.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import socket

import trio

from vhostbridge.backends.errors import TargetError
from vhostbridge.backends.vhostuser.sockets import listen, unlisten

from .config import parse_address
from .metrics import Metrics

_log = logging.getLogger("vhostbridge.metrics")

#: The longest request, in bytes.
REQUEST_MAX = 8192
#: How long a request may take to come, and its answer to be taken, in seconds.
PATIENCE = 5.0
#: Connections at a time; one more is closed at once.
CONNECTIONS = 16

_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_REQUEST = re.compile(rb"([A-Z]+) (\S+) HTTP/1\.[01]\r?\n")
_END = re.compile(rb"\r?\n\r?\n")
_TEXT = "text/plain; version=0.0.4; charset=utf-8"


async def _listen(address: str | tuple[str, int]) -> list[trio.socket.SocketType]:
    if isinstance(address, str):
        return [listen(address)]
    host, port = address
    try:
        listeners = await trio.open_tcp_listeners(port, host=host, backlog=CONNECTIONS)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise TargetError(f"cannot listen on {host} port {port}: {reason}") from None
    return [listener.socket for listener in listeners]


async def serve_metrics(
    where: str,
    metrics: Metrics,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve ``metrics`` at an address, as ``parse_address`` takes it, until cancelled.

    Raises:
        TargetError: it can't be had.
        ConfigError: it is none.
    """
    address = parse_address(where)
    listeners = await _listen(address)
    try:
        _log.info("metrics: %s", where)
        task_status.started()
        server = _Server(metrics)
        async with trio.open_nursery() as nursery:
            for listener in listeners:
                nursery.start_soon(server.accept, listener)
    finally:
        for listener in listeners:
            if isinstance(address, str):
                unlisten(listener, address)
            else:
                listener.close()


class _Server:
    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._connections = 0

    async def accept(self, listener: trio.socket.SocketType) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                try:
                    sock, _ = await listener.accept()
                except OSError as error:
                    if error.errno in _EXHAUSTED:
                        _log.error("no metrics: %s", os.strerror(error.errno))
                        await trio.sleep(1)
                    continue
                if self._connections >= CONNECTIONS:
                    sock.close()
                    continue
                self._connections += 1
                nursery.start_soon(self._serve, sock)

    async def _serve(self, sock: trio.socket.SocketType) -> None:
        try:
            with sock:
                request = b""
                with trio.move_on_after(PATIENCE):
                    request = await _request(sock)
                if request:
                    answer = await self._answer(request)
                    with trio.move_on_after(PATIENCE):
                        await _send(sock, answer)
        except OSError:
            pass  # it has gone
        except Exception:
            # A bug of ours costs a scrape, not the bridges theirs.
            _log.exception("internal error, a scrape is not answered")
        finally:
            self._connections -= 1

    async def _answer(self, request: bytes) -> bytes:
        line = _REQUEST.match(request)
        if line is None or not _END.search(request):
            return _response("400 Bad Request", "this is no request of HTTP/1.1\n")
        method, target = line[1], line[2].partition(b"?")[0]
        if target != b"/metrics":
            return _response("404 Not Found", "what there is to see is at /metrics\n")
        if method not in (b"GET", b"HEAD"):
            return _response("405 Method Not Allowed", "GET\n", "Allow: GET, HEAD\r\n")
        return _response("200 OK", await self._metrics.text(), body=method == b"GET")


def _response(status: str, text: str, more: str = "", *, body: bool = True) -> bytes:
    data = text.encode()
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {_TEXT}\r\nContent-Length: {len(data)}\r\n{more}"
        "Connection: close\r\n\r\n"
    ).encode()
    return head + data if body else head


# All up to the empty line, or what there was when it was too long or the peer ended it.
async def _request(sock: trio.socket.SocketType) -> bytes:
    request = b""
    while len(request) < REQUEST_MAX and not _END.search(request):
        data = await sock.recv(REQUEST_MAX - len(request))
        if not data:
            break
        request += data
    return request


async def _send(sock: trio.socket.SocketType, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[await sock.send(left) :]
    sock.shutdown(socket.SHUT_WR)
