"""Making vhost-user sockets: connect, listen, or take one that was inherited."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
from pathlib import Path

import trio

from vhostbridge.backends.errors import TargetError
from vhostbridge.backends.holders import listening_at, unix_listener

#: Why nobody can be accepted for the moment.
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

# Listening descriptors have numbers from this one on.
HIGH = 512


async def connect(path: str) -> trio.socket.SocketType:
    """Connect to a UNIX stream socket.

    Raises:
        TargetError: nothing listens there, or it is not permitted.
    """
    sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        await sock.connect(path)
        # A full queue of waiting connections is EAGAIN, which trio takes for a connection under
        # way; only a connected socket has a peer.
        sock.getpeername()
    except OSError as error:
        sock.close()
        raise _connect_error(path, error) from None
    except BaseException:
        sock.close()
        raise
    return sock


def _connect_error(path: str, error: OSError) -> TargetError:
    if error.errno == errno.ENOENT:
        return TargetError(f"there is no socket {path}", "start the server first")
    if error.errno == errno.ECONNREFUSED:
        return TargetError(f"nobody listens on {path}", "its server has gone: start it again")
    if error.errno in (errno.EACCES, errno.EPERM):
        return TargetError(f"no permission to connect to {path}", "connecting needs write access")
    if error.errno == errno.ENOTCONN:
        return TargetError(
            f"{path} takes no more connections: too many wait for it already",
            "its server is busy with one of them, or hangs",
        )
    if error.errno is None:  # Python's own: the name does not fit into a socket address
        return TargetError(f"socket path {path} is too long", "107 bytes is the most")
    return TargetError(f"cannot connect to {path}: {os.strerror(error.errno)}")


def listen(path: str, *, mode: int = 0o600) -> trio.socket.SocketType:
    """Bind and listen on ``path``; a socket that a dead server left there is replaced.

    Raises:
        TargetError: a live server has it, something else is there, or it is not permitted.
    """
    _clear_path(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # It has its mode from the beginning: with a chmod the path may be another file by then.
        previous = os.umask(0o777 & ~mode)
        try:
            sock.bind(path)
        finally:
            os.umask(previous)
        sock.listen(8)
    except OSError as error:
        sock.close()
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise TargetError(f"cannot listen on {path}: {reason}") from None
    return trio.socket.from_stdlib_socket(_moved_up(sock))


# The kernel hangs up the connections of a killed process one by one. A front-end that connects
# anew at once may get into the queue of a listener that is still to go, and cloud-hypervisor does
# not try again after that. As measured, descriptors of high numbers go first.
def _moved_up(sock: socket.socket) -> socket.socket:
    try:
        high = fcntl.fcntl(sock.fileno(), fcntl.F_DUPFD_CLOEXEC, HIGH)
    except OSError:
        return sock  # it may not have that many
    sock.close()
    return socket.socket(fileno=high)


def _clear_path(path: str) -> None:
    try:
        status = os.lstat(path)
    except OSError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise TargetError(f"{path} exists and is not a socket", "choose another path or remove it")
    holder = unix_listener(Path(path))
    if holder is not None:
        who = f"process {holder.pid} ({holder.comm})" if holder.pid else "another process"
        raise TargetError(
            f"{path} is in use: {who} listens there", "stop it first or choose another path"
        )
    os.unlink(path)


def unlisten(sock: trio.socket.SocketType, path: str) -> None:
    """Close a listening socket and remove its path, if it is still its own."""
    ours = listening_at(Path(path)) == {os.fstat(sock.fileno()).st_ino}
    sock.close()
    if ours:
        Path(path).unlink(missing_ok=True)


def adopt(fd: int) -> trio.socket.SocketType:
    """A UNIX stream socket, listening or connected, that this process inherited as ``fd``.

    Raises:
        TargetError: it is something else, or not open.
    """
    try:
        sock = socket.socket(fileno=fd)
    except OSError as error:
        reason = os.strerror(error.errno or errno.EBADF)
        raise TargetError(f"descriptor {fd} is no socket: {reason}") from None
    if (sock.family, sock.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
        sock.detach()
        raise TargetError(f"descriptor {fd} is not a UNIX stream socket")
    os.set_inheritable(fd, False)
    return trio.socket.from_stdlib_socket(sock)


def is_listening(sock: trio.socket.SocketType) -> bool:
    """Whether connections are accepted on it."""
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
