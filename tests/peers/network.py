"""A network of this host's kernel, in a namespace of its own: a bridge with ports, and a server
that echoes TCP."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.rig.report import checked

from .process import Process

#: The server's address and port, and one for a guest.
SERVER, PORT = "10.77.0.1", 7007
GUEST = "10.77.0.2"

# Interfaces that leave checksums to hardware, which isn't there, would send wrong ones to a guest.
_SERVER = """
import ctypes, fcntl, socket, socketserver, struct, sys
address, port, *interfaces = sys.argv[1:]
with socket.socket() as control:
    for name in interfaces:
        off = ctypes.create_string_buffer(struct.pack("II", 0x17, 0), 8)  # ETHTOOL_STXCSUM
        request = struct.pack("16sP16x", name.encode(), ctypes.addressof(off))
        fcntl.ioctl(control, 0x8946, request)  # SIOCETHTOOL
class Echo(socketserver.BaseRequestHandler):
    def handle(self):
        while data := self.request.recv(65536):
            self.request.sendall(data)
socketserver.ThreadingTCPServer.daemon_threads = True
with socketserver.ThreadingTCPServer((address, int(port)), Echo) as server:
    print("listening", flush=True)
    server.serve_forever()
"""


class Network:
    """As a context manager: there on entry, and gone on exit with all that is in it.

    `ports` are the names of interfaces that programs in the namespace send and receive through.
    """

    def __init__(self, ports: Sequence[str]) -> None:
        #: The namespace, for ip -n.
        self.name = f"vb-{secrets.token_hex(4)}"
        self._ports = ports
        #: The namespace, for nsenter --net.
        self.place = Path("/run/netns", self.name)

    def __enter__(self) -> Self:
        _ip("netns", "add", self.name)
        try:
            self._make()
            argv = [sys.executable, "-c", _SERVER, SERVER, str(PORT)]
            argv += [f"{port}-sw" for port in self._ports]
            self._server = Process(["nsenter", f"--net={self.place}", *argv], name="echo server")
            self._server.wait_for_output("listening")
        except BaseException:
            _ip("netns", "del", self.name)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.__exit__(kind, error, trace)
        _ip("netns", "del", self.name)

    def _make(self) -> None:
        inside = ("-n", self.name)
        _ip(*inside, "link", "add", "switch", "type", "bridge")
        for port in self._ports:
            other = f"{port}-sw"
            _ip(*inside, "link", "add", "name", port, "type", "veth", "peer", "name", other)
            _ip(*inside, "link", "set", "dev", other, "master", "switch")
            for interface in (port, other):
                _ip(*inside, "link", "set", "dev", interface, "up")
        _ip(*inside, "address", "add", f"{SERVER}/24", "dev", "switch")
        _ip(*inside, "link", "set", "switch", "up")


class Seat:
    """A namespace of its own behind a port of a network, where a host with the guest's address is.

    Several have that one address: only one may be plugged in, as if it moved from host to host.
    """

    def __init__(self, network: Network, port: str) -> None:
        self._network, self._port = network, port
        self._name = f"{network.name}-{port}"
        #: The namespace, for nsenter --net.
        self.place = Path("/run/netns", self._name)

    def __enter__(self) -> Self:
        _ip("netns", "add", self._name)
        inside = ("-n", self._name)
        self.unplug()
        _ip("-n", self._network.name, "link", "set", self._port, "netns", self._name)
        _ip(*inside, "link", "set", "lo", "up")
        # Its neighbours need not notice that it moved.
        _ip(*inside, "link", "set", self._port, "address", "52:54:00:77:00:0a", "up")
        _ip(*inside, "address", "add", f"{GUEST}/24", "dev", self._port)
        _ip(*inside, "route", "add", "default", "via", SERVER)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _ip("netns", "del", self._name)

    def set(self, setting: str, value: str) -> None:
        """Change one of its settings of the kernel, by its path below /proc/sys/net."""
        write = 'echo "$1" >"/proc/sys/net/$0"'
        checked(["nsenter", f"--net={self.place}", "sh", "-c", write, setting, value])

    def plug(self) -> None:
        self._set_master("master", "switch")

    def unplug(self) -> None:
        """What it sends is lost from now on, as is what is sent to it."""
        self._set_master("nomaster")

    def _set_master(self, *master: str) -> None:
        _ip("-n", self._network.name, "link", "set", "dev", f"{self._port}-sw", *master)


def _ip(*arguments: str) -> None:
    checked(["ip", *arguments])
