"""Front-ends that attack what their messages set in motion, not only the messages' form."""

from __future__ import annotations

import pytest
from trio.testing import MockClock

from tests.unit.fakes import RING_PACKED, state
from tests.unit.frontend import FEATURES, connected
from vhostbridge.backends.vhostuser.messages import Request as R


@pytest.mark.parametrize("base", [0x100, 0x80008100, 0x81008000, 0x7FFF7FFF])
async def test_packed_ring_does_not_start_outside_itself(
    autojump_clock: MockClock, base: int
) -> None:
    """A device, and a shadow vring, would read and write where the base leads."""
    async with connected() as vm:
        await vm.set_up(features=FEATURES | RING_PACKED)
        await vm.tell(R.SET_VRING_NUM, state(0, 256))
        await vm.tell(R.SET_VRING_BASE, state(0, base))
        await vm.set_ring(0, base=base)
        assert "of packed vring 0 is not within its 256 entries" in str(await vm.lost())
    assert "run" not in {call[0] for call in vm.device.take_calls()}
