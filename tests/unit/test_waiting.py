"""A state that waits for a front-end, in one device after the other and over restarts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.unit.fakes import OWN, OnVdpa, Stateful, device_info, memfd
from tests.unit.states import BLOCK, VERSION_1
from tests.unit.store import Store
from vhostbridge.backends.device import Device
from vhostbridge.backends.errors import StateError, TransportLost
from vhostbridge.backends.lifecycle import State
from vhostbridge.backends.state import DeviceState
from vhostbridge.bridge.incoming import Incoming, Origin
from vhostbridge.bridge.waiting import Waiting

# As the fake devices are: read-only ones.
STATE = replace(BLOCK, features=VERSION_1 | 1 << 5, config=bytes(range(64)), inflight=())
#: All but what is the device's own.
OWNED = replace(STATE, transport="vhost-user", internal_owner="fake")


def begins(store: Store) -> Waiting:
    """What waits in a process that begins now."""
    return Waiting("vm", store.next_process())


async def found(store: Store) -> Waiting:
    """The same, once that process has looked for it."""
    waiting = begins(store)
    await waiting.find()
    return waiting


def waiting_in(device: Device, state: DeviceState, store: Store, origin: Origin) -> Waiting:
    device.load(state)
    waiting = begins(store)
    waiting.incoming = Incoming(state, origin)
    return waiting


def bases(state: DeviceState) -> dict[int, int | None]:
    return {v.index: v.base for v in state.vrings}


@pytest.mark.parametrize("origin", [Origin.LOADED, Origin.KEPT])
async def test_what_one_process_left_waits_in_the_device_of_the_next(origin: Origin) -> None:
    store = Store()
    before = waiting_in(device := OnVdpa(), STATE, store, origin)
    await before.leave(device)
    assert before.incoming is None and set(store.kept) == {f"state.{origin.name}.vm"}
    before.close()
    after, other = await found(store), OnVdpa()
    assert after.incoming is not None and after.incoming.origin is origin
    await after.load(other)
    assert {i: v.base for i, v in other.vrings.items()} == bases(STATE)
    assert (other.state, other.features) == (State.SUSPENDED, STATE.features)
    assert bases(after.incoming.state) == bases(STATE) and not store.kept
    after.close()


async def test_internal_state_goes_into_the_first_device_that_comes() -> None:
    store = Store()
    before = waiting_in(device := Stateful(), OWNED, store, Origin.LOADED)
    await before.leave(device)
    after, other = await found(store), Stateful()
    other.own = b""
    await after.load(other)
    assert (other.state, other.own) == (State.SUSPENDED, OWN)
    assert after.incoming is not None
    after.close()


async def test_where_its_device_has_gone_it_is_left_as_it_is_known() -> None:
    store = Store()
    before = waiting_in(OnVdpa(), STATE, store, Origin.KEPT)
    await before.leave(None)
    after = await found(store)
    assert after.incoming == Incoming(STATE, Origin.KEPT)
    after.close()


async def test_device_that_ends_with_the_process_takes_nothing_along() -> None:
    """Both are stopped at once, and it does not answer any more."""
    store = Store()
    before = waiting_in(device := OnVdpa(), STATE, store, Origin.KEPT)
    device.refuse["read_config"] = TransportLost("it ends")
    await before.leave(device)
    after = await found(store)
    assert after.incoming == Incoming(STATE, Origin.KEPT)
    after.close()


async def test_it_waits_in_the_next_device_when_the_first_has_gone() -> None:
    waiting = waiting_in(OnVdpa(), STATE, Store(), Origin.LOADED)
    other = OnVdpa()
    await waiting.load(other)
    assert {i: v.base for i, v in other.vrings.items()} == bases(STATE)
    assert waiting.incoming is not None


async def test_device_that_has_it_already_is_left_alone() -> None:
    waiting = waiting_in(device := OnVdpa(), STATE, Store(), Origin.LOADED)
    device.bases[0] = 4711
    await waiting.load(device)
    assert device.bases[0] == 4711 and device.calls == []


async def test_device_is_left_alone_if_nothing_waits() -> None:
    waiting, device = Waiting("vm", None), OnVdpa()
    await waiting.find()
    await waiting.load(device)
    await waiting.leave(device)
    waiting.close()
    assert device.state is State.RESET and device.calls == []


async def test_internal_state_that_went_with_its_device_is_lost(
    caplog: pytest.LogCaptureFixture,
) -> None:
    waiting = waiting_in(Stateful(), OWNED, Store(), Origin.LOADED)
    other = Stateful()
    await waiting.load(other)
    assert waiting.incoming is None and other.state is State.RESET
    assert "vm: the waiting state is given up: what fake had of it is lost" in caplog.text


async def test_internal_state_that_went_with_its_device_is_not_left(
    caplog: pytest.LogCaptureFixture,
) -> None:
    waiting = waiting_in(Stateful(), OWNED, store := Store(), Origin.LOADED)
    await waiting.leave(None)
    assert not store.kept and waiting.incoming is not None
    assert "can't be handed over: what fake had of it is lost" in caplog.text


async def test_internal_state_that_no_device_has_taken_yet_goes_on_to_the_next_process() -> None:
    """The back-end was away for all of a process's life."""
    store = Store()
    await waiting_in(device := Stateful(), OWNED, store, Origin.KEPT).leave(device)
    between = await found(store)
    await between.leave(None)
    between.close()
    after, other = await found(store), Stateful()
    other.own = b""
    assert after.incoming is not None and after.incoming.origin is Origin.KEPT
    await after.load(other)
    assert (other.state, other.own) == (State.SUSPENDED, OWN)


