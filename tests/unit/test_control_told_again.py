"""What a guest said through its control vring: told again to devices that forgot it, and saved."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.unit.control_driver import FEATURES, INDEX, MAC, PROMISC, SET_MAC, Guest, relayed
from tests.unit.test_controlled import MQ, VERSION_1, bench
from vhostbridge.backends.errors import StateError, Unsupported
from vhostbridge.backends.lifecycle import State
from vhostbridge.backends.state import compatibility


async def test_restarted_device_is_told_again_before_data_vrings() -> None:
    async with relayed() as (b, guest):
        for command in (b"\4\0\2\0", PROMISC, SET_MAC):
            await guest.tell(command)
        await b.device.suspend()
        b.commands()
        b.kernel.log.clear()
        rings = [replace(v, size=32) for v in b.device.vrings.values() if v.index != INDEX]
        await b.device.run(FEATURES, [*rings, guest.setup(None)])
        log = b.kernel.log
        after = log[log.index("status 15") + 1 :]
        assert after == [
            SET_MAC.hex(),
            "04000200",
            PROMISC.hex(),
            *[f"enable {n}" for n in range(4)],
        ]
        assert await guest.tell(b"\0\0\0") == 0
        assert b.device.control_state() == {"mac": MAC, "rx": {"promisc": False}, "pairs": 2}


async def test_resumed_device_is_not_told_again() -> None:
    async with relayed() as (b, guest):
        await guest.tell(SET_MAC)
        await b.device.suspend()
        assert b.device.vrings[INDEX].base == 1
        b.commands()
        await b.device.resume()
        assert b.commands() == []
        assert await guest.tell(PROMISC) == 0


async def test_refused_when_told_again_fails_the_start() -> None:
    async with relayed() as (b, guest):
        await guest.tell(SET_MAC)
        await b.device.suspend()
        b.device.refused = {SET_MAC}
        rings = [replace(v, size=32) for v in b.device.vrings.values() if v.index != INDEX]
        with pytest.raises(Unsupported, match="refused MAC ADDR_SET, which the guest's driver"):
            await b.device.run(FEATURES, [*rings, guest.setup(None)])
        assert b.device.state is State.SUSPENDED
        assert b.device.vrings[INDEX].base == 1


async def test_loaded_state_is_told_before_data_vrings_run() -> None:
    async with relayed() as (b, guest):
        for command in (SET_MAC, PROMISC):
            await guest.tell(command)
        await b.device.suspend()
        state = replace(b.device.state_of(bytes(24)), transport="vdpa")
    async with bench() as b:
        other = Guest(b)
        await b.device.set_memory([*b.regions, other.region])
        b.device.load(state)
        assert b.device.vrings[INDEX].base == 2 and b.device.state is State.SUSPENDED
        await b.device.run(FEATURES, [*b.rings(2), other.setup(2)])
        assert b.commands() == [SET_MAC, PROMISC]
        assert b.device.control_state() == {"mac": MAC, "rx": {"promisc": True}}


async def test_address_from_the_configuration_goes_along() -> None:
    async with relayed() as (b, _):
        await b.device.suspend()
        state = b.device.state_of(MAC + bytes(18))
        assert state.control is None
    async with bench() as b:
        other = Guest(b)
        await b.device.set_memory([*b.regions, other.region])
        b.device.load(replace(state, features=FEATURES | 1 << 5))
        await b.device.run(FEATURES | 1 << 5, [*b.rings(2), other.setup(0)])
        assert b.commands() == [SET_MAC]


async def test_state_that_can_not_be_told_is_refused_before_the_device_is_touched() -> None:
    async with bench() as b:
        state = replace(b.device.state_of(b""), control={"newer": 1}, features=FEATURES)
        with pytest.raises(StateError, match="can't be told to a device"):
            b.device.load(state)
        assert b.device.state is State.RESET


async def test_compatibility_knows_who_can_be_told() -> None:
    async with bench() as b:
        mac = 1 << 5
        info = replace(b.device.info, features=b.device.info.features | mac)
        state = replace(b.device.state_of(MAC + bytes(18)), control={"mac": MAC}, device_id=1)
        state = replace(state, features=FEATURES | mac, transport="vdpa")
        now = bytes(24)
        abilities = b.device.capabilities
        assert compatibility(state, info, abilities, now) == []
        told = compatibility(state, replace(info, takes_control=False), abilities, now)
        assert [reason for reason in told if "control vring" in reason]
        assert [reason for reason in told if reason.startswith("mac ")]


async def test_another_driver_begins_with_a_device_that_forgot() -> None:
    async with relayed() as (b, guest):
        await guest.tell(PROMISC)
        await b.device.suspend()
        b.device.new_driver()
        b.kernel.log.clear()
        b.commands()
        other = Guest(b)
        await b.device.set_memory([*b.regions, other.region])
        await b.device.run(FEATURES, [*b.rings(2), other.setup(0)])
        assert "status 0" in b.kernel.log and b.commands() == []
        assert b.device.control_state() is None


async def test_reset_forgets() -> None:
    async with relayed() as (b, guest):
        await guest.tell(PROMISC)
        await b.device.suspend()
        await b.device.reset()
        assert b.device.control_state() is None and INDEX not in b.device.vrings


async def test_what_the_guest_said_holds_while_its_control_vring_is_stopped() -> None:
    async with relayed() as (b, guest):
        assert await guest.tell(SET_MAC) == 0
        await b.device.stop_vring(INDEX)
        rest = [replace(v, base=None) for i, v in b.device.vrings.items() if i != INDEX]
        await b.device.run(FEATURES, rest)
        assert b.device.control_report()["driver"] == "guest"
        assert b.commands() == [SET_MAC]


async def test_front_end_goes_over_to_the_control_vring_and_back() -> None:
    async with bench() as b:
        guest = Guest(b)
        await b.device.set_memory([*b.regions, guest.region])
        await b.device.run(VERSION_1 | MQ, b.rings(2))
        assert b.commands() == [b"\4\0\2\0", PROMISC]
        await b.device.suspend()
        await b.device.run(FEATURES, [*b.rings(2), guest.setup(0)])
        assert b.commands() == [] and await guest.tell(SET_MAC) == 0
        await b.device.suspend()
        await b.device.run(VERSION_1 | MQ, b.rings(2))
        assert b.commands() == [SET_MAC, b"\4\0\2\0", PROMISC]
        assert b.device.control_vring is None
