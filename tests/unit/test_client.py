"""The front-end's side of a connection, against a back-end played by the test."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.unit.fakes import Frame, RawPeer, eventfd, frame, memfd, state, u64
from vhostbridge.backends.errors import BridgeError, PeerError, TransportLost, Unanswered
from vhostbridge.backends.vhostuser.client import Client
from vhostbridge.backends.vhostuser.messages import ProtocolFeature, Request
from vhostbridge.backends.vhostuser.payloads import U64, MemReg, Region, VringState

REPLY_ACK = ProtocolFeature.REPLY_ACK


@asynccontextmanager
async def connected(
    protocol: ProtocolFeature = REPLY_ACK,
) -> AsyncIterator[tuple[Client, RawPeer, trio.Nursery]]:
    ours, theirs = socket.socketpair()
    client = Client(trio.socket.from_stdlib_socket(ours), "fake")
    client.protocol = protocol
    peer = RawPeer(theirs)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.serve)
            yield client, peer, nursery
            nursery.cancel_scope.cancel()
    finally:
        client.close()
        peer.close()


class Call:
    """A request in a task of its own, and what became of it."""

    def __init__(self, client: Client, request: Request, payload: object = None) -> None:
        self.outcome: object = None
        self.scope = trio.CancelScope()
        self._arguments = (request, payload)
        self._client = client

    async def run(self) -> None:
        with self.scope:
            try:
                self.outcome = await self._client.request(*self._arguments)  # type: ignore[arg-type]
            except BridgeError as error:
                self.outcome = error


async def asked(peer: RawPeer) -> Frame:
    got = await peer.receive()
    assert got is not None
    return got


async def test_a_native_reply_is_returned() -> None:
    async with connected() as (client, peer, nursery):
        call = Call(client, Request.GET_FEATURES)
        nursery.start_soon(call.run)
        assert (await asked(peer)).flags == 0x1
        await peer.send(frame(Request.GET_FEATURES, u64(7), 5))
        await wait_all_tasks_blocked()
        assert call.outcome == U64(7)


async def test_an_acknowledgement_is_asked_for_and_awaited() -> None:
    async with connected() as (client, peer, nursery):
        call = Call(client, Request.SET_FEATURES, U64(1))
        nursery.start_soon(call.run)
        assert (await asked(peer)).flags == 0x9
        await wait_all_tasks_blocked()
        assert call.outcome is None
        await peer.send(frame(Request.SET_FEATURES, u64(0), 5))
        await wait_all_tasks_blocked()
        assert call.outcome == U64(0)


async def test_without_reply_ack_nothing_is_awaited() -> None:
    async with connected(ProtocolFeature(0)) as (client, peer, _):
        await client.request(Request.SET_FEATURES, U64(1))
        assert (await asked(peer)).flags == 0x1


async def test_a_refusal_names_the_request() -> None:
    async with connected() as (client, peer, nursery):
        call = Call(client, Request.SET_VRING_NUM, VringState(0, 64))
        nursery.start_soon(call.run)
        await asked(peer)
        await peer.send(frame(Request.SET_VRING_NUM, u64(22), 5))
        await wait_all_tasks_blocked()
        assert isinstance(call.outcome, PeerError)
        assert "refused SET_VRING_NUM (answer 22)" in str(call.outcome)


async def test_a_refusal_leaves_the_connection_usable() -> None:
    async with connected() as (client, peer, nursery):
        calls = [Call(client, Request.SET_OWNER), Call(client, Request.GET_STATUS)]
        for call in calls:
            nursery.start_soon(call.run)
            await asked(peer)
        await peer.send(frame(Request.SET_OWNER, u64(1), 5) + frame(Request.GET_STATUS, u64(9), 5))
        await wait_all_tasks_blocked()
        assert isinstance(calls[0].outcome, PeerError)
        assert calls[1].outcome == U64(9)


@pytest.mark.parametrize(
    "lie",
    [
        frame(Request.GET_STATUS, u64(0), 5),
        frame(Request.GET_FEATURES, u64(0), 1),
        frame(Request.GET_FEATURES, b"abc", 5),
        frame(Request.GET_FEATURES, b"", 5),
        frame(99, u64(0), 5),
        frame(Request.GET_FEATURES, bytes(5000), 5),
        b"\xff" * 12,
    ],
    ids=["other message", "request", "short", "empty", "unknown", "huge", "noise"],
)
async def test_a_lie_fails_this_request_and_every_later_one(lie: bytes) -> None:
    async with connected() as (client, peer, nursery):
        call = Call(client, Request.GET_FEATURES)
        nursery.start_soon(call.run)
        await asked(peer)
        await peer.send(lie)
        await wait_all_tasks_blocked()
        assert isinstance(call.outcome, PeerError)
        with pytest.raises(PeerError):
            await client.request(Request.GET_STATUS)


async def test_an_answer_that_nobody_asked_for_is_refused() -> None:
    async with connected() as (client, peer, _):
        await peer.send(frame(Request.GET_STATUS, u64(0), 5))
        await wait_all_tasks_blocked()
        with pytest.raises(PeerError, match="answered GET_STATUS, which was not asked"):
            await client.request(Request.GET_STATUS)


@pytest.mark.parametrize("part", [0, 5, 12, 17])
async def test_a_back_end_that_leaves_fails_what_waits(part: int) -> None:
    async with connected() as (client, peer, nursery):
        calls = [Call(client, Request.GET_FEATURES), Call(client, Request.GET_STATUS)]
        for call in calls:
            nursery.start_soon(call.run)
            await asked(peer)
        await peer.send(frame(Request.GET_FEATURES, u64(1), 5)[:part])
        peer.close()
        await wait_all_tasks_blocked()
        assert all(isinstance(call.outcome, TransportLost) for call in calls)
        with pytest.raises(TransportLost):
            await client.request(Request.GET_STATUS)


async def test_descriptors_in_a_reply_that_has_none_are_closed() -> None:
    async with connected() as (client, peer, nursery):
        call = Call(client, Request.GET_FEATURES)
        nursery.start_soon(call.run)
        await asked(peer)
        with eventfd() as fd:
            await peer.send(frame(Request.GET_FEATURES, u64(1), 5), [fd])
        await wait_all_tasks_blocked()
        assert isinstance(call.outcome, PeerError)


async def test_the_reply_to_a_cancelled_request_is_dropped() -> None:
    async with connected() as (client, peer, nursery):
        call = Call(client, Request.GET_STATUS)
        nursery.start_soon(call.run)
        await asked(peer)
        call.scope.cancel()
        again = Call(client, Request.GET_STATUS)
        nursery.start_soon(again.run)
        await asked(peer)
        await peer.send(frame(Request.GET_STATUS, u64(1), 5) + frame(Request.GET_STATUS, u64(2), 5))
        await wait_all_tasks_blocked()
        assert (call.outcome, again.outcome) == (None, U64(2))


async def test_a_descriptor_that_comes_too_late_is_closed() -> None:
    async with connected() as (client, peer, nursery):
        call = Call(client, Request.GET_INFLIGHT_FD)
        nursery.start_soon(call.run)
        await asked(peer)
        with eventfd() as fd:
            await peer.send(frame(Request.GET_INFLIGHT_FD, bytes(24), 5), [fd])
        call.scope.cancel()
        await wait_all_tasks_blocked()
        assert not isinstance(call.outcome, BridgeError)


async def test_a_request_cancelled_before_it_left_expects_no_reply() -> None:
    async with connected(ProtocolFeature(0)) as (client, peer, nursery):
        sent = 0
        with trio.CancelScope() as filling:

            async def fill() -> None:
                nonlocal sent
                while True:
                    await client.request(Request.SET_OWNER)
                    sent += 1

            async with trio.open_nursery() as filler:
                filler.start_soon(fill)
                await wait_all_tasks_blocked()
                filling.cancel()
        call = Call(client, Request.GET_STATUS)
        nursery.start_soon(call.run)
        await wait_all_tasks_blocked()
        call.scope.cancel()
        await wait_all_tasks_blocked()
        for _ in range(sent):
            assert (await asked(peer)).request == Request.SET_OWNER
        again = Call(client, Request.GET_FEATURES)
        nursery.start_soon(again.run)
        assert (await asked(peer)).request == Request.GET_FEATURES
        await peer.send(frame(Request.GET_FEATURES, u64(5), 5))
        await wait_all_tasks_blocked()
        assert again.outcome == U64(5)


@pytest.mark.parametrize("ticks", range(8))
async def test_cancelled_at_any_moment_the_next_request_gets_its_own_reply(ticks: int) -> None:
    async with connected() as (client, peer, nursery):
        call = Call(client, Request.GET_STATUS)
        nursery.start_soon(call.run)
        for _ in range(ticks):
            await trio.lowlevel.checkpoint()
        call.scope.cancel()
        await wait_all_tasks_blocked()
        again = Call(client, Request.GET_FEATURES)
        nursery.start_soon(again.run)
        while (got := await asked(peer)).request != Request.GET_FEATURES:
            await peer.send(frame(got.request, u64(1), 5))
        await peer.send(frame(Request.GET_FEATURES, u64(2), 5))
        await wait_all_tasks_blocked()
        assert again.outcome == U64(2)


# The back-end's own channel


@asynccontextmanager
async def reversed_() -> AsyncIterator[tuple[Client, RawPeer, RawPeer, list[str]]]:
    async with connected() as (client, peer, nursery):
        changes: list[str] = []
        client.on_config_change = lambda: changes.append("config")
        nursery.start_soon(client.open_reverse)
        got = await asked(peer)
        assert got.request == Request.SET_BACKEND_REQ_FD
        back = RawPeer(socket.socket(fileno=got.fds[0]))
        try:
            await peer.send(frame(got.request, u64(0), 5))
            await wait_all_tasks_blocked()
            nursery.start_soon(client.serve_reverse)
            yield client, peer, back, changes
        finally:
            back.close()


async def still_works(client: Client, peer: RawPeer) -> None:
    async with trio.open_nursery() as nursery:
        call = Call(client, Request.GET_STATUS)
        nursery.start_soon(call.run)
        await asked(peer)
        await peer.send(frame(Request.GET_STATUS, u64(3), 5))
    assert call.outcome == U64(3)


async def test_a_config_change_is_passed_on_and_acknowledged() -> None:
    async with reversed_() as (_, _, back, changes):
        await back.send(frame(2, flags=0x9))
        assert await back.receive() == Frame(2, 0x5, u64(0))
        await back.send(frame(2))
        await wait_all_tasks_blocked()
        assert changes == ["config"] * 2


@pytest.mark.parametrize(
    ("number", "payload"), [(1, bytes(32)), (4, state(0, 0)), (7, bytes(16)), (77, b"abc")]
)
async def test_other_requests_of_the_back_end_are_refused(number: int, payload: bytes) -> None:
    async with reversed_() as (client, peer, back, _changes):
        await back.send(frame(number, payload, 0x9))
        assert await back.receive() == Frame(number, 0x5, u64(1))
        await back.send(frame(2, flags=0x9))
        assert await back.receive() == Frame(2, 0x5, u64(0))
        await still_works(client, peer)


async def test_a_descriptor_of_the_back_end_is_closed() -> None:
    async with reversed_() as (_, _, back, _):
        with eventfd() as fd:
            await back.send(frame(9, bytes(40), 0x9), [fd])
        assert await back.receive() == Frame(9, 0x5, u64(1))


@pytest.mark.parametrize("noise", [b"\xff" * 40, frame(2, b"x"), frame(2, u64(0), 5)])
async def test_a_broken_reverse_channel_costs_only_itself(noise: bytes) -> None:
    async with reversed_() as (client, peer, back, changes):
        await back.send(noise)
        await wait_all_tasks_blocked()
        with pytest.raises(OSError, match=r"pipe|reset"):
            await back.send(frame(2))
        assert changes == []
        await still_works(client, peer)


async def test_a_flood_without_reading_answers_does_not_block_the_main_channel() -> None:
    async with reversed_() as (client, peer, back, _), trio.open_nursery() as nursery:

        async def flood() -> None:
            while True:
                await back.send(frame(2, flags=0x9))

        nursery.start_soon(flood)
        await wait_all_tasks_blocked()
        await still_works(client, peer)
        nursery.cancel_scope.cancel()


async def test_a_refused_reverse_channel_leaves_no_descriptor() -> None:
    async with connected() as (client, peer, nursery):
        outcome = []

        async def open_() -> None:
            try:
                await client.open_reverse()
            except PeerError as error:
                outcome.append(str(error))

        nursery.start_soon(open_)
        got = await asked(peer)
        for fd in got.fds:
            os.close(fd)
        await peer.send(frame(got.request, u64(1), 5))
        await wait_all_tasks_blocked()
        assert "refused SET_BACKEND_REQ_FD" in outcome[0]


async def test_a_back_end_that_does_not_answer_is_given_up(autojump_clock: MockClock) -> None:
    """The request that waits and all later ones fail; what comes then is not listened to."""
    reasons: list[str] = []
    async with connected() as (client, peer, _):
        client.on_hang = reasons.append
        began = trio.current_time()
        with pytest.raises(Unanswered, match="did not answer GET_FEATURES within 30 s"):
            await client.request(Request.GET_FEATURES)
        assert trio.current_time() == began + 30
        assert client.hangs and len(reasons) == 1
        with pytest.raises(Unanswered):
            await client.request(Request.GET_FEATURES)
        await asked(peer)
        assert await peer.receive() is None


async def test_a_vring_may_take_longer_to_stop(autojump_clock: MockClock) -> None:
    """Requests in flight are completed first."""
    async with connected() as (client, peer, nursery):

        async def answer() -> None:
            await asked(peer)
            await trio.sleep(25)
            await peer.send(frame(Request.GET_VRING_BASE, state(3, 7), 0x5))

        nursery.start_soon(answer)
        assert (await client.stop_vring(3)).num == 7


async def test_memory_may_take_longer_to_map(autojump_clock: MockClock) -> None:
    """SPDK populates it: hundreds of GiB take longer than any other answer."""
    memory = MemReg(Region(0, 0x1000, 0, 0))
    async with connected() as (client, peer, nursery):

        async def answer() -> None:
            os.close((await asked(peer)).fds[0])
            await trio.sleep(25)
            await peer.send(frame(Request.ADD_MEM_REG, u64(0), 0x5))

        nursery.start_soon(answer)
        with memfd(0x1000) as fd:
            await client.request(Request.ADD_MEM_REG, memory, [fd])
