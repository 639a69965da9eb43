"""A device on the bench: what contracts do to it and look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import trio

from vhostbridge.backends.device import Device
from vhostbridge.backends.lifecycle import State

from .driver import Driver, Memory, Ring
from .outcome import Breach

# Large enough for some requests at a time, small enough for every device.
RING_SIZE, OTHER_RING_SIZE = 64, 128
#: How long a device that may do nothing is watched, in seconds.
QUIET = 0.05
#: How long requests may take, in seconds: a slow disk under emulation is no breach.
COMPLETE = 10.0

DriverMaker = Callable[[Memory, Sequence[Ring]], Driver]


@dataclass(slots=True)
class Plan:
    """How a device is driven; one for all the times that it is opened."""

    features: int
    vrings: int
    ring_size: int
    other_ring_size: int
    make_driver: DriverMaker
    #: Why there are no requests; empty when there are.
    no_requests: str = ""


class Bench:
    """One device and the driver that is on it. ``start`` comes first, in RESET or SUSPENDED."""

    def __init__(self, device: Device, plan: Plan) -> None:
        self.device = device
        self.plan = plan
        self.memory = Memory(device.info)
        self.driver = Driver(self.memory, ())
        #: What is being done, for evidence.
        self.step = ""
        self._changes = 0
        device.on_config_change = self._count_change

    def _count_change(self) -> None:
        self._changes += 1

    @property
    def rings(self) -> Sequence[Ring]:
        return self.driver.rings

    async def start(self, *, size: int | None = None, base: int = 0) -> None:
        """Fresh vrings from ``base`` on, and the device running on them."""
        self.step = "start"
        before = self.driver
        self.memory.clear()
        size = size or self.plan.ring_size
        rings = [Ring(self.memory, index, size, base) for index in range(self.plan.vrings)]
        make = Driver if self.plan.no_requests else self.plan.make_driver
        self.driver = make(self.memory, rings)
        try:
            await self.device.set_memory([self.memory.region])
            await self.device.run(self.plan.features, [ring.setup(base) for ring in rings])
        finally:
            before.close()
        self._expect(State.RUNNING, "run")

    def kick(self) -> None:
        for ring in self.rings:
            ring.kick()

    def request(self, count: int) -> int:
        """Offer requests and kick."""
        self.step = f"{count} requests"
        offered = self.driver.submit(count)
        self.kick()
        return offered

    async def complete(self) -> None:
        """Wait until every request is complete, whether or not the device calls.

        Raises:
            Breach: some take longer than ``COMPLETE``, or one is not as it should be.
        """
        deadline = trio.current_time() + COMPLETE
        self.driver.reap()
        while self.driver.outstanding:
            if self.device.state is State.FAILED:
                raise Breach(f"the device failed: {self.device.failure}")
            if trio.current_time() > deadline:
                raise Breach(
                    f"{self.driver.outstanding} requests are not complete after {COMPLETE:g} s; "
                    + self.positions()
                )
            # Memory has no event to wait for, and calls are another contract's.
            await trio.sleep(0.001)
            self.driver.reap()

    async def called(self) -> None:
        """Wait for a call of any vring.

        Raises:
            Breach: none comes although requests are complete.
        """
        deadline = trio.current_time() + COMPLETE
        while not self.take_calls():
            if trio.current_time() > deadline:
                raise Breach(
                    f"requests are complete, and no call came in {COMPLETE:g} s; "
                    + self.positions()
                )
            await trio.sleep(0.001)

    async def exchange(self, count: int) -> None:
        """Make requests and wait for them."""
        while count > 0:
            count -= max(1, self.request(count))
            await self.complete()

    async def verify(self) -> None:
        """Complete what waits, and look whether it did what it should."""
        await self.complete()
        while self.driver.submit_checks():
            self.kick()
            await self.complete()

    async def suspend(self) -> None:
        """Suspend the device; calls until then are none of its contract's business."""
        self.step = "suspend"
        await self.device.suspend()
        self._expect(State.SUSPENDED, "suspend")
        self.take_calls()
        self._changes = 0

    async def resume(self) -> None:
        self.step = "resume"
        await self.device.resume()
        self._expect(State.RUNNING, "resume")

    async def reset(self) -> None:
        self.step = "reset"
        await self.device.reset()
        self._expect(State.RESET, "reset")
        self.take_calls()
        self._changes = 0

    async def run_on(self) -> None:
        """Run the same vrings from where the device says that they are."""
        self.step = "run"
        await self.device.run(self.plan.features, [ring.setup(None) for ring in self.rings])
        self._expect(State.RUNNING, "run")

    def _expect(self, state: State, operation: str) -> None:
        if self.device.state is not state:
            why = f": {self.device.failure}" if self.device.failure else ""
            raise Breach(f"after {operation} the device is {self.device.state.value}{why}")

    def take_calls(self) -> dict[int, int]:
        """How often each vring called since the last time, where it did."""
        return {ring.index: calls for ring in self.rings if (calls := ring.take_calls())}

    async def stand_still(self, when: str) -> None:
        """Kick the device and watch that nothing at all comes of it.

        Raises:
            Breach: it wrote to memory, called, or said that its configuration changed.
        """
        self.step = when
        before = self.memory.snapshot()
        self.kick()
        await trio.sleep(QUIET)
        written = self.memory.difference(before)
        calls = self.take_calls()
        found = [written] if written else []
        found += [f"vring {index} called {count} times" for index, count in calls.items()]
        if self._changes:
            found.append(f"{self._changes} configuration changes were notified")
        if found:
            raise Breach(f"{when}: " + "; ".join(found))

    def check_positions(self) -> None:
        """A suspended device's bases are the used indices: nothing is in flight.

        Raises:
            Breach: a request was taken and is not complete, or a position makes no sense.
        """
        known = self.device.vrings
        for ring in self.rings:
            base = known[ring.index].base if ring.index in known else None
            if base is None:
                raise Breach(f"vring {ring.index} has no base although the device is suspended")
            if base != ring.used_index:
                raise Breach(
                    f"vring {ring.index} stopped at base {base}, its used index is "
                    f"{ring.used_index}, and no request is listed as in flight"
                )
            if (ring.available_index - base) & 0xFFFF > ring.size:
                raise Breach(
                    f"vring {ring.index} stopped at base {base}, beyond the available index "
                    f"{ring.available_index}"
                )

    def bases(self) -> dict[int, int | None]:
        return {index: vring.base for index, vring in self.device.vrings.items()}

    def positions(self) -> str:
        """Both sides' indices, for evidence."""
        return ", ".join(
            f"vring {ring.index}: available {ring.available_index}, used {ring.used_index}"
            for ring in self.rings
        )

    async def leave(self) -> None:
        """Reset the device and take its memory away."""
        await self.device.reset()
        await self.device.set_memory(())

    def close(self) -> None:
        """Release memory and eventfds; the device must not use them any more."""
        self.driver.close()
        self.memory.close()
