"""Switches that fail when the other device runs already: whether the first one can go on."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
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
