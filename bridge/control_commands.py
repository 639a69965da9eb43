"""Commands of virtio-net's control vring as bytes (virtio 1.4, section 5.1.6.5). Sans-IO."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from types import MappingProxyType

#: The first byte of a reply; every other value than OK is a refusal.
OK, ERR = 0, 1


class Class(IntEnum):
    """The first byte of a command."""

    RX = 0
    MAC = 1
    VLAN = 2
    ANNOUNCE = 3
    MQ = 4
    GUEST_OFFLOADS = 5
    NOTF_COAL = 6
    HASH_TUNNEL = 7
    STATS = 8


PROMISC = bytes((Class.RX, 0))
ALLMULTI = bytes((Class.RX, 1))
ALLUNI = bytes((Class.RX, 2))
NOMULTI = bytes((Class.RX, 3))
NOUNI = bytes((Class.RX, 4))
NOBCAST = bytes((Class.RX, 5))
MAC_TABLE_SET = bytes((Class.MAC, 0))
MAC_ADDR_SET = bytes((Class.MAC, 1))
VLAN_ADD = bytes((Class.VLAN, 0))
VLAN_DEL = bytes((Class.VLAN, 1))
ANNOUNCE_ACK = bytes((Class.ANNOUNCE, 0))
VQ_PAIRS_SET = bytes((Class.MQ, 0))
RSS_CONFIG = bytes((Class.MQ, 1))
HASH_CONFIG = bytes((Class.MQ, 2))
GUEST_OFFLOADS_SET = bytes((Class.GUEST_OFFLOADS, 0))
COAL_TX_SET = bytes((Class.NOTF_COAL, 0))
COAL_RX_SET = bytes((Class.NOTF_COAL, 1))
COAL_VQ_SET = bytes((Class.NOTF_COAL, 2))
COAL_VQ_GET = bytes((Class.NOTF_COAL, 3))
HASH_TUNNEL_SET = bytes((Class.HASH_TUNNEL, 0))
STATS_QUERY = bytes((Class.STATS, 0))
STATS_GET = bytes((Class.STATS, 1))

_NAMES: Mapping[bytes, str] = MappingProxyType(
    {
        PROMISC: "RX PROMISC",
        ALLMULTI: "RX ALLMULTI",
        ALLUNI: "RX ALLUNI",
        NOMULTI: "RX NOMULTI",
        NOUNI: "RX NOUNI",
        NOBCAST: "RX NOBCAST",
        MAC_TABLE_SET: "MAC TABLE_SET",
        MAC_ADDR_SET: "MAC ADDR_SET",
        VLAN_ADD: "VLAN ADD",
        VLAN_DEL: "VLAN DEL",
        ANNOUNCE_ACK: "ANNOUNCE ACK",
        VQ_PAIRS_SET: "MQ VQ_PAIRS_SET",
        RSS_CONFIG: "MQ RSS_CONFIG",
        HASH_CONFIG: "MQ HASH_CONFIG",
        GUEST_OFFLOADS_SET: "GUEST_OFFLOADS SET",
        COAL_TX_SET: "NOTF_COAL TX_SET",
        COAL_RX_SET: "NOTF_COAL RX_SET",
        COAL_VQ_SET: "NOTF_COAL VQ_SET",
        COAL_VQ_GET: "NOTF_COAL VQ_GET",
        HASH_TUNNEL_SET: "HASH_TUNNEL SET",
        STATS_QUERY: "STATS QUERY",
        STATS_GET: "STATS GET",
    }
)


def command_name(command: bytes) -> str:
    """What a command is called in the specification; its two bytes where it is in none."""
    return _NAMES.get(command[:2], f"class {command[:1].hex()} command {command[1:2].hex()}")


def set_mac(mac: bytes) -> bytes:
    """The command that gives the device an address of 6 bytes."""
    return MAC_ADDR_SET + mac


def set_pairs(pairs: int) -> bytes:
    """The command that makes the device use the first ``pairs`` queue pairs, 1 to 0x8000."""
    return VQ_PAIRS_SET + pairs.to_bytes(2, "little")


def set_rx_mode(mode: bytes, on: bool) -> bytes:
    """The command that switches one of the receive modes, such as ``PROMISC``."""
    return mode + bytes((on,))
