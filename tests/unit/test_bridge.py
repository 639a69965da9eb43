"""A bridge from front-end to front-end."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from tests.unit.fakes import FakeDevice, RawPeer, frame
from vhostbridge.backends.device import Device
from vhostbridge.backends.errors import TransportLost
from vhostbridge.backends.vhostuser.messages import Request
from vhostbridge.bridge import back_end
from vhostbridge.bridge.bridge import Bridge
from vhostbridge.bridge.config import BridgeConfig
from vhostbridge.bridge.waiting import Waiting


@asynccontextmanager
async def _open(*_: object) -> AsyncIterator[Device]:
    yield FakeDevice()


async def test_front_end_that_comes_as_the_device_goes_is_cut_off_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = str(tmp_path / "vm")
    monkeypatch.setattr(back_end, "open_device", _open)
    bridge = Bridge(BridgeConfig(name="vm", listen=path, backend="vhost-user:/one"))
    async with trio.open_nursery() as nursery:
        await nursery.start(bridge.run)

        async def gone(waiting: Waiting, device: Device) -> None:
            monkeypatch.undo()
            raise TransportLost("the back-end closed the connection")

        monkeypatch.setattr(Waiting, "load", gone)
        with trio.fail_after(5):
            first, second = connected(path), connected(path)
            assert await first.receive() is None
            await second.send(frame(Request.GET_FEATURES, b"", 0x1))
            assert await second.receive() is not None
        nursery.cancel_scope.cancel()
    first.close()
    second.close()
    assert "vm: front-end cut off: the back-end closed the connection" in caplog.text


def connected(path: str) -> RawPeer:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    return RawPeer(sock)
