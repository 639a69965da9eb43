"""Checks of a device that is suspended and resumed in the middle of its work.

Each returns if the device keeps the contract, and raises Breach if not. It gets a device that is
RESET and may leave it in any state.
"""

from __future__ import annotations

import trio

from .bench import QUIET, Bench
from .outcome import Breach, NotOffered

#: Requests at a time, and how often things are done that may go wrong now and then.
BURST = 16
ROUNDS = 10


async def requests_complete(bench: Bench) -> None:
    await bench.start()
    try:
        await bench.exchange(4 * BURST)
    except Breach as breach:
        if bench.driver.must_complete:
            bench.plan.no_requests = "requests don't complete (requests-complete)"
            raise
        # A network device may throw frames away, but also have a port that nobody serves.
        bench.plan.no_requests = f"nobody takes transmitted frames: {breach}"
        raise NotOffered(bench.plan.no_requests) from None
    bench.driver.settle()
    await bench.verify()


async def suspend_stops(bench: Bench) -> None:
    await bench.start()
    for _ in range(ROUNDS // 2):
        bench.request(BURST)
        await bench.suspend()
        bench.driver.reap()
        bench.driver.submit(BURST)
        await bench.stand_still("after suspend")
        await bench.resume()
        await bench.complete()
    await bench.verify()


async def suspend_completes(bench: Bench) -> None:
    await bench.start()
    for round_ in range(2 * ROUNDS):
        bench.request(BURST)
        if round_ % 2:
            await trio.sleep(0.0005 * round_)
        await bench.suspend()
        bench.check_positions()
        await bench.resume()
        await bench.complete()
    await bench.verify()


async def suspend_twice(bench: Bench) -> None:
    await bench.start()
    bench.request(BURST)
    await bench.suspend()
    bases = bench.bases()
    await bench.suspend()
    if bench.bases() != bases:
        raise Breach(f"bases {bases} became {bench.bases()} with the second suspend")
    await bench.stand_still("after the second suspend")
    await bench.resume()
    await bench.verify()


async def resume_continues(bench: Bench) -> None:
    await bench.start()
    for _ in range(ROUNDS):
        bench.request(BURST)
        await bench.suspend()
        bench.driver.reap()
        bench.driver.submit(BURST)
        await bench.resume()
        await bench.complete()
    await bench.verify()
    await bench.suspend()
    bench.check_positions()


async def kick_kept(bench: Bench) -> None:
    await bench.start()
    await bench.exchange(BURST)
    for _ in range(ROUNDS // 2):
        await bench.suspend()
        bench.request(BURST)
        await trio.sleep(QUIET / 10)
        await bench.resume()
        await bench.complete()
    await bench.verify()


async def call_after_resume(bench: Bench) -> None:
    await bench.start()
    await bench.exchange(BURST)
    await bench.suspend()
    bench.driver.submit(BURST)
    await bench.resume()
    await bench.complete()
    silent = {ring.index for ring in bench.rings} - bench.take_calls().keys()
    if silent:
        raise Breach(f"no call on vrings {sorted(silent)} with the resume")
    for _ in range(3 * len(bench.rings)):
        bench.request(1)
        await bench.complete()
        await bench.called()
