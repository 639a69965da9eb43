"""How long a front-end waits after each kind of crash: until its next request is complete. And how
long it waits while its device is moved.

A client writes and reads without a pause while one process is killed. Its slowest request tells how
long it waited; where the client itself has to come again, the time until a new request is complete.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tests.host.test_backend_command import starting
from tests.peers import blkio
from tests.peers.bridge import Bridge
from tests.peers.manager import Manager
from tests.peers.process import Process
from tests.peers.storage import StorageDaemon, make_image
from tests.vm.guest.frontend import Frontend
from tests.vm.guest.survivor import BLOCKS, IN, Driver, connect

from .measure import distribution, table

ROUNDS = 20
MOVES = 100
LOAD: dict[str, object] = {"size": 4 << 20, "depth": 8, "seed": 1}


def _fill(socket: Path, folder: Path) -> None:
    blkio.run(socket, "fill", size=4 << 20, seed=1, state=folder / "state")


def _slowest(
    socket: Path, folder: Path, crash: Callable[[], object], seconds: float = 1.5
) -> float:
    """The slowest of the requests around a crash, or something else, in ms."""
    options = LOAD | {"state": folder / "state", "seconds": seconds}
    with blkio.start(socket, "write-read", **options) as client:
        client.wait_for_output(blkio.RUNNING)
        time.sleep(0.1)
        crash()
        return float(blkio.finish(client)["max_ns"]) / 1e6


def back_end(folder: Path, *, crash: bool) -> Iterator[float]:
    """It is killed, and the bridge starts it again; or it is not, and that is what to compare."""

    def kill() -> None:
        pid = bridge.status().backend_pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)

    with starting(make_image(folder / "image"), folder, "--shadow") as bridge:
        _fill(bridge.listen, folder)
        for _ in range(ROUNDS):
            yield _slowest(bridge.listen, folder, kill if crash else lambda: None)


def restarted_daemon(folder: Path) -> Iterator[float]:
    """No crash: ended and started by a service manager that keeps descriptors."""
    listen = folder / "vm.sock"
    with StorageDaemon(make_image(folder / "image"), folder / "disk") as disk, Manager(folder) as m:
        arguments: list[str | Path] = ["--name", "vm", "--backend", f"vhost-user:{disk.socket}"]
        arguments += ["--listen", listen, "--control", folder / "control"]
        daemons = [m.start(*arguments)]

        def restart() -> None:
            end(daemons.pop())
            daemons.append(m.start(*arguments))

        _fill(listen, folder)
        for _ in range(ROUNDS):
            yield _slowest(listen, folder, restart)
        end(daemons.pop())


def end(daemon: Process) -> None:
    assert daemon.terminate() == 0, daemon.output
    daemon.kill()


def _one_request(driver: Driver) -> None:
    driver.offer(IN, next(block for block in range(BLOCKS) if block not in driver.taken))
    driver.settle()


def front_end(folder: Path) -> Iterator[float]:
    """The next one comes, and its device was kept for it (`--on-disconnect keep`)."""
    with StorageDaemon(make_image(folder / "image"), folder / "disk") as disk:
        keep = ["--on-disconnect", "keep"]
        listen = folder / "vm.sock"
        with Bridge(f"vhost-user:{disk.socket}", listen=listen, arguments=keep) as bridge:
            driver = Driver(str(folder / "memory"))
            for _ in range(ROUNDS + 1):
                log = len(bridge.output)
                began = time.perf_counter()
                with connect(str(listen), driver):
                    _one_request(driver)
                    yield (time.perf_counter() - began) * 1e3
                bridge.wait_for_output("kept suspended", start=log)


def daemon(folder: Path) -> Iterator[float]:
    """It is started again at once, and the front-end connects again until it can."""
    listen = folder / "vm.sock"
    driver = Driver(str(folder / "memory"))
    with StorageDaemon(make_image(folder / "image"), folder / "disk") as disk:
        target = f"vhost-user:{disk.socket}"
        bridge = Bridge(target, listen=listen)
        bridge.wait_for_output("serving ")
        for _ in range(ROUNDS):
            with connect(str(listen), driver):
                _one_request(driver)
                began = time.perf_counter()
                bridge.kill()
            bridge = Bridge(target, listen=listen)
            with _again(listen, driver):
                _one_request(driver)
                yield (time.perf_counter() - began) * 1e3
        bridge.stop()


def _again(listen: Path, driver: Driver) -> Frontend:
    while True:
        try:
            return connect(str(listen), driver)
        except (ConnectionRefusedError, FileNotFoundError):
            time.sleep(0.001)


def moved(folder: Path, *, switch: bool) -> list[float]:
    """Between two storage daemons, by `switch`; or it is not, and that is what to compare."""
    image, targets = make_image(folder / "image"), [folder / "one", folder / "two"]
    with (
        StorageDaemon(image, targets[0]),
        StorageDaemon(image, targets[1]),
        Bridge(f"vhost-user:{targets[0]}", listen=folder / "vm.sock") as bridge,
    ):
        _fill(bridge.listen, folder)

        def go() -> None:
            targets.reverse()
            bridge.command("switch", f"vhost-user:{targets[0]}")

        crash = go if switch else lambda: time.sleep(0.3)
        return [_slowest(bridge.listen, folder, crash, 0.8) for _ in range(MOVES)]


CRASHES: dict[str, Callable[[Path], Iterable[float]]] = {
    "nothing is killed": lambda folder: back_end(folder, crash=False),
    "back-end, started again by the bridge": lambda folder: back_end(folder, crash=True),
    "front-end: its next life, device kept": front_end,
    "daemon, started again at once": daemon,
    "daemon restarted with its front-end kept": restarted_daemon,
}


MOVED: dict[str, Callable[[Path], Iterable[float]]] = {
    "nothing is moved": lambda folder: moved(folder, switch=False),
    "moved by `switch`": lambda folder: moved(folder, switch=True),
}


def _rows(ways: dict[str, Callable[[Path], Iterable[float]]]) -> Iterator[list[str]]:
    for title, way in ways.items():
        # In memory: a disk's own pauses are longer than most of these.
        with tempfile.TemporaryDirectory(prefix="vb-bench-", dir="/dev/shm") as name:
            took = [one / 1e3 for one in way(Path(name))]
        yield [title, *distribution(took, 1)]


def measure() -> Iterator[tuple[str, str]]:
    """Titles and tables, as they come."""
    yield (
        f"A client's slowest request beside a switch ({MOVES} times each)",
        table(["", "ms, median", "p99", "max"], list(_rows(MOVED))),
    )
    yield (
        f"Recovery ({ROUNDS} times each)",
        table(["killed", "ms, median", "p99", "max"], list(_rows(CRASHES))),
    )
