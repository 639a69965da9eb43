"""A vhost-user channel over a real socket pair: whole messages, their own descriptors."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.unit.fakes import RawPeer, eventfd, frame, memfd, socket_pair, state, u64
from vhostbridge.backends.errors import PeerError, TransportLost
from vhostbridge.backends.fds import OwnedFd, close_all
from vhostbridge.backends.vhostuser.channel import Channel
from vhostbridge.backends.vhostuser.codec import Message
from vhostbridge.backends.vhostuser.messages import Request
from vhostbridge.backends.vhostuser.payloads import U64, Raw, VringState
from vhostbridge.backends.vhostuser.specs import FRONTEND_SPECS

KICK, CALL, NUM, ADD_MEM_REG = 12, 13, 8, 37


@dataclass(slots=True)
class Pair:
    channel: Channel
    peer: RawPeer
    raw: socket.socket


@asynccontextmanager
async def connected(*, replies: bool = False) -> AsyncIterator[Pair]:
    with socket_pair() as (ours, theirs):
        channel = Channel(
            trio.socket.from_stdlib_socket(ours.dup()),
            FRONTEND_SPECS,
            replies=replies,
            peer="front-end",
        )
        peer = RawPeer(theirs.dup())
        try:
            ours.close()
            theirs.close()
            yield Pair(channel, peer, ours)
        finally:
            channel.close()
            peer.close()


async def receive(pair: Pair) -> Message:
    message = await pair.channel.receive()
    assert message is not None
    return message


def inodes(fds: list[OwnedFd]) -> list[int]:
    return [os.fstat(fd.fileno()).st_ino for fd in fds]


async def test_queued_messages_get_their_own_descriptors() -> None:
    async with connected() as pair:
        sent = [memfd(4096) for _ in range(3)]
        await pair.peer.send(frame(KICK, u64(0)), [sent[0]])
        await pair.peer.send(frame(NUM, state(0, 128)))
        await pair.peer.send(frame(KICK, u64(1)), [sent[1]])
        await pair.peer.send(frame(CALL, u64(1)), [sent[2]])
        got = [await receive(pair) for _ in range(4)]
        expected = inodes(sent)
        assert [inodes(message.fds) for message in got] == [
            expected[:1],
            [],
            expected[1:2],
            expected[2:],
        ]
        close_all(sent)
        for message in got:
            message.close()


async def test_messages_in_one_send_are_told_apart() -> None:
    async with connected() as pair:
        await pair.peer.send(frame(NUM, state(0, 128)) + frame(1) + frame(NUM, state(1, 64)))
        got = [(await receive(pair)).payload for _ in range(3)]
        assert got[0] == VringState(0, 128) and got[2] == VringState(1, 64)


async def test_received_descriptors_are_not_inherited() -> None:
    async with connected() as pair:
        with eventfd() as fd:
            await pair.peer.send(frame(KICK, u64(0)), [fd])
        message = await receive(pair)
        flags = fcntl.fcntl(message.fds[0].fileno(), fcntl.F_GETFD)
        assert flags & fcntl.FD_CLOEXEC
        message.close()


@pytest.mark.parametrize("count", [2, 9, 32, 253])
async def test_too_many_descriptors_are_refused(count: int) -> None:
    async with connected() as pair:
        fds = [eventfd() for _ in range(count)]
        await pair.peer.send(frame(KICK, u64(0)), fds)
        close_all(fds)
        with pytest.raises(PeerError, match=f"with {count} file descriptors"):
            await pair.channel.receive()


async def test_the_end_between_messages_is_none() -> None:
    async with connected() as pair:
        await pair.peer.send(frame(1))
        pair.peer.close()
        assert (await receive(pair)).request is Request.GET_FEATURES
        assert await pair.channel.receive() is None


@pytest.mark.parametrize("kept", [1, 11, 12, 19])
async def test_the_end_inside_a_message_is_a_loss(kept: int) -> None:
    async with connected() as pair:
        with eventfd() as fd:
            await pair.peer.send(frame(KICK, u64(0))[:kept], [fd])
        pair.peer.close()
        with pytest.raises(TransportLost, match="in the middle of a message"):
            await pair.channel.receive()


@pytest.mark.parametrize("kept", [0, 1, 12, 19])
async def test_a_cancelled_receive_loses_nothing(kept: int) -> None:
    async with connected() as pair:
        data = frame(KICK, u64(3))
        with memfd(4096) as fd:
            expected = inodes([fd])
            if kept:
                await pair.peer.send(data[:kept], [fd])
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(pair.channel.receive)
                    await wait_all_tasks_blocked()
                    scope.cancel()
            await pair.peer.send(data[kept:], [] if kept else [fd])
        message = await receive(pair)
        assert message.request is Request.SET_VRING_KICK
        assert inodes(message.fds) == expected
        message.close()


async def test_a_reset_connection_is_a_loss() -> None:
    async with connected() as pair:
        await pair.channel.send_reply(1, U64(0))
        pair.peer.close()  # with unread bytes: the other end gets ECONNRESET
        with pytest.raises(TransportLost, match="lost the front-end"):
            await pair.channel.receive()


async def test_sending_to_a_peer_that_left_is_a_loss() -> None:
    async with connected() as pair:
        pair.peer.close()
        with pytest.raises(TransportLost, match="lost the front-end"):
            await pair.channel.send_reply(1, U64(0))


async def test_closing_wakes_the_receiver() -> None:
    async with connected() as pair, trio.open_nursery() as nursery:

        async def wait() -> None:
            with pytest.raises(TransportLost, match="was closed"):
                await pair.channel.receive()

        nursery.start_soon(wait)
        await wait_all_tasks_blocked()
        pair.channel.close()


async def test_a_reply_arrives_in_one_piece() -> None:
    """DPDK reads replies with a single recv."""
    async with connected() as pair:
        await pair.channel.send_reply(Request.GET_FEATURES, U64(7))
        assert await pair.peer.sock.recv(4096) == struct.pack("=IIIQ", 1, 5, 8, 7)


def shrink(pair: Pair) -> None:
    fd = socket.socket(fileno=os.dup(pair.channel.fileno()))
    with fd:
        fd.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the kernel's minimum is more


async def test_large_messages_through_a_small_buffer_stay_whole() -> None:
    """Each sender's descriptors come with the first byte of its own message."""
    async with connected(replies=True) as pair:
        shrink(pair)
        sent = {tag: memfd(4096) for tag in range(6)}
        expected = {tag: inodes([fd])[0] for tag, fd in sent.items()}

        async def send(tag: int) -> None:
            await pair.channel.send_request(
                Request.SET_LOG_FD, Raw(bytes([tag]) * 20_000), [sent[tag]]
            )

        async with trio.open_nursery() as nursery:
            for tag in sent:
                nursery.start_soon(send, tag)
            await wait_all_tasks_blocked()
            for _ in sent:
                got = await pair.peer.receive()
                assert got is not None and got.request == Request.SET_LOG_FD
                tag = got.payload[0]
                assert got.payload == bytes([tag]) * 20_000
                assert [os.fstat(fd).st_ino for fd in got.fds] == [expected.pop(tag)]
                for fd in got.fds:
                    os.close(fd)
        close_all(sent.values())


async def test_a_message_cut_by_cancellation_breaks_the_channel() -> None:
    async with connected(replies=True) as pair:
        shrink(pair)
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:

                async def fill() -> None:
                    await pair.channel.send_request(Request.SET_LOG_FD, Raw(bytes(100_000)))

                nursery.start_soon(fill)
                await wait_all_tasks_blocked()
                scope.cancel()
        with pytest.raises(TransportLost, match="broke in a message"):
            await pair.channel.send_request(Request.SET_OWNER)


async def test_the_caller_keeps_what_it_sends() -> None:
    async with connected(replies=True) as pair:
        with eventfd() as fd:
            await pair.channel.send_request(Request.SET_LOG_FD, fds=[fd])
            assert not fd.closed
        got = await pair.peer.receive()
        assert got is not None and len(got.fds) == 1
        os.close(got.fds[0])


async def test_the_peers_process_is_known() -> None:
    async with connected() as pair:
        assert pair.channel.peer_pid == os.getpid()
