"""Process 1 of the virtual machine: runs the host's commands; knows nothing but Python's library.

One JSON object a line each way, over a virtio-serial port.
Host:  {"op": "start", "id", "argv", "env", "cwd", "tty", "memlock"}, {"op": "signal", "id",
       "signal"}, {"op": "ping"}
Guest: {"event": "ready"}, {"event": "started", "id", "pid"}, {"event": "output", "id", "stream",
       "data"} with base64, {"event": "exit", "id", "status"}, {"event": "pong"}
"""

import base64
import contextlib
import fcntl
import glob
import json
import os
import resource
import selectors
import signal
import termios
import time
from typing import Any

CHUNK = 65536


def open_port(name: str) -> int:
    """Open the virtio-serial port of that name, once it is there; no udev names the nodes."""
    while True:
        for path in glob.glob("/sys/class/virtio-ports/*/name"):
            with open(path) as file:
                if file.read().strip() == name:
                    return os.open(f"/dev/{path.split('/')[-2]}", os.O_RDWR | os.O_CLOEXEC)
        time.sleep(0.01)


class Agent:
    """Commands that run, by the host's number and by pid."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.pids: dict[int, int] = {}  # number → pid, until it is reaped
        self.pipes: dict[int, dict[int, str]] = {}  # number → descriptor → stream
        self.selector = selectors.DefaultSelector()

    def tell(self, event: str, **values: Any) -> None:
        line = memoryview(json.dumps({"event": event, **values}).encode() + b"\n")
        while line:
            line = line[os.write(self.port, line) :]

    def serve(self) -> None:
        woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self.selector.register(woken, selectors.EVENT_READ, ("reap", 0))
        self.selector.register(self.port, selectors.EVENT_READ, ("port", 0))
        self.tell("ready")
        rest = b""
        while True:
            for key, _ in self.selector.select():
                what, number = key.data
                if what == "port":
                    *lines, rest = (rest + os.read(self.port, CHUNK)).split(b"\n")
                    for line in lines:
                        self.obey(json.loads(line))
                elif what == "reap":
                    os.read(woken, CHUNK)
                    self.reap()
                elif key.fd in self.pipes.get(number, {}):
                    self.forward(number, key.fd)

    def obey(self, request: dict[str, Any]) -> None:
        if request["op"] == "ping":
            self.tell("pong")
        elif request["op"] == "start":
            self.start(request)
        elif request["op"] == "signal" and request["id"] in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pids[request["id"]], request["signal"])

    def start(self, request: dict[str, Any]) -> None:
        number = request["id"]
        out, err = os.pipe2(os.O_CLOEXEC), os.pipe2(os.O_CLOEXEC)
        pid = os.fork()
        if pid == 0:
            become(request, out[1], err[1])
        self.pids[number] = pid
        self.pipes[number] = {out[0]: "stdout", err[0]: "stderr"}
        os.close(out[1])
        os.close(err[1])
        for descriptor in (out[0], err[0]):
            os.set_blocking(descriptor, False)
            self.selector.register(descriptor, selectors.EVENT_READ, ("output", number))
        self.tell("started", id=number, pid=pid)

    def forward(self, number: int, descriptor: int) -> bool:
        """Pass on one piece of output; say whether there may be more now."""
        try:
            data = os.read(descriptor, CHUNK)
        except BlockingIOError:
            return False
        if data:
            text = base64.b64encode(data).decode()
            stream = self.pipes[number][descriptor]
            self.tell("output", id=number, stream=stream, data=text)
        else:
            self.selector.unregister(descriptor)
            os.close(descriptor)
            del self.pipes[number][descriptor]
        return bool(data)

    def reap(self) -> None:
        numbers = {pid: number for number, pid in self.pids.items()}
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            number = numbers.get(pid)
            if number is None:
                continue  # an orphan
            for descriptor in list(self.pipes[number]):
                while self.forward(number, descriptor):
                    pass
            del self.pids[number]
            self.tell("exit", id=number, status=os.waitstatus_to_exitcode(status))


def become(request: dict[str, Any], out: int, err: int) -> None:
    """Turn this forked child into the command; never returns."""
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        os.setsid()
        tty = request.get("tty")
        standard = os.open(tty or "/dev/null", os.O_RDWR)
        os.dup2(standard, 0)
        if tty:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        os.dup2(0 if tty else out, 1)
        os.dup2(0 if tty else err, 2)
        if request.get("memlock"):
            infinite = resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (infinite, infinite))
        os.chdir(request.get("cwd") or "/root")
        argv, env = request["argv"], {**os.environ, **request.get("env", {})}
        os.execvpe(argv[0], argv, env)
    except BaseException as error:
        os.write(2, f"{request['argv'][0]}: {error}\n".encode())
    finally:
        os._exit(127)


if __name__ == "__main__":
    Agent(open_port("rig.agent")).serve()
