"""Feature bits by name: the transport's and each device type's.

Bit numbers are those of the virtio 1.4 specification and of ``linux/virtio_*.h``; names are the
specification's without their ``VIRTIO_*_F_`` prefix. Legacy bits are here too, because devices
still offer them.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from types import MappingProxyType


class DeviceId(IntEnum):
    """Virtio device types (virtio 1.4 section 5, ``linux/virtio_ids.h``)."""

    NET = 1
    BLOCK = 2
    CONSOLE = 3
    RNG = 4
    BALLOON = 5
    IOMEM = 6
    RPMSG = 7
    SCSI = 8
    NINEP = 9
    MAC80211_WLAN = 10
    RPROC_SERIAL = 11
    CAIF = 12
    MEMORY_BALLOON = 13
    GPU = 16
    CLOCK = 17
    INPUT = 18
    VSOCK = 19
    CRYPTO = 20
    SIGNAL_DIST = 21
    PSTORE = 22
    IOMMU = 23
    MEM = 24
    SOUND = 25
    FS = 26
    PMEM = 27
    RPMB = 28
    MAC80211_HWSIM = 29
    VIDEO_ENCODER = 30
    VIDEO_DECODER = 31
    SCMI = 32
    NITRO_SEC_MOD = 33
    I2C = 34
    WATCHDOG = 35
    CAN = 36
    DMABUF = 37
    PARAM_SERV = 38
    AUDIO_POLICY = 39
    BLUETOOTH = 40
    GPIO = 41
    RDMA = 42
    CAMERA = 43
    ISM = 44
    SPI = 45
    TEE = 46
    CPU_BALLOON = 47
    MEDIA = 48
    USB = 49


class FeatureBit(IntEnum):
    """A feature's bit number; ``mask`` is the bit set in a feature word."""

    @property
    def mask(self) -> int:
        """The feature as a mask: ``1 << bit``."""
        return 1 << self.value


class TransportFeature(FeatureBit):
    """Bits that mean the same for every device type, and the two that only vhost knows."""

    NOTIFY_ON_EMPTY = 24
    LOG_ALL = 26  # VHOST_F_LOG_ALL
    ANY_LAYOUT = 27
    INDIRECT_DESC = 28
    EVENT_IDX = 29
    PROTOCOL_FEATURES = 30  # VHOST_USER_F_PROTOCOL_FEATURES
    VERSION_1 = 32
    ACCESS_PLATFORM = 33
    RING_PACKED = 34
    IN_ORDER = 35
    ORDER_PLATFORM = 36
    SR_IOV = 37
    NOTIFICATION_DATA = 38
    NOTIF_CONFIG_DATA = 39
    RING_RESET = 40
    ADMIN_VQ = 41
    SUSPEND = 43


# What only vhost's own protocols know: never shown to a driver, never sent to a vDPA device.
VHOST_ONLY_FEATURES = TransportFeature.LOG_ALL.mask | TransportFeature.PROTOCOL_FEATURES.mask


class NetFeature(FeatureBit):
    """virtio-net (virtio 1.4 section 5.1.3)."""

    CSUM = 0
    GUEST_CSUM = 1
    CTRL_GUEST_OFFLOADS = 2
    MTU = 3
    MAC = 5
    GSO = 6
    GUEST_TSO4 = 7
    GUEST_TSO6 = 8
    GUEST_ECN = 9
    GUEST_UFO = 10
    HOST_TSO4 = 11
    HOST_TSO6 = 12
    HOST_ECN = 13
    HOST_UFO = 14
    MRG_RXBUF = 15
    STATUS = 16
    CTRL_VQ = 17
    CTRL_RX = 18
    CTRL_VLAN = 19
    CTRL_RX_EXTRA = 20
    GUEST_ANNOUNCE = 21
    MQ = 22
    CTRL_MAC_ADDR = 23
    DEVICE_STATS = 50
    HASH_TUNNEL = 51
    VQ_NOTF_COAL = 52
    NOTF_COAL = 53
    GUEST_USO4 = 54
    GUEST_USO6 = 55
    HOST_USO = 56
    HASH_REPORT = 57
    GUEST_HDRLEN = 59
    RSS = 60
    RSC_EXT = 61
    STANDBY = 62
    SPEED_DUPLEX = 63
    RSS_CONTEXT = 64
    GUEST_UDP_TUNNEL_GSO = 65
    GUEST_UDP_TUNNEL_GSO_CSUM = 66
    HOST_UDP_TUNNEL_GSO = 67
    HOST_UDP_TUNNEL_GSO_CSUM = 68
    OUT_NET_HEADER = 69
    IPSEC = 70


