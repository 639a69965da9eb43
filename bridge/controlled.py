"""A network device whose control vring the bridge drives.

A front-end of vhost-user mostly keeps the control vring that its guest sees to itself (QEMU, DPDK,
cloud-hypervisor, which negotiates it all the same): the device hears nothing of queue pairs,
addresses and receive modes. So the bridge negotiates a control vring of its own, and tells the
device what it has to know. One that passes the control vring through has each command relayed.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import trio

from vhostbridge.backends.device import Device, whole
from vhostbridge.backends.errors import BridgeError, TransportLost, Unsupported
from vhostbridge.backends.fds import OwnedFd
from vhostbridge.backends.guest import MemoryRegion, VringSetup
from vhostbridge.backends.lifecycle import State
from vhostbridge.backends.state import DeviceState
from vhostbridge.backends.vdpa.device import VdpaDevice
from vhostbridge.backends.virtio import DeviceId, NetFeature, net_control_vring

from .command_ring import SIZE, CommandRing
from .control_commands import OK, PROMISC, command_name, set_mac, set_pairs, set_rx_mode
from .control_relay import ControlRelay
from .control_state import ControlState
from .window import CEILING, free_window
from .wrapped import WrappedDevice

_log = logging.getLogger("vhostbridge.control")

_CTRL_VQ = NetFeature.CTRL_VQ.mask
_MQ = NetFeature.MQ.mask
_RX = NetFeature.CTRL_RX.mask
_MAC = NetFeature.CTRL_MAC_ADDR.mask
_SETS_MAC = _CTRL_VQ | _MAC | NetFeature.MAC.mask
# Of no use to a driver without configuration space: the device would wait for an answer.
_NOT_FOR_DEVICE = NetFeature.GUEST_ANNOUNCE.mask


def pairs_of(vrings: Sequence[VringSetup]) -> int:
    """How many queue pairs a device uses when these vrings are the front-end's."""
    return max((vring.index // 2 + 1 for vring in vrings if vring.enabled), default=1)


class ControlledDevice(WrappedDevice):
    """A vDPA network device whose control vring the bridge drives.

    To its user it is the device itself, with what was negotiated with the front-end.
    """

    _inner: VdpaDevice

    def __init__(self, inner: VdpaDevice, nursery: trio.Nursery, mac: bytes | None = None) -> None:
        super().__init__(inner)
        # One region is for the control vring, where it can't be apart from guest memory.
        regions = max(1, inner.info.region_max - 1)
        self.info = replace(inner.info, region_max=regions, takes_control=True)
        self._nursery = nursery
        self._mac = mac
        self._memory: Sequence[MemoryRegion] = ()
        self._features = 0
        # One for what the bridge says of its own, one for what it passes on; made when wanted.
        self._rings: dict[bool, CommandRing] = {}
        self._stale: list[CommandRing] = []
        # The one that the device has, or had until it was reset.
        self._ring: CommandRing | None = None
        self._relay = ControlRelay(inner.info.target, self.fail)
        # Whether it is for what the guest says.
        self._relays = False
        # The queue pairs that the device was told to use.
        self._pairs = 1
        self._thread = trio.CapacityLimiter(1)

    @property
    def features(self) -> int:
        return self._features

    @features.setter
    def features(self, value: int) -> None:
        self._features = value

    @property
    def vrings(self) -> Mapping[int, VringSetup]:
        control = self._relay.vring
        if control is None:
            return self._inner.vrings
        return MappingProxyType({**self._inner.vrings, control.index: control})

    @property
    def control_vring(self) -> int | None:
        return None if self._relay.vring is None else self._relay.vring.index

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
        async with self._relay_stopped():
            await self._inner.set_memory(regions)
            self._memory = regions

    # The guest's control vring stands still for the block, and goes on if the device runs then.
    @asynccontextmanager
    async def _relay_stopped(self) -> AsyncIterator[None]:
        with trio.CancelScope(shield=True):
            await self._relay.stop()
            try:
                yield
            finally:
                if self.state is State.RUNNING and self._ring is not None:
                    await self._relay.start(self._nursery, self._ring, self._features, self._memory)

    # What the device negotiates when the front-end negotiated ``features`` and does not pass the
    # control vring through; the same if the device can do without one of ours.
    def _negotiated(self, features: int, vrings: Sequence[VringSetup]) -> int:
        offered = self.info.features
        if not offered & _CTRL_VQ:
            return features
        wanted = offered & _RX
        if self._mac is not None:
            wanted |= _MAC
        if features & _MQ or any(vring.index > 1 for vring in vrings):
            wanted |= offered & _MQ
        return (features & ~_NOT_FOR_DEVICE) | wanted | _CTRL_VQ if wanted else features

    @whole
    async def run(self, features: int, vrings: Sequence[VringSetup]) -> None:
        index = net_control_vring(features, self.info.queue_num)
        async with self._relay_stopped():
            control = next((self._based(v) for v in vrings if v.index == index), None)
            # A guest that said something has only stopped its control vring, if it is not there.
            said = features & _CTRL_VQ and self.control_state() is not None
            relays = control is not None or bool(said)
            await self._run(features, [v for v in vrings if v.index != index], relays)
            self._relay.vring = control

    def _based(self, vring: VringSetup) -> VringSetup:
        known = self._relay.vring
        if vring.base is not None:
            return vring
        if known is None or known.base is None:
            raise BridgeError(f"vring {vring.index} has no base to go on from")
        return replace(vring, base=known.base)

    async def _run(self, features: int, vrings: Sequence[VringSetup], relays: bool) -> None:
        negotiated = features if relays else self._negotiated(features, vrings)
        ran, before = self.state is State.RUNNING, list(self._inner.vrings.values())
        ring = self._own_ring(relays) if negotiated & _CTRL_VQ else None
        self._inner.control = ring
        await self._inner.run(negotiated, vrings)
        self._features, self._ring, self._relays = features, ring, relays
        self._close_stale()
        if ring is None or relays:
            return
        try:
            await self._follow_pairs(pairs_of(vrings))
        except Unsupported as error:
            await self._go_back(ran, before, error)
            raise

    def _close_stale(self) -> None:
        while self._stale:
            self._stale.pop().close()

    # To the vrings that a device had which was resumed with others.
    async def _go_back(self, ran: bool, vrings: Sequence[VringSetup], error: BridgeError) -> None:
        try:
            await self._inner.suspend()
            if ran:
                again = [replace(vring, base=None) for vring in vrings]
                await self._inner.run(self._inner.features, again)
        except BridgeError as second:
            self.fail(f"{error}; going back failed too: {second}")

    # Whether the device was started with a control vring that the front-end knows nothing of.
    @property
    def _drives(self) -> bool:
        return bool(self._inner.features & _CTRL_VQ and not self._relays)

    def _own_ring(self, relays: bool) -> CommandRing:
        ring = self._rings.get(relays)
        if ring is None:
            say = self._introduce_guest if relays else self._introduce
            ring = self._rings[relays] = CommandRing(self.info, self._window(), say)
        elif self.state is State.RESET:
            ring.move(self._window())
        return ring

    def _introduce_guest(
        self, ring: CommandRing, features: int, vrings: Sequence[VringSetup]
    ) -> None:
        self._relay.introduce(ring, features)

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
        if self._is_guests_control(index):
            await self._change_control(enabled=enabled)
            return
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
        if self._ring is None or not self._inner.features & _CTRL_VQ:
            return {}
        lies = f"{'apart from' if self._ring.isolated else 'beside'} guest memory"
        report = {"driver": "guest", "vring": str(self._ring.index), "lies": lies}
        if not self._drives:
            return report | self._relay.known.report()
        report["driver"] = "bridge"
        if self._inner.features & _MQ:
            report["pairs"] = str(self._pairs)
        if self._inner.features & _RX:
            report["rx"] = "promisc"
        if self._mac is not None:
            report["mac"] = self._mac.hex(":")
        return report

    # Life

    @whole
    async def suspend(self) -> None:
        async with self._relay_stopped():
            await self._inner.suspend()

    @whole
    async def stop_vring(self, index: int) -> int:
        if self._relay.vring is None:
            return await self._inner.stop_vring(index)
        await self.suspend()
        if index != self._relay.vring.index:
            return await self._inner.stop_vring(index)
        assert self._relay.vring.base is not None
        return self._relay.vring.base

    async def reset(self) -> None:
        await self._relay.stop()
        await self._inner.reset()
        self._relay.vring = None
        self._relay.forget()
        self._features = 0

    # With another ring the device is restarted, which forgets.
    def new_driver(self) -> None:
        if self._relay.known.to_mapping() and True in self._rings:
            self._stale.append(self._rings.pop(True))
        self._relay.forget()

    def control_state(self) -> dict[str, object] | None:
        return self._relay.known.to_mapping() or None

    def load(self, state: DeviceState) -> None:
        known = ControlState.from_mapping(state.control or {})
        if known.mac is None and state.features & _SETS_MAC == _SETS_MAC and state.config:
            # The guest's driver read it there: it is the same on every device.
            known = replace(known, mac=state.config[:6])
        index = net_control_vring(state.features, self.info.queue_num)
        control = next((v for v in state.vrings if v.index == index), None)
        self._inner.load(replace(state, vrings=tuple(v for v in state.vrings if v is not control)))
        self._relay.vring = None if control is None else control.setup()
        self._relay.known = known
        self._features = state.features

    async def aclose(self) -> None:
        await self._relay.stop()
        await self._inner.aclose()
        self._close_stale()
        for ring in self._rings.values():
            ring.close()

    # Changes to the guest's control vring

    def _is_guests_control(self, index: int) -> bool:
        return self._relay.vring is not None and self._relay.vring.index == index

    async def _change_control(self, **changes: Any) -> None:
        async with self._relay_stopped():
            assert self._relay.vring is not None
            self._relay.vring = replace(self._relay.vring, **changes)

    async def set_call(self, index: int, fd: OwnedFd | None) -> None:
        if self._is_guests_control(index):
            await self._change_control(call=fd)
        else:
            await self._inner.set_call(index, fd)

    async def set_kick(self, index: int, fd: OwnedFd | None) -> None:
        if self._is_guests_control(index):
            await self._change_control(kick=fd)
        else:
            await self._inner.set_kick(index, fd)

    async def set_err(self, index: int, fd: OwnedFd | None) -> None:
        if self._is_guests_control(index):
            await self._change_control(err=fd)
        else:
            await self._inner.set_err(index, fd)


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
    async with trio.open_nursery() as nursery:
        device = ControlledDevice(inner, nursery, mac)
        try:
            yield device
        finally:
            with trio.CancelScope(shield=True):
                await device.aclose()
