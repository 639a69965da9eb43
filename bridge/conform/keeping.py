"""Checks of what a device keeps and loses: saved, loaded, reset and set up anew.

As in ``running``: each gets a device that is RESET, and raises Breach with the evidence.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import IO

import trio

from vhostbridge.backends.errors import InvalidTransition
from vhostbridge.backends.lifecycle import State

from .bench import QUIET, Bench
from .outcome import Breach, NotOffered
from .running import BURST

_CHUNK = 1 << 20


async def save_twice(bench: Bench) -> None:
    await bench.start()
    bench.request(BURST)
    await bench.suspend()
    before = bench.memory.snapshot()
    first = await bench.device.capture()
    second = await bench.device.capture()
    if first != second:
        raise Breach(f"the first state is {first}, the second {second}")
    if written := bench.memory.difference(before):
        raise Breach(f"while it was saved: {written}")
    await bench.resume()
    await bench.verify()


async def _internal_state(bench: Bench, sink: IO[bytes] | None = None) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    bench.step = "save of the internal state"
    async with bench.device.internal_source() as pipe:
        # The descriptor stays the source's, which asks how it went when we are through.
        stream = trio.lowlevel.FdStream(pipe.dup().detach())
        async with stream:
            while chunk := await stream.receive_some(_CHUNK):
                digest.update(chunk)
                size += len(chunk)
                if sink is not None:
                    sink.write(chunk)
    return size, digest.hexdigest()


def _need_internal_state(bench: Bench) -> None:
    if bench.device.internal_owner is None:
        raise NotOffered("the device has no internal state to save (DEVICE_STATE)")


async def internal_twice(bench: Bench) -> None:
    _need_internal_state(bench)
    await bench.start()
    await bench.exchange(BURST)
    await bench.suspend()
    first = await _internal_state(bench)
    second = await _internal_state(bench)
    if first != second:
        raise Breach(
            f"first {first[0]} bytes with SHA-256 {first[1]}, then {second[0]} with {second[1]}"
        )
    await bench.resume()
    await bench.verify()


# Up to a state that was saved with requests waiting, and a device that was reset since.
async def _saved_and_reset(bench: Bench, sink: IO[bytes] | None) -> None:
    await bench.start()
    await bench.exchange(BURST)
    await bench.suspend()
    bench.driver.submit(BURST)
    state = await bench.device.capture()
    if sink is not None:
        await _internal_state(bench, sink)
    bases = bench.bases()
    await bench.reset()
    bench.step = "load"
    bench.device.load(state)
    if bench.device.state is not State.SUSPENDED:
        raise Breach(f"after load the device is {bench.device.state.value}")
    if bench.bases() != bases:
        raise Breach(f"bases {bases} were saved, {bench.bases()} are there after load")


# What waited is completed, nothing from before is repeated, and more works.
async def _goes_on_loaded(bench: Bench) -> None:
    await bench.run_on()
    await bench.verify()
    await bench.exchange(BURST)
    await bench.verify()
    await bench.suspend()
    bench.check_positions()


async def load_continues(bench: Bench) -> None:
    await _saved_and_reset(bench, None)
    await bench.stand_still("after load, before it runs")
    await _goes_on_loaded(bench)


async def internal_loads(bench: Bench) -> None:
    _need_internal_state(bench)
    with tempfile.TemporaryFile() as blob:
        await _saved_and_reset(bench, blob)
        blob.seek(0)
        bench.step = "load of the internal state"
        async with bench.device.internal_sink() as pipe:
            stream = trio.lowlevel.FdStream(pipe.detach())
            # A back-end that reads no further says in the end whether it has all it needs.
            with suppress(trio.BrokenResourceError):
                async with stream:
                    while chunk := blob.read(_CHUNK):
                        await stream.send_all(chunk)
    await _goes_on_loaded(bench)


async def _refused(bench: Bench, what: str, attempt: Callable[[], Awaitable[object]]) -> None:
    bench.step = what
    before = bench.device.state
    try:
        await attempt()
    except InvalidTransition:
        if bench.device.state is before:
            return
        after = bench.device.state.value
        raise Breach(f"{what} was refused, and the device is {after} now") from None
    raise Breach(f"{what} of a device that is {before.value} was not refused")


async def transitions(bench: Bench) -> None:
    device = bench.device
    for what, attempt in (
        ("suspend", device.suspend),
        ("resume", device.resume),
        ("save", device.capture),
    ):
        await _refused(bench, what, attempt)
    await bench.start()
    bench.request(BURST)
    await _refused(bench, "resume", device.resume)
    await _refused(bench, "save", device.capture)
    await bench.verify()
    await bench.suspend()
    state = await device.capture()
    await bench.resume()

    async def load() -> None:
        device.load(state)

    await _refused(bench, "load", load)
    await bench.exchange(BURST)
    await bench.verify()


# Fresh vrings from base 0 work, and know nothing of the requests before.
async def _starts_anew(bench: Bench) -> None:
    if bench.device.vrings:
        raise Breach(f"after reset it still has vrings {sorted(bench.device.vrings)}")
    await bench.stand_still("after reset")
    await bench.start()
    await bench.exchange(BURST)
    await bench.verify()
    await bench.suspend()
    bench.check_positions()


async def reset_running(bench: Bench) -> None:
    await bench.start()
    await bench.exchange(BURST)
    bench.request(BURST)
    await bench.reset()
    await _starts_anew(bench)


async def reset_suspended(bench: Bench) -> None:
    await bench.start()
    await bench.exchange(BURST)
    await bench.suspend()
    bench.driver.submit(BURST)
    await bench.reset()
    await _starts_anew(bench)


async def config_change_held(bench: Bench) -> None:
    raise NotOffered(
        "nothing here can change a device's configuration; suspend-stops would have seen a change"
    )


async def base_wraps(bench: Bench) -> None:
    await bench.start(base=65533)
    await bench.suspend()
    bench.check_positions()
    await bench.resume()
    await bench.exchange(3 * BURST)
    await bench.verify()
    await bench.suspend()
    bench.check_positions()
    await bench.resume()
    await bench.exchange(BURST)
    await bench.verify()


async def other_ring_size(bench: Bench) -> None:
    await bench.start()
    await bench.exchange(BURST)
    await bench.suspend()
    for size in (bench.plan.other_ring_size, bench.plan.ring_size):
        await bench.start(size=size)
        await bench.exchange(len(bench.rings) * (size + BURST))
        await bench.verify()
        await bench.suspend()
        bench.check_positions()


async def vring_stops(bench: Bench) -> None:
    await bench.start()
    for ring in bench.rings:
        bench.request(BURST)
        bench.step = f"stop of vring {ring.index}"
        base = await bench.device.stop_vring(ring.index)
        if base != ring.used_index:
            raise Breach(
                f"vring {ring.index} stopped at base {base}, its used index is {ring.used_index}"
            )
        ring.kick()
        await trio.sleep(QUIET)
        if base != ring.used_index:
            raise Breach(
                f"vring {ring.index} stopped at base {base}, and its used index went on to "
                f"{ring.used_index}"
            )
        await bench.run_on()
        await bench.complete()
    await bench.verify()
