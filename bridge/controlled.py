"""A network device whose control vring the bridge drives, because its front-end can't.

A front-end of vhost-user keeps the control vring that its guest sees to itself (QEMU, DPDK,
cloud-hypervisor): the device hears nothing of queue pairs, addresses and receive modes. So the
bridge negotiates a control vring of its own, and tells the device what it has to know.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import trio

from vhostbridge.backends.device import Device, MemoryRegion, VringSetup, whole
from vhostbridge.backends.errors import BridgeError, TransportLost, Unsupported
from vhostbridge.backends.lifecycle import State
from vhostbridge.backends.state import DeviceState
from vhostbridge.backends.vdpa.device import VdpaDevice
from vhostbridge.backends.virtio import DeviceId, NetFeature

from .command_ring import SIZE, CommandRing
from .control_commands import OK, PROMISC, command_name, set_mac, set_pairs, set_rx_mode
from .window import CEILING, free_window
from .wrapped import WrappedDevice

_log = logging.getLogger("vhostbridge.control")

_CTRL_VQ = NetFeature.CTRL_VQ.mask
_MQ = NetFeature.MQ.mask
_RX = NetFeature.CTRL_RX.mask
_MAC = NetFeature.CTRL_MAC_ADDR.mask
# Of no use to a driver without configuration space: the device would wait for an answer.
_NOT_FOR_DEVICE = NetFeature.GUEST_ANNOUNCE.mask


def pairs_of(vrings: Sequence[VringSetup]) -> int:
    """How many queue pairs a device uses when these vrings are the front-end's."""
    return max((vring.index // 2 + 1 for vring in vrings if vring.enabled), default=1)


class ControlledDevice(WrappedDevice):
    """A vDPA network device, and its control vring where the front-end does not have it.

    To its user it is the device itself, with what was negotiated with the front-end.
    """

    _inner: VdpaDevice

    def __init__(self, inner: VdpaDevice, mac: bytes | None = None) -> None:
        super().__init__(inner)
        # One is for the control vring, where it can't be apart from guest memory.
        self.info = replace(inner.info, region_max=max(1, inner.info.region_max - 1))
        self._mac = mac
        self._memory: Sequence[MemoryRegion] = ()
        self._features = 0
        self._ring: CommandRing | None = None
        # The queue pairs that the device was told to use.
        self._pairs = 1
        self._thread = trio.CapacityLimiter(1)

    @property
    def features(self) -> int:
        return self._features

    @features.setter
    def features(self, value: int) -> None:
        self._features = value

    async def set_memory(self, regions: Sequence[MemoryRegion]) -> None:
        own = None if self._ring is None or self._ring.isolated else self._ring.region
        if (
            own is not None
            and self.state is not State.RESET
            and any(
                region.guest_address < own.end and own.guest_address < region.end
                for region in regions
            )
        ):
            raise Unsupported(
                f"guest memory can't reach to {own.guest_address:#x}, where the control vring of "
                f"{self.info.target} lies"
            )
        await self._inner.set_memory(regions)
        self._memory = regions

    # What the device negotiates when the front-end negotiated ``features``; the same if it can, or
    # has to, do without a control vring of ours.
    def _negotiated(self, features: int, vrings: Sequence[VringSetup]) -> int:
        offered = self.info.features
        if features & _CTRL_VQ or not offered & _CTRL_VQ:
            return features
        wanted = offered & _RX
        if self._mac is not None:
            wanted |= _MAC
        if features & _MQ or any(vring.index > 1 for vring in vrings):
            wanted |= offered & _MQ
        return (features & ~_NOT_FOR_DEVICE) | wanted | _CTRL_VQ if wanted else features

    @whole
    async def run(self, features: int, vrings: Sequence[VringSetup]) -> None:
        negotiated = self._negotiated(features, vrings)
        drives = bool(negotiated & _CTRL_VQ and not features & _CTRL_VQ)
        ran, before = self.state is State.RUNNING, list(self.vrings.values())
        self._inner.control = self._own_ring() if drives else None
        await self._inner.run(negotiated, vrings)
        self._features = features
        if not drives:
            return
        try:
            await self._follow_pairs(pairs_of(vrings))
        except Unsupported as error:
            await self._go_back(ran, before, error)
            raise

    # To the vrings that a device had which was resumed with others.
    async def _go_back(self, ran: bool, vrings: Sequence[VringSetup], error: BridgeError) -> None:
        try:
            await self._inner.suspend()
            if ran:
                again = [replace(vring, base=None) for vring in vrings]
                await self._inner.run(self._inner.features, again)
        except BridgeError as second:
            self.fail(f"{error}; going back failed too: {second}")

    # Whether the device was started with a control vring of ours.
    @property
    def _drives(self) -> bool:
        return bool(self._inner.features & _CTRL_VQ and not self._features & _CTRL_VQ)

    def _own_ring(self) -> CommandRing:
        info = self.info
        if self._ring is None:
            self._ring = CommandRing(info, self._window(), self._introduce)
        elif self.state is State.RESET:
            self._ring.move(self._window())
        return self._ring

    # Half-way: shadow vrings lie above, and guest memory below.
    def _window(self) -> int:
        half = min(self.info.iova_last + 1, CEILING) // 2
        return free_window(self.info, self._memory, SIZE, half)

    # In the device's thread, while no other vring runs.
    def _introduce(self, ring: CommandRing, features: int, vrings: Sequence[VringSetup]) -> None:
        self._pairs = 1
        if self._mac is not None:
            self._suggest(ring, set_mac(self._mac))
        if features & _MQ:
            self._say_pairs(ring, pairs_of(vrings))
        if features & _RX:
            self._suggest(ring, set_rx_mode(PROMISC, True))

    # What a device can do without.
    def _suggest(self, ring: CommandRing, command: bytes) -> None:
        if ring.send(command)[0] != OK:
            _log.warning("%s: the device refused %s", self.info.target, command_name(command))

    def _say_pairs(self, ring: CommandRing, pairs: int) -> None:
        if ring.send(set_pairs(pairs))[0] != OK:
            raise Unsupported(
                f"{self.info.target} refused to use {pairs} queue pairs (MQ VQ_PAIRS_SET)",
                "give the VM's network device fewer queues, or ask the device's vendor",
            )
        self._pairs = pairs

    # Of a device that runs.
    async def _follow_pairs(self, pairs: int) -> None:
        if self._ring is None or pairs == self._pairs or not self._inner.features & _MQ:
            return
        try:
            await trio.to_thread.run_sync(self._say_pairs, self._ring, pairs, limiter=self._thread)
        except TransportLost as error:
            self.fail(str(error))
            raise

    # A pair is there before the device is to use it, and is used no more before it goes.
    @whole
    async def set_enabled(self, index: int, enabled: bool) -> None:
        vrings = self._inner.vrings
        if not self._drives or self.state is not State.RUNNING or index not in vrings:
            await self._inner.set_enabled(index, enabled)
            return
        after = {**vrings, index: replace(vrings[index], enabled=enabled)}
        pairs = pairs_of(list(after.values()))
        if pairs < self._pairs:
            await self._follow_pairs(pairs)
        await self._inner.set_enabled(index, enabled)
        try:
            await self._follow_pairs(pairs)
        except Unsupported:
            await self._inner.set_enabled(index, not enabled)
            raise

    def control_report(self) -> dict[str, str]:
        if not self._drives or self._ring is None:
            return {}
        report = {
            "driver": "bridge",
            "vring": str(self._ring.index),
            "lies": f"{'apart from' if self._ring.isolated else 'beside'} guest memory",
        }
        if self._inner.features & _MQ:
            report["pairs"] = str(self._pairs)
        if self._inner.features & _RX:
            report["rx"] = "promiscuous"
        if self._mac is not None:
            report["mac"] = self._mac.hex(":")
        return report

    # Life

    async def reset(self) -> None:
        await self._inner.reset()
        self._features = 0

    def load(self, state: DeviceState) -> None:
        self._inner.load(state)
        self._features = state.features

    async def aclose(self) -> None:
        await self._inner.aclose()
        if self._ring is not None:
            self._ring.close()


@asynccontextmanager
async def with_control(inner: Device, mac: bytes | None = None) -> AsyncIterator[Device]:
    """The device, with its control vring driven where it has one; ``inner`` stays its owner's.

    Raises:
        Unsupported: it can't be given the address ``mac``.
    """
    info = inner.info
    can = (
        isinstance(inner, VdpaDevice)
        and info.device_id == DeviceId.NET
        and info.features & _CTRL_VQ
    )
    if mac is not None and not (can and info.features & _MAC):
        raise Unsupported(
            f"{info.target} can't be given a MAC address (no CTRL_MAC_ADDR)",
            "leave mac out, and set it where the device is made (vdpa dev add ... mac ...)",
        )
    if not isinstance(inner, VdpaDevice) or not can:
        yield inner
        return
    device = ControlledDevice(inner, mac)
    try:
        yield device
    finally:
        with trio.CancelScope(shield=True):
            await device.aclose()
