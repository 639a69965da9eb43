"""Front-ends that ask what can't be at this moment, or with this device."""

from __future__ import annotations

import struct

import pytest
from trio.testing import MockClock

from tests.unit.fakes import (
    PROTOCOL_FEATURES,
    RING_PACKED,
    FakeDevice,
    device_info,
    region,
    state,
    u64,
)
from tests.unit.frontend import ALL, FEATURES, MEMORY, USER, connected
from vhostbridge.backends.errors import Unsupported
from vhostbridge.backends.vhostuser.messages import Request as R

PAGE = 0x1000
SLOT = bytes(8)

RUNNING_LIES = {
    "size": (R.SET_VRING_NUM, state(0, 128), "changes the size of vring 0 while it runs"),
    "base": (R.SET_VRING_BASE, state(0, 0), "changes the base of vring 0 while it runs"),
    "features": (R.SET_FEATURES, u64(1 << 30), "changes the features of vring 0 while it runs"),
}


@pytest.mark.parametrize("what", RUNNING_LIES)
async def test_what_must_not_change_while_running(
    autojump_clock: MockClock, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    request, payload, text = RUNNING_LIES[what]
    async with connected() as vm:
        await vm.start(0)
        await vm.nack(request, payload)
        assert text in caplog.text
        await vm.settle()
        assert vm.device.take_calls() == []
        await vm.send(request, payload)
        assert text in str(await vm.lost())
    assert vm.device.take_calls() == [("suspend",), ("reset",), ("set_memory",)]


@pytest.mark.parametrize(("size", "base"), [(48, 0), (64, 0x80008000)])
async def test_a_packed_set_up_does_not_start_as_split(
    autojump_clock: MockClock, size: int, base: int
) -> None:
    async with connected() as vm:
        await vm.set_up(features=FEATURES | RING_PACKED)
        await vm.set_ring(0, base=base, size=size)
        await vm.send(R.SET_FEATURES, u64(FEATURES))
        await vm.enable(0)
        await vm.settle()
        assert vm.device.take_calls() == [ALL]
        await vm.send(R.SET_VRING_NUM, state(0, 64))
        await vm.settle()
        assert vm.device.take_calls() == [("run", FEATURES & ~PROTOCOL_FEATURES, (0, 0))]


async def test_addresses_that_memory_never_covers_are_found_at_the_start(
    autojump_clock: MockClock,
) -> None:
    async with connected() as vm:
        await vm.negotiate()
        await vm.set_ring(0)
        await vm.enable(0)
        assert "outside the guest memory of 0 regions" in str(await vm.lost())


async def test_slots_run_out() -> None:
    async with connected(FakeDevice(device_info(region_max=2))) as vm:
        await vm.set_up()
        more = [SLOT + region(at, PAGE, USER + at) for at in (MEMORY, MEMORY + PAGE)]
        await vm.ack(R.ADD_MEM_REG, more[0], vm.memfd(PAGE))
        await vm.nack(R.ADD_MEM_REG, more[1], vm.memfd(PAGE))
        await vm.ack(R.REM_MEM_REG, more[0])
        await vm.ack(R.ADD_MEM_REG, more[1], vm.memfd(PAGE))


async def test_rings_in_memory_that_was_removed_do_not_start_again(
    autojump_clock: MockClock,
) -> None:
    async with connected() as vm:
        await vm.start(0, 1)
        await vm.ack(R.REM_MEM_REG, SLOT + region(0, MEMORY, USER))
        await vm.base(1)
        await vm.settle()
        assert "run" not in [call[0] for call in vm.device.take_calls()]
        assert await vm.base(0) == 0


async def test_config_that_cannot_be_read_is_answered_empty() -> None:
    async with connected() as vm:
        await vm.negotiate()
        vm.device.refuse["read_config"] = Unsupported("no")
        assert await vm.ask(R.GET_CONFIG, struct.pack("=III", 0, 8, 0) + bytes(8)) == bytes(12)


async def test_an_mtu_is_refused_by_a_device_without() -> None:
    async with connected() as vm:
        await vm.negotiate()
        await vm.send(R.NET_SET_MTU, u64(1500))
        assert "NET_SET_MTU without having negotiated NET_MTU" in str(await vm.lost())
