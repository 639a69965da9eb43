"""What a front-end is offered: the honest intersection of the device's and the bridge's."""

from __future__ import annotations

from vhostbridge.backends.device import DeviceInfo
from vhostbridge.backends.errors import PeerError
from vhostbridge.backends.vhostuser.messages import ProtocolFeature
from vhostbridge.backends.virtio import TransportFeature, feature_names

# Bits that can't cross: legacy ones, those of vhost alone, ACCESS_PLATFORM (the bridge's own
# business towards vDPA: IOVA equals guest physical address), and those whose mechanism neither
# vhost-user nor vhost-vdpa carries.
_HIDDEN = (
    TransportFeature.NOTIFY_ON_EMPTY.mask
    | TransportFeature.LOG_ALL.mask
    | TransportFeature.PROTOCOL_FEATURES.mask
    | TransportFeature.ACCESS_PLATFORM.mask
    | TransportFeature.SR_IOV.mask
    | TransportFeature.NOTIFICATION_DATA.mask
    | TransportFeature.NOTIF_CONFIG_DATA.mask
    | TransportFeature.RING_RESET.mask
    | TransportFeature.ADMIN_VQ.mask
    | TransportFeature.SUSPEND.mask
)


def offered_features(info: DeviceInfo) -> int:
    """The answer to GET_FEATURES."""
    return info.features & ~_HIDDEN | TransportFeature.PROTOCOL_FEATURES.mask


def offered_protocol(info: DeviceInfo) -> ProtocolFeature:
    """The answer to GET_PROTOCOL_FEATURES. QEMU acks bits that it does not know: offer only what
    the bridge can live with."""
    offer = (
        ProtocolFeature.MQ
        | ProtocolFeature.REPLY_ACK
        | ProtocolFeature.BACKEND_REQ
        | ProtocolFeature.RESET_DEVICE
        | ProtocolFeature.CONFIGURE_MEM_SLOTS
        | ProtocolFeature.STATUS
    )
    if info.config_size:
        offer |= ProtocolFeature.CONFIG
    if info.forwards_mtu:
        offer |= ProtocolFeature.NET_MTU
    if info.forwards_rarp:
        offer |= ProtocolFeature.RARP
    return offer


def check_features(info: DeviceInfo, features: int) -> None:
    """Refuse features that were not offered.

    Raises:
        PeerError: naming them.
    """
    extra = features & ~offered_features(info)
    if extra:
        names = ", ".join(feature_names(extra, info.device_id))
        raise PeerError(
            f"the front-end wants features that {info.target} was not offering: {names}",
            "it may have been started with another back-end: restart the guest's device",
        )
