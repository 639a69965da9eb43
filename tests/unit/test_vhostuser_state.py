"""A back-end's own state, as its front-end sets it up."""

from __future__ import annotations

import pytest

from tests.unit.fakes import frame, u64
from tests.unit.scripted import OFFER, connected
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
