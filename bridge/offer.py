"""What a front-end is offered: the honest intersection of the device's and the bridge's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType

from vhostbridge.backends.device import Device, DeviceInfo
from vhostbridge.backends.errors import ConfigError, PeerError, Unsupported
from vhostbridge.backends.lifecycle import How
from vhostbridge.backends.vhostuser.messages import ProtocolFeature
from vhostbridge.backends.virtio import (
    VHOST_ONLY_FEATURES,
    BlockFeature,
    DeviceId,
    NetFeature,
    TransportFeature,
    feature_names,
    parse_features,
)

_NEITHER = "neither vhost-user nor vhost-vdpa has a way to do it"

#: Device features that no front-end is offered, and why not.
HIDDEN: Mapping[TransportFeature, str] = MappingProxyType(
    {
        TransportFeature.NOTIFY_ON_EMPTY: "legacy",
        TransportFeature.PROTOCOL_FEATURES: "belongs to vhost-user, not to the device",
        TransportFeature.ACCESS_PLATFORM: "the bridge's own business: it maps guest memory so "
        "that device addresses are guest addresses",
        TransportFeature.SR_IOV: _NEITHER,
        TransportFeature.NOTIFICATION_DATA: _NEITHER,
        TransportFeature.NOTIF_CONFIG_DATA: _NEITHER,
        TransportFeature.RING_RESET: _NEITHER,
        TransportFeature.ADMIN_VQ: _NEITHER,
        TransportFeature.SUSPEND: _NEITHER,
    }
)
_HIDDEN_MASK = sum(feature.mask for feature in HIDDEN)


def without(info: DeviceInfo, names: Iterable[str]) -> DeviceInfo:
    """The same device as if it had not the features of these names, whether or not it has them.

    Raises:
        ConfigError: a name is none of the device's type, or no driver could do without.
    """
    features = parse_features(names, info.device_id)
    needed = TransportFeature.VERSION_1.mask
    if info.device_id == DeviceId.BLOCK:
        needed |= BlockFeature.RO.mask  # a driver would write
    if refused := features & needed:
        names = ", ".join(feature_names(refused, info.device_id))
        raise ConfigError(f"a device can't be offered without {names}")
    return replace(info, features=info.features & ~features)


def offered_features(device: Device) -> int:
    """The answer to GET_FEATURES. A VMM that sees no LOG_ALL says so before it migrates."""
    offer = device.info.features & ~_HIDDEN_MASK | VHOST_ONLY_FEATURES
    if not device.capabilities.dirty_log:
        offer &= ~TransportFeature.LOG_ALL.mask
    return offer


def offered_protocol(device: Device) -> ProtocolFeature:
    """The answer to GET_PROTOCOL_FEATURES. QEMU acks bits that it does not know: offer only what
    the bridge can live with."""
    info = device.info
    offer = (
        ProtocolFeature.MQ
        | ProtocolFeature.REPLY_ACK
        | ProtocolFeature.BACKEND_REQ
        | ProtocolFeature.RESET_DEVICE
        | ProtocolFeature.CONFIGURE_MEM_SLOTS
        | ProtocolFeature.STATUS
    )
    if device.capabilities.dirty_log:
        offer |= ProtocolFeature.LOG_SHMFD
    # A device without state of its own needs no more than the VMM carries anyway, and a VMM that
    # carries it could not go to a back-end that takes none.
    if device.internal_owner is not None:
        offer |= ProtocolFeature.DEVICE_STATE
    how = device.capabilities.inflight.how
    if how is not How.NO:
        offer |= ProtocolFeature.INFLIGHT_SHMFD
    # Back-ends complete what they have before they say where a vring stopped; vrings of our own
    # need not wait for it.
    if how is How.EMULATED:
        offer |= ProtocolFeature.GET_VRING_BASE_INFLIGHT
    if info.config_size:
        offer |= ProtocolFeature.CONFIG
    if info.forwards_mtu:
        offer |= ProtocolFeature.NET_MTU
    if info.forwards_rarp:
        offer |= ProtocolFeature.RARP
    return offer


def told_queues(device: Device, protocol: ProtocolFeature) -> int:
    """The answer to GET_QUEUE_NUM. Of a network device QEMU wants to know how many pairs of vrings
    there are. cloud-hypervisor, crosvm and OpenVMM, which do not speak STATUS, count vrings, and
    crosvm's guest has the control vring among them.
    """
    info = device.info
    if info.device_id != DeviceId.NET or ProtocolFeature.STATUS in protocol:
        return info.queue_num
    control = bool(info.features & NetFeature.CTRL_VQ.mask)
    return min(2 * info.queue_num + control, info.vring_limit)


def check_features(device: Device, features: int) -> None:
    """Refuse features that were not offered.

    Raises:
        PeerError: naming them.
    """
    extra = features & ~offered_features(device)
    if extra:
        names = ", ".join(feature_names(extra, device.info.device_id))
        raise PeerError(
            f"the front-end wants features that {device.info.target} was not offering: {names}",
            "it may have been started with another back-end: restart the guest's device",
        )


def check_protocol(device: Device, protocol: ProtocolFeature) -> None:
    """Refuse a device in whose place a front-end negotiated more of the protocol.

    Raises:
        Unsupported: naming it.
    """
    if missing := protocol & ~offered_protocol(device):
        raise Unsupported(
            f"the front-end uses {missing.name}, which can't be had with {device.info.target}",
            "start the back-end that it was before",
        )
