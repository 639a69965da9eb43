"""What to do with a device, from what it says of itself and what the operator allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from vhostbridge.backends.device import Device
from vhostbridge.backends.errors import ConfigError, PeerError, Unsupported
from vhostbridge.backends.virtio import (
    BlockFeature,
    DeviceId,
    NetFeature,
    TransportFeature,
    device_name,
)
from vhostbridge.backends.virtio_config import ConfigValue, config_sizes, decode_config
from vhostbridge.bridge.facts import backend_vring_count, capabilities_report

from . import block, net
from .bench import OTHER_RING_SIZE, RING_SIZE, Plan
from .driver import Driver, Memory, Ring

# More vrings of one kind show nothing new.
_BLOCK_VRINGS, _MOST_VRINGS = 2, 16


@dataclass(frozen=True, slots=True)
class Allowed:
    """What the operator lets conform do."""

    write: bool = False
    traffic: bool = False


@dataclass(slots=True)
class Prepared:
    """A plan, and what is kept of the device to look for later."""

    plan: Plan
    transport: str
    facts: dict[str, object]
    #: Features and configuration, as they were found.
    found: tuple[int, bytes]
    disk: block.BlockPlan | None = None


async def read_config(device: Device, device_id: int | None) -> bytes:
    """As much configuration space as a device of the type has and gives."""
    info = device.info
    if not info.config_size or device_id is None:
        return b""
    if device.transport == "vdpa":
        return await device.read_config(0, info.config_size)
    for size in config_sizes(device_id, info.features):
        with suppress(PeerError):
            return await device.read_config(0, size)
    return b""


async def prepare(device: Device, allowed: Allowed) -> Prepared:
    """Choose vrings, features and driver.

    Raises:
        ConfigError: what is allowed makes no sense for a device of this type.
        Unsupported: it can't be written, or has no room for a scratch area.
    """
    info = device.info
    data = await read_config(device, info.device_id)
    config: dict[str, ConfigValue] = {}
    if info.device_id is not None and data:
        config = decode_config(info.device_id, data, info.features)
    _check_allowed(info.device_id, allowed)
    version_1 = info.features & TransportFeature.VERSION_1.mask
    plan = Plan(
        features=version_1,
        vrings=_vring_count(device, config),
        ring_size=min(RING_SIZE, info.vring_size_max),
        other_ring_size=_other_size(info.vring_size_max),
        make_driver=Driver,
        no_requests=_no_driver(info.device_id),
    )
    prepared = Prepared(plan, device.transport, _facts(device, plan), (info.features, data))
    if info.device_id == DeviceId.BLOCK:
        _plan_block(prepared, info.features, config, allowed)
    elif info.device_id == DeviceId.NET:
        _plan_net(prepared, info.features, data, allowed)
    return prepared


def _check_allowed(device_id: int | None, allowed: Allowed) -> None:
    kind = "a device of unknown type" if device_id is None else f"a {device_name(device_id)} device"
    hint = "--type says what a vhost-user back-end is" if device_id is None else ""
    if allowed.write and device_id != DeviceId.BLOCK:
        raise ConfigError(f"--write is for block devices, this is {kind}", hint)
    if allowed.traffic and device_id != DeviceId.NET:
        raise ConfigError(f"--traffic is for network devices, this is {kind}", hint)


def _no_driver(device_id: int | None) -> str:
    if device_id is None:
        return "its type isn't known, so there is no driver for it (--type tells)"
    return f"there is no driver for {device_name(device_id)} devices here"


def _other_size(largest: int) -> int:
    return OTHER_RING_SIZE if largest >= OTHER_RING_SIZE else max(2, min(RING_SIZE, largest) // 2)


def _vring_count(device: Device, config: Mapping[str, ConfigValue]) -> int:
    info = device.info
    count = info.vring_limit
    if device.transport != "vdpa":
        count = backend_vring_count(info.device_id, info.queue_num, info.features, config)
    # One pair; the control vring needs a feature that is not acknowledged.
    if info.device_id == DeviceId.NET:
        return min(2, count)
    if info.device_id == DeviceId.BLOCK:
        many = info.features & BlockFeature.MQ.mask
        return min(_BLOCK_VRINGS if many else 1, count)
    return min(_MOST_VRINGS, count)


def _facts(device: Device, plan: Plan) -> dict[str, object]:
    info = device.info
    return {
        "type": None if info.device_id is None else device_name(info.device_id),
        "device_id": info.device_id,
        "features": hex(info.features),
        "vrings": plan.vrings,
        "capabilities": capabilities_report(device.capabilities),
    }


def _plan_block(
    prepared: Prepared, features: int, config: Mapping[str, ConfigValue], allowed: Allowed
) -> None:
    capacity = config.get("capacity")
    sectors = capacity if isinstance(capacity, int) else None
    disk = block.BlockPlan(sectors, flush=bool(features & BlockFeature.FLUSH.mask))
    if allowed.write:
        disk.scratch = _scratch(features, sectors)

    def make(memory: Memory, rings: Sequence[Ring]) -> Driver:
        return block.BlockDriver(memory, rings, disk)

    prepared.plan.features |= features & block.FEATURES
    prepared.plan.make_driver = make
    prepared.plan.no_requests = ""
    prepared.disk = disk


def _scratch(features: int, sectors: int | None) -> int:
    if features & BlockFeature.RO.mask:
        raise Unsupported("the disk is read-only", "leave out --write")
    start = None if sectors is None else block.scratch_start(sectors)
    if start is None:
        raise Unsupported(
            "the disk has no room for a scratch area, or does not say how large it is"
        )
    return start


def _plan_net(prepared: Prepared, features: int, data: bytes, allowed: Allowed) -> None:
    plan = prepared.plan
    # A locally administered address, where the device has none of its own.
    mac = data[:6] if features & NetFeature.MAC.mask and len(data) >= 6 else b"\x02vhost"
    known = net.NetPlan(mac)

    def make(memory: Memory, rings: Sequence[Ring]) -> Driver:
        return net.NetDriver(memory, rings, known)

    plan.make_driver = make
    plan.features |= features & net.FEATURES
    plan.no_requests = ""
    if not allowed.traffic:
        plan.no_requests = "frames are sent with --traffic only"
    elif not plan.features & TransportFeature.VERSION_1.mask:
        plan.no_requests = "the device is older than virtio 1.0"
    elif plan.vrings < 2:
        plan.no_requests = "the device has no vring to transmit on"
