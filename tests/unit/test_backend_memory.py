"""What a vhost-user back-end is told of guest memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest

from vhostbridge.backends.errors import PeerError, Unsupported
from vhostbridge.backends.fds import OwnedFd, new_eventfd
from vhostbridge.backends.guest import MemoryRegion
from vhostbridge.backends.vhostuser.memory import BackendMemory
from vhostbridge.backends.vhostuser.messages import ProtocolFeature, Request
from vhostbridge.backends.vhostuser.payloads import MemReg, MemTable, Payload, Region

SLOTS = ProtocolFeature.CONFIGURE_MEM_SLOTS


class Backend:
    """Keeps what it is told; refuses the message with number ``refuses``."""

    def __init__(self, protocol: ProtocolFeature) -> None:
        self.protocol = protocol | ProtocolFeature.REPLY_ACK
        self.regions: list[Region] = []
        self.refuses = -1
        self.count = 0

    async def request(
        self, request: Request, payload: Payload, fds: Sequence[OwnedFd] = ()
    ) -> None:
        self.count += 1
        if self.count == self.refuses:
            raise PeerError("no")
        if isinstance(payload, MemTable):
            self.regions = list(payload.regions)
        elif isinstance(payload, MemReg) and request == Request.ADD_MEM_REG:
            self.regions.append(payload.region)
        elif isinstance(payload, MemReg):
            self.regions.remove(payload.region)


@pytest.fixture
def region() -> Iterator[Callable[[int, int], MemoryRegion]]:
    """Makes a page of memory, whose content nobody looks at, at a guest address."""
    with new_eventfd() as fd:
        yield lambda guest, inode: MemoryRegion(guest, 0x1000, fd, 0, (1, inode, 0))


Make = Callable[[int, int], MemoryRegion]


def memory(backend: Backend) -> BackendMemory:
    return BackendMemory(backend, "b", 8, pytest.fail)  # type: ignore[arg-type]


@pytest.mark.parametrize("protocol", [ProtocolFeature(0), SLOTS], ids=["table", "slots"])
async def test_other_memory_at_the_same_guest_address_has_another_user_address(
    protocol: ProtocolFeature, region: Make
) -> None:
    """DPDK takes a table with the addresses that it knows for the memory that it has mapped."""
    backend = Backend(protocol)
    told = memory(backend)
    await told.change([region(0, 1)])
    first = list(backend.regions)
    await told.change([])
    await told.change([region(0, 2)])
    assert [r.user_address for r in backend.regions] != [r.user_address for r in first]
    assert told.user_address(0x10) == backend.regions[0].user_address + 0x10


@pytest.mark.parametrize("protocol", [ProtocolFeature(0), SLOTS], ids=["table", "slots"])
async def test_memory_that_stays_keeps_its_user_address(
    protocol: ProtocolFeature, region: Make
) -> None:
    backend = Backend(protocol)
    told = memory(backend)
    stays = region(0, 1)
    await told.change([stays])
    before = backend.regions[0]
    await told.change([stays, region(0x1000, 2)])
    assert before in backend.regions
    assert len({r.user_address for r in backend.regions}) == 2


@pytest.mark.parametrize("refuses", [1, 2, 3])
async def test_refused_change_leaves_the_memory_before(refuses: int, region: Make) -> None:
    backend = Backend(SLOTS)
    told = memory(backend)
    await told.change([region(0, 1), region(0x1000, 2)])
    before, addresses = set(backend.regions), told.user_address(0x1004)
    backend.refuses = backend.count + refuses
    with pytest.raises(PeerError):
        await told.change([region(0, 3)])
    assert set(backend.regions) == before
    assert told.user_address(0x1004) == addresses


async def test_memory_at_the_end_of_the_address_space_is_told_as_it_is(region: Make) -> None:
    backend = Backend(SLOTS)
    told = memory(backend)
    await told.change([region(0, 1)])
    await told.change([region(2**64 - 0x1000, 2)])
    assert backend.regions[0].user_address == 2**64 - 0x1000


async def test_too_many_regions_are_not_told(region: Make) -> None:
    backend = Backend(SLOTS)
    with pytest.raises(Unsupported, match="8 memory regions"):
        await memory(backend).change([region(n << 12, n) for n in range(9)])
    assert backend.regions == []
