"""A device that stands before another one and is it to its user, but for what it changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager

import trio

from vhostbridge.backends.device import Device, DeviceInfo
from vhostbridge.backends.fds import OwnedFd
from vhostbridge.backends.guest import MemoryRegion, VringSetup
from vhostbridge.backends.inflight import InflightBuffer
from vhostbridge.backends.lifecycle import Capabilities, State
from vhostbridge.backends.trace import Tracer


class WrappedDevice(Device):
    """Hands on what is the inner device's own: its state, failure, configuration and eventfds."""

    def __init__(self, inner: Device) -> None:
        # Not Device's: what it sets is the inner one's.
        self._inner = inner
        self.transport = inner.transport
        self.info: DeviceInfo = inner.info
        self.capabilities: Capabilities = inner.capabilities

    @property
    def state(self) -> State:
        return self._inner.state

    @state.setter
    def state(self, value: State) -> None:
        self._inner.state = value

    @property
    def trace(self) -> Tracer:
        return self._inner.trace

    @trace.setter
    def trace(self, value: Tracer) -> None:
        self._inner.trace = value

    @property
    def process(self) -> int:
        return self._inner.process

    @process.setter
    def process(self, value: int) -> None:
        self._inner.process = value

    @property
    def hangs(self) -> bool:
        return self._inner.hangs

    @hangs.setter
    def hangs(self, value: bool) -> None:
        self._inner.hangs = value

    @property
    def failure(self) -> str:
        return self._inner.failure

    @failure.setter
    def failure(self, value: str) -> None:
        self._inner.failure = value

    @property
    def failed(self) -> trio.Event:
        return self._inner.failed

    @failed.setter
    def failed(self, value: trio.Event) -> None:
        self._inner.failed = value

    @property
    def starts(self) -> int:
        return self._inner.starts

    @starts.setter
    def starts(self, value: int) -> None:
        self._inner.starts = value

    @property
    def features(self) -> int:
        return self._inner.features

    @features.setter
    def features(self, value: int) -> None:
        self._inner.features = value

    @property
    def on_config_change(self) -> Callable[[], None]:
        return self._inner.on_config_change

    @on_config_change.setter
    def on_config_change(self, value: Callable[[], None]) -> None:
        self._inner.on_config_change = value

    @property
    def vrings(self) -> Mapping[int, VringSetup]:
        return self._inner.vrings

    @property
    def control_vring(self) -> int | None:
        return self._inner.control_vring

    def control_state(self) -> dict[str, object] | None:
        return self._inner.control_state()

    def new_driver(self) -> None:
        self._inner.new_driver()

    def control_report(self) -> dict[str, str]:
        return self._inner.control_report()

    @property
    def internal_owner(self) -> str | None:
        return self._inner.internal_owner

    def internal_source(self) -> AbstractAsyncContextManager[OwnedFd]:
        return self._inner.internal_source()

    def internal_sink(self) -> AbstractAsyncContextManager[OwnedFd]:
        return self._inner.internal_sink()

    async def read_config(self, offset: int, size: int) -> bytes:
        return await self._inner.read_config(offset, size)

    async def full_config(self) -> bytes:
        return await self._inner.full_config()

    async def write_config(self, offset: int, data: bytes, flags: int) -> None:
        await self._inner.write_config(offset, data, flags)

    async def make_inflight(self, queues: int, queue_size: int, features: int) -> InflightBuffer:
        return await self._inner.make_inflight(queues, queue_size, features)

    def use_inflight(self, buffer: InflightBuffer | None, *, leave: bool = False) -> None:
        self._inner.use_inflight(buffer, leave=leave)

    async def send_rarp(self, mac: int) -> None:
        await self._inner.send_rarp(mac)

    async def set_mtu(self, mtu: int) -> None:
        await self._inner.set_mtu(mtu)

    async def set_memory(self, regions: Sequence[MemoryRegion]) -> None:
        await self._inner.set_memory(regions)

    async def suspend(self) -> None:
        await self._inner.suspend()

    async def stop_vring(self, index: int) -> int:
        return await self._inner.stop_vring(index)

    async def reset(self) -> None:
        await self._inner.reset()

    async def set_call(self, index: int, fd: OwnedFd | None) -> None:
        await self._inner.set_call(index, fd)

    async def set_kick(self, index: int, fd: OwnedFd | None) -> None:
        await self._inner.set_kick(index, fd)

    async def set_err(self, index: int, fd: OwnedFd | None) -> None:
        await self._inner.set_err(index, fd)

    async def set_enabled(self, index: int, enabled: bool) -> None:
        await self._inner.set_enabled(index, enabled)

    def _place(self, features: int, vrings: Sequence[VringSetup]) -> None:
        raise AssertionError("load goes to the device itself")

    async def aclose(self) -> None:
        await self._inner.aclose()
