"""The device of a bridge, when one fails while another takes its place."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.unit.fakes import FakeDevice
from vhostbridge.backends.device import Device
from vhostbridge.backends.trace import OFF
from vhostbridge.bridge import back_end
from vhostbridge.bridge.back_end import BackEnd
from vhostbridge.bridge.config import BridgeConfig
from vhostbridge.bridge.journal import Journal

ONE = BridgeConfig(name="vm", listen="/nowhere", backend="vhost-user:/one")
OTHER = BridgeConfig(name="vm", listen="/nowhere", backend="vhost-user:/other")


class Moved:
    """A back-end kept open, and what was opened for it, by its target."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened: list[str] = []
        self.devices: dict[str, FakeDevice] = {}
        self.lost = 0
        self.lock = trio.Lock()
        monkeypatch.setattr(back_end, "open_device", self._open)
        self.kept = BackEnd(ONE, self.lock, Journal("vm"), OFF, self._take, self._lose)

    @asynccontextmanager
    async def _open(self, target: str, *_: object) -> AsyncIterator[Device]:
        device = self.devices[target] = FakeDevice()
        self.opened.append(target)
        yield device

    async def _take(self, device: Device) -> None:
        await trio.lowlevel.checkpoint()

    def _lose(self) -> None:
        self.lost += 1

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async def begin() -> None:
            await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            await nursery.start(self.kept.keep, begin)
            yield
            self.kept.stop()


async def test_device_that_fails_as_another_takes_its_place_is_not_missed(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = Moved(monkeypatch)
    async with moved.running():
        one = await moved.kept.open_another(OTHER)
        async with moved.lock:
            moved.devices[ONE.backend].fail("its process died")
            await wait_all_tasks_blocked()
            before = moved.kept.replace(one)
        assert before is not None
        await before.close()
        await trio.sleep(5)
        assert moved.kept.device is one.device
        assert moved.opened == [ONE.backend, OTHER.backend]
        assert moved.lost == 0


async def test_device_that_fails_as_it_takes_the_place_of_another_is_opened_again(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = Moved(monkeypatch)
    async with moved.running():
        one = await moved.kept.open_another(OTHER)
        async with moved.lock:
            moved.devices[OTHER.backend].fail("its process died")
            await wait_all_tasks_blocked()
            before = moved.kept.replace(one)
        assert before is not None
        await before.close()
        with trio.fail_after(5):
            while moved.kept.device in (None, one.device):  # noqa: ASYNC110
                await trio.sleep(0.1)
        assert moved.opened == [ONE.backend, OTHER.backend, OTHER.backend]
        assert moved.lost == 1
