"""A peer that floods is served at a bounded rate, and nobody else waits for it.

On a clock that stands still while anybody works: what is counted is turns, not time.
"""

from __future__ import annotations

import resource
from contextlib import suppress
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from tests.unit.fakes import FakeDevice, frame, state
from tests.unit.frontend import connected
from vhostbridge.backends.pace import Pace
from vhostbridge.backends.vhostuser import sockets
from vhostbridge.backends.vhostuser.messages import Request as R
from vhostbridge.bridge import endpoint, session
from vhostbridge.bridge.config import BridgeConfig
from vhostbridge.bridge.endpoint import open_endpoint


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small numbers, for tests that are done soon."""
    monkeypatch.setattr(session, "MESSAGES", 50)
    monkeypatch.setattr(session, "BURST", 100)


async def test_a_burst_comes_at_once_and_the_rest_in_turn(autojump_clock: MockClock) -> None:
    pace, began = Pace(10, 5), trio.current_time()
    for _ in range(5):
        await pace.take()
    assert trio.current_time() == began
    for _ in range(20):
        await pace.take()
    assert trio.current_time() == pytest.approx(began + 2)
    await trio.sleep(100)
    assert [pace.spare() for _ in range(6)] == [True] * 5 + [False]


async def test_one_thing_may_count_for_several(autojump_clock: MockClock) -> None:
    pace, began = Pace(10, 5), trio.current_time()
    for _ in range(4):
        await pace.take(5)
    assert trio.current_time() == pytest.approx(began + 1.5)


async def test_silence_is_not_saved_for_later(autojump_clock: MockClock) -> None:
    pace = Pace(10, 5)
    await trio.sleep(1000)
    began = trio.current_time()
    for _ in range(15):
        await pace.take()
    assert trio.current_time() == pytest.approx(began + 1)


async def test_a_flood_is_served_at_a_bounded_rate(slow: None, autojump_clock: MockClock) -> None:
    """The front-end always has more to ask; how many answers come in ten seconds is known."""
    async with connected() as vm:
        answers = 0

        async def ask() -> None:
            with suppress(OSError):
                while True:
                    await vm.peer.send(frame(R.GET_FEATURES) * 20)

        async def listen() -> None:
            nonlocal answers
            while await vm.peer.receive() is not None:
                answers += 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            nursery.start_soon(listen)
            await trio.sleep(10)
            nursery.cancel_scope.cancel()
        most = session.BURST + 10 * session.MESSAGES
        assert 0.9 * most <= answers <= most + 1


async def test_a_real_front_end_never_waits(autojump_clock: MockClock) -> None:
    """It starts every vring of a large device ten times: no time passes but its own silence."""
    async with connected() as vm:
        await vm.set_up()
        began = trio.current_time()
        for _ in range(10):
            for index in range(4):
                await vm.set_call(index)
                await vm.set_ring(index)
                await vm.base(index)
        assert trio.current_time() == began


async def test_a_flood_of_wrong_messages_does_not_flood_the_log(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with connected() as vm:
        await vm.negotiate()
        for _ in range(150):
            await vm.nack(R.SET_VRING_NUM, state(0, 0))
        refused = [record for record in caplog.records if "refused" in record.message]
        assert session.TOLD <= len(refused) < 2 * session.TOLD


async def test_victim_is_served_while_another_front_end_floods(
    slow: None, autojump_clock: MockClock
) -> None:
    """Two sessions in one loop: what the victim asks for costs the flood its turns, not more."""
    async with connected() as bad, connected(FakeDevice()) as good:
        served = 0

        async def flood() -> None:
            with suppress(OSError):
                while True:
                    await bad.peer.send(frame(R.GET_FEATURES) * 20)

        async def drain() -> None:
            nonlocal served
            while await bad.peer.receive() is not None:
                served += 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(flood)
            nursery.start_soon(drain)
            await trio.sleep(30)
            before, served = served, 0
            for _ in range(100):
                await good.ask(R.GET_FEATURES)
                await trio.sleep(0.01)
            # The burst is used up: what it gets is its rate, whatever it sends.
            assert before > session.BURST
            assert served <= session.MESSAGES * 1.1
            nursery.cancel_scope.cancel()


async def test_front_ends_that_come_and_go_come_at_a_bounded_rate(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    config = BridgeConfig(name="vm", listen=str(tmp_path / "s"), backend="vdpa:x")
    listening = open_endpoint(config)
    try:
        began = trio.current_time()
        for number in range(endpoint.BURST + 2 * endpoint.CONNECTIONS):
            (await sockets.connect(str(tmp_path / "s"))).close()
            sock = await listening.next()
            assert sock is not None
            sock.close()
            if number < endpoint.BURST:
                assert trio.current_time() == began
        assert trio.current_time() == pytest.approx(began + 2)
    finally:
        listening.close()


async def test_no_more_descriptors_is_no_end_of_listening(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    """Whoever has them may give them back; until then front-ends wait."""
    config = BridgeConfig(name="vm", listen=str(tmp_path / "s"), backend="vdpa:x")
    listening = open_endpoint(config)
    try:
        front_end = await sockets.connect(str(tmp_path / "s"))
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (front_end.fileno() + 1, hard))
        async with trio.open_nursery() as nursery:

            async def relieve() -> None:
                await trio.sleep(5)
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

            nursery.start_soon(relieve)
            sock = await listening.next()
        assert sock is not None
        sock.close()
        front_end.close()
    finally:
        listening.close()