async def test_device_that_goes_as_it_is_looked_at_has_taken_nothing() -> None:
    store = Store()
    await waiting_in(device := Stateful(), OWNED, store, Origin.LOADED).leave(device)
    after, gone, other = await found(store), Stateful(), Stateful()
    gone.refuse["read_config"] = TransportLost("it went away")
    with pytest.raises(TransportLost):
        await after.load(gone)
    other.own = b""
    await after.load(other)
    assert (other.state, other.own) == (State.SUSPENDED, OWN)


async def test_state_that_does_not_fit_the_next_device_is_given_up(
    caplog: pytest.LogCaptureFixture,
) -> None:
    waiting = waiting_in(OnVdpa(), STATE, Store(), Origin.LOADED)
    other = OnVdpa(device_info(vring_limit=1))
    await waiting.load(other)
    assert waiting.incoming is None and other.state is State.RESET
    assert "given up: the device has 1 vrings, and the state uses 1 too" in caplog.text


async def test_device_that_refuses_its_internal_state_has_it_given_up(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Refusing(Stateful):
        def load(self, state: DeviceState) -> None:
            raise StateError("not today")

    store = Store()
    before = waiting_in(device := Stateful(), OWNED, store, Origin.LOADED)
    await before.leave(device)
    after = await found(store)
    await after.load(Refusing())
    assert after.incoming is None
    assert "vm: the waiting state is given up: not today" in caplog.text


async def test_state_that_nobody_keeps_stays_until_the_bridge_ends(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = Store()
    store.full = True
    waiting = waiting_in(device := OnVdpa(), STATE, store, Origin.LOADED)
    await waiting.leave(device)
    assert waiting.incoming is not None
    assert "can't be handed over: the service manager does not keep it" in caplog.text
    waiting.close()
    assert "vm: the waiting state is given up: the bridge ends" in caplog.text


async def test_damaged_state_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    store = Store()
    with memfd(100) as file:
        store.keep("state.LOADED.vm", file.fileno())
    waiting = await found(store)
    waiting.close()
    assert waiting.incoming is None
    assert "vm: the waiting state is given up: " in caplog.text


async def test_state_that_never_got_to_a_device_is_told_when_the_bridge_ends(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = Store()
    await waiting_in(device := OnVdpa(), STATE, store, Origin.LOADED).leave(device)
    after = await found(store)
    after.close()
    assert "vm: the waiting state is given up: the bridge ends" in caplog.text
