"""Suspend, save, load and resume of one device, timed, with the time that it is waited for.

Also run by itself, in the virtual machine: ``python3 phases.py URI ROUNDS`` prints JSON.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable, Coroutine
from typing import Any

import trio

from vhostbridge.backends import open_device
from vhostbridge.backends.device import Device
from vhostbridge.backends.fds import OwnedFd
from vhostbridge.backends.state_stream import Sink, check_stream, save_stream
from vhostbridge.backends.vdpa.chardev import Chardev
from vhostbridge.backends.vhostuser.client import Client
from vhostbridge.bridge.conform.driver import Memory, Ring, Segment

VERSION_1 = 1 << 32
PHASES = ("suspend", "save", "load", "resume", "all", "pause")

#: Seconds spent in ioctls, or until a back-end answered.
waited = 0.0


def count_waiting() -> None:
    """From now on ``waited`` grows."""
    ioctl, reply_to = Chardev._ioctl, Client._reply_to

    @functools.wraps(ioctl)
    def counting(self: Chardev, *args: Any) -> None:
        global waited
        began = time.perf_counter()
        try:
            ioctl(self, *args)
        finally:
            waited += time.perf_counter() - began

    @functools.wraps(reply_to)
    async def awaiting(self: Client, pending: Any) -> Any:
        global waited
        began = time.perf_counter()
        try:
            return await reply_to(self, pending)
        finally:
            waited += time.perf_counter() - began

    Chardev._ioctl = counting  # type: ignore
    Client._reply_to = awaiting  # type: ignore


async def timed(work: Callable[[], Coroutine[Any, Any, None]]) -> tuple[float, float]:
    """Milliseconds in all, and those of them waited for the device."""
    before, began = waited, time.perf_counter()
    await work()
    return (time.perf_counter() - began) * 1e3, (waited - before) * 1e3


async def one_round(device: Device, ring: Ring, buffer: int) -> dict[str, tuple[float, float]]:
    file = OwnedFd(os.memfd_create("state", os.MFD_CLOEXEC))

    async def save() -> None:
        with Sink(file.dup()) as sink:
            await save_stream(await device.capture(), None, sink, lambda count: None)

    async def load() -> None:
        os.lseek(file.fileno(), 0, os.SEEK_SET)
        state, checked = await check_stream(file.dup(), lambda count: None)
        checked.close()
        device.load(state)

    took: dict[str, tuple[float, float]] = {}
    with file:
        took["suspend"] = await timed(device.suspend)
        took["save"] = await timed(save)
        took["load"] = await timed(load)
        took["resume"] = await timed(lambda: device.run(VERSION_1, [ring.setup(None)]))
    took["all"] = (sum(t for t, _ in took.values()), sum(w for _, w in took.values()))
    began = time.perf_counter()
    await device.suspend()
    # GET_ID: header, 20 bytes, status.
    ring.add([Segment(buffer, 16), Segment(buffer + 64, 20, True), Segment(buffer + 16, 1, True)])
    ring.kick()
    await device.resume()
    while not ring.take_used():  # noqa: ASYNC110
        await trio.sleep(0.0001)
    took["pause"] = ((time.perf_counter() - began) * 1e3, 0.0)
    return took


async def measure(uri: str, rounds: int) -> list[dict[str, tuple[float, float]]]:
    """All rounds of a block device."""
    count_waiting()
    async with open_device(uri, 2) as device:
        memory = Memory(device.info)
        ring = Ring(memory, 0, 128)
        buffer = memory.take(128, 64, "request")
        memory.bytes[buffer : buffer + 4] = (8).to_bytes(4, "little")
        await device.set_memory([memory.region])
        await device.run(VERSION_1, [ring.setup(0)])
        took = [await one_round(device, ring, buffer) for _ in range(rounds)]
        await device.suspend()
        await device.reset()
        await device.set_memory([])
    ring.close()
    memory.close()
    return took


if __name__ == "__main__":
    print(json.dumps(trio.run(measure, sys.argv[1], int(sys.argv[2]))))
