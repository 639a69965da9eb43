"""Switches that fail when the other device runs already: whether the first one can go on."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from typing import cast

import pytest
from trio.testing import MockClock

from tests.unit.fakes import RING_PACKED, FakeDevice
from tests.unit.frontend import FEATURES, OFFER, PF, connected
from vhostbridge.backends.errors import PeerError
from vhostbridge.backends.fds import OwnedFd
from vhostbridge.backends.guest import VringSetup
from vhostbridge.backends.lifecycle import State
from vhostbridge.bridge.shadow import ShadowDevice
from vhostbridge.bridge.status import SwitchReport
from vhostbridge.bridge.switch import switch

AVAIL, USED = 1 << 7, 1 << 15
PLACE = 3  # of the packed vring, in its first round


class Refusing(FakeDevice):
    """It runs a vring, and refuses after all; ``flags`` is what the vring's descriptor has then."""

    def __init__(self, memory: OwnedFd, flags: int) -> None:
        super().__init__()
        self._memory, self._flags = memory, flags

    async def run(self, features: int, vrings: Sequence[VringSetup]) -> None:
        await super().run(features, vrings)
        at = vrings[0].descriptor_area + 16 * PLACE + 14
        os.pwrite(self._memory.fileno(), struct.pack("<H", self._flags), at)
        self._stop()
        raise PeerError("refused vring 1")


@pytest.mark.parametrize(
    ("flags", "done"),
    [
        (0, False),
        (AVAIL, False),
        (AVAIL | USED, True),
        (USED, True),  # and available again, in the next round
    ],
)
async def test_packed_vring_that_the_other_device_moved_on_is_not_gone_back_to(
    autojump_clock: MockClock, flags: int, done: bool
) -> None:
    """The first device would wait for ever for a descriptor that is used."""
    async with connected() as vm:
        await vm.set_up(features=FEATURES | RING_PACKED, protocol=OFFER & ~PF.STATUS)
        await vm.set_ring(0, base=(0x8000 | PLACE) * 0x1_0001)
        await vm.enable(0)
        await vm.settle()
        new = cast(ShadowDevice, Refusing(vm.memory, flags))
        async with vm.session.lock:
            with pytest.raises(PeerError, match="refused vring 1"):
                await switch(cast(ShadowDevice, vm.device), new, vm.session, SwitchReport())
        assert vm.device.state is (State.FAILED if done else State.RUNNING)
        assert ("in doubt" in vm.device.failure) == done


class Broken(FakeDevice):
    """A device that has ``done`` something when it refuses, and is not sound any more."""

    def __init__(self, done: Callable[[], None]) -> None:
        super().__init__()
        self._done = done

    async def run(self, features: int, vrings: Sequence[VringSetup]) -> None:
        self._done()
        raise PeerError("refused vring 1")


@pytest.mark.parametrize("always", [False, True])
@pytest.mark.parametrize("gone", [False, True], ids=["there", "gone"])
async def test_front_end_is_cut_off_when_requests_are_in_doubt(*, always: bool, gone: bool) -> None:
    """It was left with the new device, which is closed, and waited for ever. Nor does a device that
    comes after all begin where the first one stood still, be that gone too by then."""
    old = ShadowDevice(first := FakeDevice(), always=always)

    def use_one_of_two() -> None:
        at = 0x10000
        os.pwrite(vm.memory.fileno(), struct.pack("<HHHH", 0, 2, 0, 1), at + 0x1000)
        os.pwrite(vm.memory.fileno(), struct.pack("<HHII", 0, 1, 1, 0), at + 0x2000)
        if gone:
            old.fail("it is gone too")

    async with connected(cast(FakeDevice, old)) as vm:
        await vm.set_up(protocol=OFFER & ~PF.STATUS)
        await vm.set_ring(0)
        await vm.enable(0)
        await vm.settle()
        new = ShadowDevice(Broken(use_one_of_two))
        with pytest.raises(PeerError, match="refused vring 1"):
            await switch(old, new, vm.session, SwitchReport())
        assert ("is gone too" if gone else "are in doubt") in str(await vm.lost())
        vm.device = first
    await old.aclose()