class BlockFeature(FeatureBit):
    """virtio-blk (virtio 1.4 section 5.2.3)."""

    BARRIER = 0
    SIZE_MAX = 1
    SEG_MAX = 2
    GEOMETRY = 4
    RO = 5
    BLK_SIZE = 6
    SCSI = 7
    FLUSH = 9
    TOPOLOGY = 10
    CONFIG_WCE = 11
    MQ = 12
    DISCARD = 13
    WRITE_ZEROES = 14
    LIFETIME = 15
    SECURE_ERASE = 16
    ZONED = 17


class ConsoleFeature(FeatureBit):
    """virtio-console."""

    SIZE = 0
    MULTIPORT = 1
    EMERG_WRITE = 2


class BalloonFeature(FeatureBit):
    """The traditional memory balloon."""

    MUST_TELL_HOST = 0
    STATS_VQ = 1
    DEFLATE_ON_OOM = 2
    FREE_PAGE_HINT = 3
    PAGE_POISON = 4
    REPORTING = 5


class ScsiFeature(FeatureBit):
    """virtio-scsi."""

    INOUT = 0
    HOTPLUG = 1
    CHANGE = 2
    T10_PI = 3


class GpuFeature(FeatureBit):
    """virtio-gpu."""

    VIRGL = 0
    EDID = 1
    RESOURCE_UUID = 2
    RESOURCE_BLOB = 3
    CONTEXT_INIT = 4


class VsockFeature(FeatureBit):
    """virtio-vsock."""

    STREAM = 0
    SEQPACKET = 1
    NO_IMPLIED_STREAM = 2


class CryptoFeature(FeatureBit):
    """virtio-crypto."""

    REVISION_1 = 0
    CIPHER_STATELESS_MODE = 1
    HASH_STATELESS_MODE = 2
    MAC_STATELESS_MODE = 3
    AEAD_STATELESS_MODE = 4
    AKCIPHER_STATELESS_MODE = 5


class IommuFeature(FeatureBit):
    """virtio-iommu."""

    INPUT_RANGE = 0
    DOMAIN_RANGE = 1
    MAP_UNMAP = 2
    BYPASS = 3
    PROBE = 4
    MMIO = 5
    BYPASS_CONFIG = 6


class MemFeature(FeatureBit):
    """virtio-mem."""

    ACPI_PXM = 0
    UNPLUGGED_INACCESSIBLE = 1
    PERSISTENT_SUSPEND = 2


class CanFeature(FeatureBit):
    """virtio-can."""

    CAN_CLASSIC = 0
    CAN_FD = 1
    RTR_FRAMES = 2
    LATE_TX_ACK = 3


class BluetoothFeature(FeatureBit):
    """virtio-bt (``linux/virtio_bt.h``)."""

    VND_HCI = 0
    MSFT_EXT = 1
    AOSP_EXT = 2
    CONFIG_V2 = 3


class FsFeature(FeatureBit):
    """virtio-fs."""

    NOTIFICATION = 0


class SoundFeature(FeatureBit):
    """virtio-snd."""

    CTLS = 0


# Types with one or two bits that nothing else refers to need no class of their own.
_SMALL_TYPES: dict[int, dict[int, str]] = {
    DeviceId.NINEP: {0: "MOUNT_TAG"},
    DeviceId.PMEM: {0: "SHMEM_REGION"},
    DeviceId.SCMI: {0: "P2A_CHANNELS", 1: "SHARED_MEMORY"},
    DeviceId.I2C: {0: "ZERO_LENGTH_REQUEST"},
    DeviceId.GPIO: {0: "IRQ"},
    DeviceId.CLOCK: {0: "ALARM"},
}

_CLASSES: dict[int, type[FeatureBit]] = {
    DeviceId.NET: NetFeature,
    DeviceId.BLOCK: BlockFeature,
    DeviceId.CONSOLE: ConsoleFeature,
    DeviceId.BALLOON: BalloonFeature,
    DeviceId.SCSI: ScsiFeature,
    DeviceId.GPU: GpuFeature,
    DeviceId.VSOCK: VsockFeature,
    DeviceId.CRYPTO: CryptoFeature,
    DeviceId.IOMMU: IommuFeature,
    DeviceId.MEM: MemFeature,
    DeviceId.SOUND: SoundFeature,
    DeviceId.FS: FsFeature,
    DeviceId.CAN: CanFeature,
    DeviceId.BLUETOOTH: BluetoothFeature,
}

TRANSPORT_NAMES: Mapping[int, str] = MappingProxyType({b.value: b.name for b in TransportFeature})

DEVICE_FEATURE_NAMES: Mapping[int, Mapping[int, str]] = MappingProxyType(
    {
        **{device: {b.value: b.name for b in bits} for device, bits in _CLASSES.items()},
        **_SMALL_TYPES,
    }
)
"""Device id → bit → name. A type that is missing has no feature bits of its own."""
