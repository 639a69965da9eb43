"""Opening a vhost-vdpa device, and what it says of itself."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from vhostbridge.backends.device import DeviceInfo
from vhostbridge.backends.lifecycle import Ability, Capabilities, How
from vhostbridge.backends.trace import OFF, Tracer
from vhostbridge.backends.virtio import DeviceId, NetFeature

from .chardev import BackendFeature, Chardev
from .device import VdpaDevice

# The kernel has no limit of its own before 7.2, which takes 2048 IOTLB entries; 509 is what
# vhost-user back-ends commonly offer.
REGION_MAX = 509


# Where max_virtqueue_pairs is in virtio-net's configuration.
_MAX_PAIRS = 8


def _describe(target: str, dev: Chardev) -> DeviceInfo:
    device_id = dev.device_id()
    dev.trace.device_id = device_id
    features = dev.features()
    first, last = dev.iova_range()
    config_size = dev.config_size()
    count = dev.vring_count()
    return DeviceInfo(
        target=target,
        device_id=device_id,
        features=features,
        vring_limit=count,
        queue_num=_pairs(dev, features, count) if device_id == DeviceId.NET else count,
        vring_size_max=dev.vring_size_max(),
        config_size=config_size,
        iova_first=first,
        iova_last=last,
        region_max=REGION_MAX,
    )


# vhost-user counts queue pairs for net. The control vring, which makes more than one usable, is
# the one behind them.
def _pairs(dev: Chardev, features: int, count: int) -> int:
    wanted = NetFeature.MQ.mask | NetFeature.CTRL_VQ.mask
    if features & wanted != wanted:
        return 1
    told = int.from_bytes(dev.config(_MAX_PAIRS, 2), "little")
    return max(1, min(told, (count - 1) // 2))


def _capabilities(features: BackendFeature) -> Capabilities:
    can_suspend = BackendFeature.SUSPEND in features
    can_resume = can_suspend and BackendFeature.RESUME in features
    return Capabilities(
        suspend=Ability(How.NATIVE, "VHOST_VDPA_SUSPEND")
        if can_suspend
        else Ability(
            How.EMULATED,
            "no VHOST_VDPA_SUSPEND: kicks are held, requests finish, the device is reset; "
            "split rings only",
        ),
        resume=Ability(How.NATIVE, "VHOST_VDPA_RESUME")
        if can_resume
        else Ability(How.EMULATED, "no VHOST_VDPA_RESUME: reset and programmed again"),
        save=Ability(How.NATIVE, "vring positions; vhost-vdpa has no other state to give"),
        load=Ability(How.EMULATED, "programmed from the state at the front-end's start"),
        inflight=Ability(How.NO, "vhost-vdpa has no in-flight interface; requests are drained"),
        dirty_log=Ability(How.EMULATED, "shadow vrings: vhost-vdpa has no dirty log"),
        memory_hotplug=Ability(How.NATIVE, "IOTLB update while running")
        if can_resume
        else Ability(How.NATIVE, "IOTLB update while running; removal does not pause the device"),
        vring_stop=Ability(How.EMULATED, "the whole device is suspended, the others start again")
        if can_suspend
        else Ability(How.EMULATED, "the whole device is drained and started again"),
    )


def device_on(target: str, chardev: Chardev) -> VdpaDevice:
    """A device on an open character device, which it owns from then on. Blocks."""
    capabilities = _capabilities(chardev.backend_features())
    return VdpaDevice(chardev, _describe(target, chardev), capabilities)


@asynccontextmanager
async def open_vdpa(target: str, node: Path, trace: Tracer = OFF) -> AsyncIterator[VdpaDevice]:
    """Open a vhost-vdpa device for the block's length; it is reset on both ends.

    Raises:
        TargetError: the node is missing, busy or not permitted.
    """

    def open_blocking() -> VdpaDevice:
        chardev = Chardev(node, trace)
        try:
            return device_on(target, chardev)
        except BaseException:
            chardev.close()
            raise

    device = await trio.to_thread.run_sync(open_blocking)
    device.trace = trace
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(device.watch_config)
            yield device
            nursery.cancel_scope.cancel()
    finally:
        await device.aclose()
