"""How long a front-end waits after each kind of crash: until its next request is complete. And how
long it waits while its device is moved.

A client writes and reads without a pause while one process is killed. Its slowest request tells how
long it waited; where the client itself has to come again, the time until a new request is complete.
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from tests.host.test_backend_command import starting
from tests.peers import blkio
from tests.peers.bridge import Bridge
from tests.peers.manager import Manager
from tests.peers.process import Process
from tests.peers.storage import StorageDaemon, make_image
from tests.vm.guest.keeper import Keeper
from tests.vm.guest.survivor import BLOCKS, IN, OUT, Driver, connect

from .measure import distribution, table

ROUNDS = 50
HANGS = 3  # of more than 10 s each
MOVES = 100
LOAD: dict[str, object] = {"size": 4 << 20, "depth": 8, "seed": 1}
DISK = 32 << 20

T = TypeVar("T")


def _fill(socket: Path, folder: Path) -> None:
    blkio.run(socket, "fill", size=4 << 20, seed=1, state=folder / "state")


def _slowest(
    socket: Path, folder: Path, crash: Callable[[], object], seconds: float = 0.8
) -> float:
    """The slowest of the requests around a crash, or something else, in ms.

    The load begins 0.1 s before it, and lasts so many seconds, or until all is done.
    """
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


def back_end_of_others(folder: Path) -> Iterator[float]:
    """It is killed, and not the bridge but somebody else starts it again at once."""
    image, socket = make_image(folder / "image"), folder / "disk"
    disks = [StorageDaemon(image, socket)]

    def kill() -> None:
        disk = disks.pop()
        disk.kill()
        disk.qmp.close()

    def restart() -> None:
        kill()
        disks.append(StorageDaemon(image, socket))

    shadow = ["--shadow"]
    with Bridge(f"vhost-user:{socket}", listen=folder / "vm.sock", arguments=shadow) as bridge:
        _fill(bridge.listen, folder)
        for _ in range(ROUNDS):
            yield _slowest(bridge.listen, folder, restart, 1.5)
    kill()


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
            yield _slowest(listen, folder, restart, 1.5)
        end(daemons.pop())


def end(daemon: Process) -> None:
    assert daemon.terminate() == 0, daemon.output
    daemon.kill()


def _one_request(driver: Driver) -> None:
    driver.offer(IN, next(block for block in range(BLOCKS) if block not in driver.taken))
    driver.settle()


def hanging_back_end(folder: Path) -> Iterator[float]:
    """It is stopped, and does not answer the front-end; the bridge kills it and starts it again."""
    driver = Driver(str(folder / "memory"))
    with (
        starting(make_image(folder / "image"), folder, "--shadow") as bridge,
        connect(str(bridge.listen), driver) as frontend,
    ):
        capacity = frontend.config(0, 8)
        for _ in range(HANGS):
            _one_request(driver)
            pid = bridge.status().backend_pid
            assert pid is not None
            began = time.perf_counter()
            os.kill(pid, signal.SIGSTOP)
            driver.offer(OUT, 0)
            assert frontend.config(0, 8) == capacity
            driver.settle()
            yield (time.perf_counter() - began) * 1e3


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
            with _again(lambda: connect(str(listen), driver)):
                _one_request(driver)
                yield (time.perf_counter() - began) * 1e3
        bridge.stop()


def shadowing_daemon(folder: Path) -> Iterator[float]:
    """The front-end keeps what is in flight; it waits until all of that is done."""
    listen, chance = folder / "vm.sock", random.Random(20261127)
    keeper = Keeper(DISK // 512)

    def start() -> Bridge:
        return Bridge(f"vhost-user:{disk.socket}", listen=listen, arguments=["--shadow"])

    with StorageDaemon(make_image(folder / "image", DISK), folder / "disk") as disk:
        bridge = start()
        _again(lambda: keeper.connect(str(listen)))
        count = 0
        while count < ROUNDS:
            keeper.work(chance.uniform(0.02, 0.06))
            began = time.perf_counter()
            bridge.kill()
            keeper.lose()
            bridge = start()
            _again(lambda: keeper.connect(str(listen)))
            while not keeper.in_doubt[-1] <= keeper.done:
                keeper.work(0.0002)
                time.sleep(0.0005)
            if keeper.in_doubt[-1]:
                count += 1
                yield (time.perf_counter() - began) * 1e3
        keeper.finish()
        keeper.close()
        bridge.stop()


def _again(reach: Callable[[], T]) -> T:
    while True:
        try:
            return reach()
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
    "back-end, started again by somebody else at once": back_end_of_others,
    "back-end that hangs, killed and started by the bridge": hanging_back_end,
    "front-end: its next life, device kept": front_end,
    "daemon, started again at once": daemon,
    "daemon with `--shadow` and requests in flight, started again at once": shadowing_daemon,
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
        yield [title, str(len(took)), *distribution(took, 1)]


def measure() -> Iterator[tuple[str, str]]:
    """Titles and tables, as they come."""
    head = ["times", "ms, median", "p99", "max"]
    yield (
        "A client's slowest request beside a switch",
        table(["", *head], list(_rows(MOVED))),
    )
    yield (
        "Recovery: from the loss until the front-end's next request is complete",
        table(["killed", *head], list(_rows(CRASHES))),
    )
