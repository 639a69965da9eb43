"""Front-ends that attack what their messages set in motion, not only the messages' form."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
import trio
from trio.testing import MockClock

from tests.unit.fakes import LOG_ALL, RING_PACKED, frame, memfd, region, state, u64
from tests.unit.frontend import FEATURES, USER, connected
from vhostbridge.backends.dirty_log import DirtyLog
from vhostbridge.backends.errors import PeerError
from vhostbridge.backends.fds import OwnedFd
from vhostbridge.backends.guest import MemoryRegion
from vhostbridge.backends.vhostuser.messages import Request as R


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Fail if the whole process waits in a system call for so long."""

    def stuck(number: int, frame: object) -> None:
        raise AssertionError(f"the event loop waited for {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stuck)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


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


async def test_front_end_that_takes_no_replies_is_cut_off(autojump_clock: MockClock) -> None:
    """While it does not, its bridge's operator would wait."""
    async with connected() as vm:
        with suppress(BrokenPipeError, ConnectionResetError), at_most(60):
            while not vm.ended.is_set():
                await vm.peer.send(frame(R.GET_FEATURES) * 100)
        assert "did not take a reply for 5 s" in str(await vm.lost())


async def test_reverse_channel_made_blocking_and_never_read_stops_nobody(
    autojump_clock: MockClock,
) -> None:
    """The front-end has the same open file: our non-blocking flag is its to take away."""
    ours, theirs = socket.socketpair()
    async with connected() as vm:
        with ours, OwnedFd(theirs.detach()) as fd, at_most(60):
            await vm.start(0)
            await vm.tell(R.SET_BACKEND_REQ_FD, b"", fd)
            await vm.settle()
            os.set_blocking(fd.fileno(), True)
            for _ in range(2000):
                vm.device.change_config()
                await trio.testing.wait_all_tasks_blocked()
            await vm.settle()


async def test_more_descriptors_than_any_message_has_are_closed() -> None:
    async with connected() as vm:
        await vm.peer.send(frame(R.GET_FEATURES), [vm.eventfd()] * 253)
        assert "GET_FEATURES with 253 file descriptors, 0 belong to it" in str(await vm.lost())


async def test_memory_and_log_are_memory() -> None:
    """A file system in user space would answer a look at its size when it likes to."""
    wanted = "neither shared memory nor in a file of a local disk"
    with OwnedFd(os.open("/proc/self/status", os.O_RDONLY)) as fd:
        async with connected() as vm:
            await vm.negotiate()
            await vm.nack(R.ADD_MEM_REG, bytes(8) + region(0, 4096, USER), fd)
            await vm.send(R.ADD_MEM_REG, bytes(8) + region(0, 4096, USER), fd)
            assert wanted in str(await vm.lost())
        async with connected() as vm:
            await vm.negotiate()
            await vm.send(R.SET_FEATURES, u64(FEATURES | LOG_ALL))
            await vm.send(R.SET_LOG_BASE, struct.pack("=QQ", 4096, 0), fd)
            assert f"the dirty log is {wanted}" in str(await vm.lost())


def test_log_that_was_write_protected_is_the_front_ends_fault() -> None:
    """After we mapped it, which stays writable; what goes through the file is refused."""
    fd = OwnedFd(os.memfd_create("log", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC))
    os.ftruncate(fd.fileno(), 4096)
    guest = memfd(4096)
    with DirtyLog(fd, 0, 4096) as log, guest:
        fcntl.fcntl(fd.fileno(), fcntl.F_ADD_SEALS, 0x10)  # F_SEAL_FUTURE_WRITE
        with pytest.raises(PeerError, match="the dirty log can't be written"):
            log.mark_all([MemoryRegion(0, 4096, guest, 0, (0, 0, 0))])
