"""Events and those who follow them, fast or slow; and the record of pauses."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.unit.fakes import FakeDevice
from vhostbridge.backends.lifecycle import State
from vhostbridge.bridge.events import Event, Events, Kind
from vhostbridge.bridge.journal import Journal
from vhostbridge.bridge.pauses import Pauses, Reason


def event(number: int, bridge: str = "vm1") -> Event:
    return Event(bridge, Kind.STATE, str(number))


async def test_follower_gets_what_is_told_after_it_came() -> None:
    events = Events()
    events.tell(event(0))
    with events.follow() as follower:
        events.tell(event(1))
        events.tell(event(2, "vm2"))
        assert [(await follower.next()).text for _ in range(2)] == ["1", "2"]
    assert events.followers == 0


async def test_follower_waits_for_the_next_one() -> None:
    events = Events()
    got: list[str] = []
    with events.follow() as follower:

        async def take() -> None:
            got.append((await follower.next()).text)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(take)
            await wait_all_tasks_blocked()
            events.tell(event(7))
    assert got == ["7"]


async def test_follower_of_one_bridge_hears_of_it_and_of_the_daemon() -> None:
    events = Events()
    with events.follow(["vm2"]) as follower:
        for told in (event(1), event(2, "vm2"), event(3, "")):
            events.tell(told)
        assert [(await follower.next()).text for _ in range(2)] == ["2", "3"]


async def test_slow_follower_loses_events_and_is_told_how_many_where_they_were() -> None:
    events = Events()
    with events.follow(limit=3) as slow, events.follow() as fast:
        for number in range(10):
            events.tell(event(number))
        assert (await slow.next()).text == "0"
        events.tell(event(10))
        found = [await slow.next() for _ in range(4)]
        assert [one.kind for one in found] == ["state", "state", "lost", "state"]
        assert found[2].details == {"count": 7}
        assert found[3].text == "10"
        assert [(await fast.next()).text for _ in range(11)] == [str(n) for n in range(11)]


async def test_loss_is_told_although_nothing_comes_after_it() -> None:
    events = Events()
    with events.follow(limit=1) as slow:
        events.tell(event(0))
        events.tell(event(1))
        assert (await slow.next()).text == "0"
        assert (await slow.next()).details == {"count": 1}


# Pauses


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_pause_has_its_phases_and_when_it_began() -> None:
    clock = Clock()
    pauses = Pauses(clock, lambda: clock.now + 1e9)
    clock.now = 103
    pauses.begin(Reason.SWITCH, 101, 103)
    pauses.starting(104)
    clock.now = 110
    assert pauses.current is not None and pauses.current.seconds == 9
    pause = pauses.end(108)
    assert pause is not None
    assert (pause.reason, pause.at) == ("switch", 1e9 + 101)
    assert pause.phases == {"suspend": 2, "state": 1, "resume": 4}
    assert (pause.seconds, pauses.open, pauses.end(109)) == (7, False, None)


def test_pauses_add_up_by_reason() -> None:
    pauses = Pauses(Clock())
    for reason, length in ((Reason.SWITCH, 3), (Reason.MEMORY, 9), (Reason.SWITCH, 2)):
        pauses.begin(reason, 0, 1)
        pauses.end(length)
    tally = pauses.tallies["switch"]
    assert (tally.count, tally.seconds) == (2, 5)
    assert tally.phases == {"suspend": 2, "state": 3, "resume": 0}
    assert tally.longest is not None and tally.longest.seconds == 3
    assert tally.last is not None and tally.last.seconds == 2
    assert pauses.tallies["memory"].count == 1


# What a journal makes of a device's operations


class Device(FakeDevice):
    """The fake with what a journal looks at."""

    shadow = ""
    logged_by = ""


async def operate(journal: Journal, device: Device, verb: str, clock: Clock, to: State) -> None:
    with journal.operation(device, verb):
        clock.now += 1
        if to is State.RUNNING and device.state is not to:
            device.starts += 1
        device.state = to
        clock.now += 1


@pytest.mark.parametrize(
    ("verb", "because", "reason"),
    [
        ("suspend", None, "front-end"),
        ("suspend", Reason.OPERATOR, "operator"),
        ("log_writes", None, "migration"),
        ("set_memory", None, "memory"),
        ("set_memory", Reason.SWITCH, "switch"),
    ],
)
async def test_pause_from_suspend_to_run(verb: str, because: Reason | None, reason: str) -> None:
    clock, device = Clock(), Device()
    journal = Journal("vm1", clock=clock)
    journal.watch(device)
    await operate(journal, device, "run", clock, State.RUNNING)
    assert journal.pauses.tallies == {}
    if because is None:
        await operate(journal, device, verb, clock, State.SUSPENDED)
    else:
        with journal.because(because), journal.because(Reason.MEMORY):
            await operate(journal, device, verb, clock, State.SUSPENDED)
    clock.now += 5
    await operate(journal, device, "run", clock, State.RUNNING)
    (tally,) = journal.pauses.tallies.values()
    assert tally.last is not None and tally.last.reason == reason
    assert tally.last.phases == {"suspend": 2, "state": 5, "resume": 2}


async def test_pause_within_one_operation() -> None:
    clock, device = Clock(), Device()
    journal = Journal(clock=clock)
    await operate(journal, device, "run", clock, State.RUNNING)
    with journal.operation(device, "log_writes"):
        await operate(journal, device, "suspend", clock, State.SUSPENDED)
        clock.now += 3
        device.state = State.RUNNING
    tally = journal.pauses.tallies["migration"]
    assert tally.phases == {"suspend": 2, "state": 0, "resume": 3}


async def test_device_that_stops_and_goes_on_by_itself_has_paused() -> None:
    clock, device = Clock(), Device()
    journal = Journal(clock=clock)
    await operate(journal, device, "run", clock, State.RUNNING)
    with journal.operation(device, "set_memory"):
        clock.now += 4
        device.starts += 1
    assert journal.pauses.tallies["memory"].seconds == 4
    with journal.operation(device, "set_memory"):
        clock.now += 4
    assert journal.pauses.tallies["memory"].count == 1


async def test_device_that_is_reset_has_not_paused() -> None:
    clock, device = Clock(), Device()
    journal = Journal(clock=clock)
    journal.watch(device)
    for verb, state in (
        ("run", State.RUNNING), ("suspend", State.SUSPENDED), ("reset", State.RESET),
        ("run", State.RUNNING),
    ):  # fmt: skip
        await operate(journal, device, verb, clock, state)
    assert journal.pauses.tallies == {}


async def test_another_device_that_goes_on_after_a_failure_ends_the_pause() -> None:
    clock, device, other = Clock(), Device(), Device()
    journal = Journal(clock=clock)
    journal.watch(device)
    await operate(journal, device, "run", clock, State.RUNNING)
    device.fail("gone")
    journal.failed("vhost-user:/x", device.failure)
    journal.watch(None)
    clock.now += 10
    journal.watch(other)
    await operate(journal, other, "set_memory", clock, State.RESET)
    assert journal.pauses.open
    await operate(journal, other, "run", clock, State.RUNNING)
    assert journal.pauses.tallies["failure"].seconds == 14


async def test_states_and_shadows_are_told_once_each(autojump_clock: MockClock) -> None:
    events, clock, device = Events(), Clock(), Device()
    journal = Journal("vm1", events, clock)
    with events.follow() as follower:
        journal.watch(device)
        await operate(journal, device, "run", clock, State.RUNNING)
        device.shadow = device.logged_by = "x"
        await operate(journal, device, "log_writes", clock, State.RUNNING)
        await operate(journal, device, "log_writes", clock, State.RUNNING)
        device.shadow = device.logged_by = ""
        await operate(journal, device, "suspend", clock, State.SUSPENDED)
        found = []
        with trio.move_on_after(1):
            while True:
                found.append(await follower.next())
    assert [(one.kind, one.text) for one in found] == [
        ("state", "reset"), ("state", "running"), ("shadow-on", "x"), ("dirty-log-on", "x"),
        ("state", "suspended"), ("shadow-off", ""), ("dirty-log-off", ""),
    ]  # fmt: skip
    assert found[1].details == {"state": "running", "before": "reset", "failure": ""}
