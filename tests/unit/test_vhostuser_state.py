"""A back-end's own state, as its front-end sets it up."""

from __future__ import annotations

import pytest

from tests.unit.fakes import RING_PACKED, eventfd, frame, memfd, u64
from tests.unit.scripted import OFFER, connected
from vhostbridge.backends.guest import MemoryRegion, VringSetup
from vhostbridge.backends.vhostuser.messages import ProtocolFeature, Request


@pytest.mark.parametrize("features", [0, 1 << 32])
async def test_features_go_before_the_state_unless_no_driver_came(features: int) -> None:
    """passt takes a driver without VERSION_1 for a legacy one, and ends."""
    async with connected(OFFER | ProtocolFeature.DEVICE_STATE) as (device, backend):
        backend.answers[Request.SET_DEVICE_STATE_FD] = lambda got: frame(got.request, u64(0x100), 5)
        backend.answers[Request.CHECK_DEVICE_STATE] = lambda got: frame(got.request, u64(0), 5)
        device.features = features
        async with device.internal_sink():
            pass
        names = ["SET_DEVICE_STATE_FD", "CHECK_DEVICE_STATE"]
        assert backend.names == (["SET_FEATURES", *names] if features else names)


@pytest.mark.parametrize(
    ("told", "base"),
    [
        (0x8005, 0x8005_8005),
        (0x0005, 0x0005_0005),
        (0x8005_8003, 0x8005_8003),
        (0x8005_0003, 0x8005_0003),
    ],
)
async def test_position_of_a_packed_vring_is_whole_though_dpdk_tells_half(
    told: int, base: int
) -> None:
    """Whoever goes on there, shadow vrings or another device, needs the used half as well."""
    async with connected() as (device, backend):
        with memfd(0x10000) as memory, eventfd() as kick:
            await device.set_memory([MemoryRegion(0, 0x10000, memory, 0, (0, 0, 0))])
            backend.bases[1] = told
            vring = VringSetup(1, 16, 0, 0x1000, 0x2000, 0x8000_8000, kick, None, None, True)
            await device.run(1 << 32 | RING_PACKED, [vring])
            await device.suspend()
            assert device.vrings[1].base == base
