"""The product's VdpaDevice in the guest: what its kernel was asked, and rings for it to run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

import trio

from vhostbridge.backends.errors import BridgeError
from vhostbridge.backends.fds import OwnedFd, close_all
from vhostbridge.backends.guest import MemoryRegion, VringSetup
from vhostbridge.backends.lifecycle import State
from vhostbridge.backends.trace import OFF, Tracer
from vhostbridge.backends.vdpa.chardev import BackendFeature, Chardev
from vhostbridge.backends.vdpa.device import VdpaDevice
from vhostbridge.backends.vdpa.opening import open_vdpa

from .blk import BlockDriver
from .devices import block_device
from .memory import Memory
from .vring import DriverRing, SplitRing

VERSION_1 = 1 << 32
Body = Callable[[VdpaDevice], Awaitable[None]]
Calls = list[tuple[str, tuple[object, ...]]]

# Descriptors are borrowed by the device: they live until it is closed.
_lent: list[OwnedFd] = []


def lend(fd: int) -> OwnedFd:
    _lent.append(OwnedFd(os.dup(fd)))
    return _lent[-1]


class Recorder(Chardev):
    """The real character device, less some backend features; remembers what was called."""

    without = BackendFeature(0)
    calls: Calls

    def __init__(self, node: Path, trace: Tracer = OFF) -> None:
        self.calls = []
        super().__init__(node, trace)

    def backend_features(self) -> BackendFeature:
        return super().backend_features() & ~self.without

    def set_status(self, status: int) -> None:
        self.calls.append(("set_status", (status,)))
        super().set_status(status)

    def suspend(self) -> None:
        self.calls.append(("suspend", ()))
        super().suspend()

    def resume(self) -> None:
        self.calls.append(("resume", ()))
        super().resume()


def calls_of(device: VdpaDevice) -> Calls:
    assert isinstance(device._dev, Recorder)
    return device._dev.calls


@contextlib.asynccontextmanager
async def opened(node: str, without: BackendFeature) -> AsyncIterator[VdpaDevice]:
    kind = type("Without", (Recorder,), {"without": without})
    with mock.patch("vhostbridge.backends.vdpa.opening.Chardev", kind):
        async with open_vdpa("vdpa:it", Path(node)) as device:
            yield device
    close_all(_lent)
    _lent.clear()


NOTHING = BackendFeature(0)


def on_block(body: Body, without: BackendFeature = NOTHING) -> None:
    """Run `body` with a block device of the product."""

    async def main() -> None:
        async with opened(node, without) as device:
            await body(device)

    with block_device() as node:
        trio.run(main)


def region(memory: Memory, *, size: int | None = None, guest: int | None = None) -> MemoryRegion:
    status = os.fstat(memory.fd)
    at = memory.guest if guest is None else guest
    identity = (status.st_dev, status.st_ino, 0)
    return MemoryRegion(at, size or memory.size, OwnedFd(os.dup(memory.fd)), 0, identity)


@contextlib.contextmanager
def regions(*memories: Memory) -> Iterator[list[MemoryRegion]]:
    made = [region(memory) for memory in memories]
    # They stay open while the device has them.
    _lent.extend(one.fd for one in made)
    yield made


def setup(ring: DriverRing, index: int = 0, *, base: int | None = 0) -> VringSetup:
    """The ring as the product wants it."""
    guest = ring.memory.guest
    return VringSetup(
        index=index,
        size=ring.size,
        descriptor_area=guest + ring.descriptors,
        driver_area=guest + ring.avail,
        device_area=guest + ring.used,
        base=base,
        kick=lend(ring.kick_fd),
        call=lend(ring.call_fd),
        err=None,
        enabled=True,
    )


async def run(device: VdpaDevice, rings: Sequence[DriverRing], *, base: int | None = 0) -> None:
    await device.run(VERSION_1, [setup(ring, at, base=base) for at, ring in enumerate(rings)])


async def started(device: VdpaDevice) -> BlockDriver:
    driver = BlockDriver(SplitRing(Memory()))
    with regions(driver.ring.memory) as table:
        await device.set_memory(table)
    await run(device, [driver.ring])
    return driver


def raises(kind: type[BridgeError], text: str, error: BaseException | None) -> None:
    assert isinstance(error, kind) and text in str(error), repr(error)


async def attempt(awaitable: Awaitable[object]) -> BaseException | None:
    try:
        await awaitable
    except BridgeError as error:
        return error
    return None


def expect(device: VdpaDevice, state: State) -> None:
    assert device.state is state, device.state
