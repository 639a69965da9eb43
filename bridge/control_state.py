"""What a virtio-net device was told through its control vring: learned command by command, saved,
and told again to a device that has forgotten it, or is another one. Sans-IO.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from vhostbridge.backends.errors import StateError
from vhostbridge.backends.virtio import NetFeature

from . import control_commands as commands
from .control_commands import set_mac, set_pairs, set_rx_mode

_MAC = 6
_MAX_VLAN = 4095
_MAX_PAIRS = 0x8000

# Receive modes by their names in a state, in the order of the specification.
_MODES: Mapping[str, bytes] = MappingProxyType(
    {
        "promisc": commands.PROMISC,
        "allmulti": commands.ALLMULTI,
        "alluni": commands.ALLUNI,
        "nomulti": commands.NOMULTI,
        "nouni": commands.NOUNI,
        "nobcast": commands.NOBCAST,
    }
)
_MODE_NAMES = {command: name for name, command in _MODES.items()}


@dataclass(frozen=True, slots=True)
class ControlState:
    """What the device was told last; ``None`` and empty stand for never.

    Attributes:
        mac: the address of the device.
        unicast, multicast: the table of addresses that it receives too.
        rx: receive modes by name.
        vlans: the identifiers that it lets pass.
        pairs: how many queue pairs it uses.
        rss, hash: data of RSS_CONFIG, which stands for the pairs then, and of HASH_CONFIG.
        offloads: mask of guest offloads.
        coalescing: data of the NOTF_COAL commands, by their bytes, VQ_SET with the vring's.
        tunnel: data of HASH_TUNNEL SET.
    """

    mac: bytes | None = None
    unicast: tuple[bytes, ...] | None = None
    multicast: tuple[bytes, ...] = ()
    rx: Mapping[str, bool] = field(default_factory=dict)
    vlans: frozenset[int] = frozenset()
    pairs: int | None = None
    rss: bytes | None = None
    hash: bytes | None = None
    offloads: int | None = None
    coalescing: Mapping[bytes, bytes] = field(default_factory=dict)
    tunnel: bytes | None = None

    def after(self, command: bytes) -> ControlState:
        """The state once the device has done a command that ``refusal`` has nothing against."""
        kind, data = command[:2], command[2:]
        if kind in _MODE_NAMES:
            return replace(self, rx={**self.rx, _MODE_NAMES[kind]: bool(data[0])})
        if kind in (commands.VLAN_ADD, commands.VLAN_DEL):
            vlan = {int.from_bytes(data, "little")}
            added = kind == commands.VLAN_ADD
            return replace(self, vlans=self.vlans | vlan if added else self.vlans - vlan)
        if kind in (commands.COAL_TX_SET, commands.COAL_RX_SET, commands.COAL_VQ_SET):
            key = command[:4] if kind == commands.COAL_VQ_SET else kind
            # What is set for all vrings takes the place of what was set for one.
            kept = {} if key == kind else dict(self.coalescing)
            if key == kind:
                kept = {k: v for k, v in self.coalescing.items() if not _overrides(kind, k)}
            return replace(self, coalescing={**kept, key: data})
        learn = _LEARN.get(kind)
        return self if learn is None else learn(self, data)

    def commands(self, features: int) -> Iterator[bytes]:
        """What tells it to a device that negotiated ``features``, in QEMU's order."""
        if self.mac is not None and features & NetFeature.CTRL_MAC_ADDR.mask:
            yield set_mac(self.mac)
        if self.unicast is not None:
            yield commands.MAC_TABLE_SET + _table(self.unicast) + _table(self.multicast)
        if self.rss is not None:
            yield commands.RSS_CONFIG + self.rss
        elif self.pairs is not None:
            yield set_pairs(self.pairs)
        if self.hash is not None:
            yield commands.HASH_CONFIG + self.hash
        if self.offloads is not None:
            yield commands.GUEST_OFFLOADS_SET + self.offloads.to_bytes(8, "little")
        for name, kind in _MODES.items():
            if name in self.rx:
                yield set_rx_mode(kind, self.rx[name])
        for vlan in sorted(self.vlans):
            yield commands.VLAN_ADD + vlan.to_bytes(2, "little")
        if self.tunnel is not None:
            yield commands.HASH_TUNNEL_SET + self.tunnel
        for kind, data in sorted(self.coalescing.items()):
            yield kind[:2] + data

    def to_mapping(self) -> dict[str, object]:
        """The ``control`` section of a device state; empty if the device was told nothing."""
        found: dict[str, object] = {
            "mac": self.mac,
            "pairs": self.pairs,
            "rss": self.rss,
            "hash": self.hash,
            "offloads": self.offloads,
            "tunnel": self.tunnel,
        }
        if self.unicast is not None:
            found |= {"unicast": list(self.unicast), "multicast": list(self.multicast)}
        found |= {
            "rx": dict(self.rx) or None,
            "vlans": sorted(self.vlans) or None,
            "coalescing": [k[:2] + v for k, v in sorted(self.coalescing.items())] or None,
        }
        return {key: value for key, value in found.items() if value is not None}

    def report(self) -> dict[str, str]:
        """The same for people: only what there is to say."""
        found = {
            "mac": "" if self.mac is None else self.mac.hex(":"),
            "pairs": "" if self.pairs is None else str(self.pairs),
            "rss": "set" if self.rss is not None else "",
            "rx": " ".join(name for name in _MODES if self.rx.get(name)),
            "addresses": str(len(self.unicast or ()) + len(self.multicast) or ""),
            "vlans": str(len(self.vlans) or ""),
            "offloads": "" if self.offloads is None else hex(self.offloads),
        }
        return {key: value for key, value in found.items() if value}

    @classmethod
    def from_mapping(cls, saved: Mapping[str, Any]) -> ControlState:
        """The reverse.

        Raises:
            StateError: it is none that a device can be told, or a newer version's.
        """
        state = cls()
        try:
            if saved.keys() - _KEYS:
                raise ValueError(", ".join(sorted(saved.keys() - _KEYS)))
            for command in _as_commands(saved):
                if refusal(command):
                    raise ValueError(commands.command_name(command))
                state = state.after(command)
            whole = state.to_mapping() == dict(saved)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            raise StateError(
                f"the state's control section can't be told to a device: {error}",
                "load it with the version that wrote it",
            ) from None
        if not whole:
            raise StateError(
                "the state's control section can't be told to a device: it contradicts itself",
                "load it with the version that wrote it",
            )
        return state


def _overrides(kind: bytes, key: bytes) -> bool:
    if key[:2] != commands.COAL_VQ_SET:
        return key == kind
    vring = int.from_bytes(key[2:], "little")
    return bool(vring % 2) == (kind == commands.COAL_TX_SET)


_KEYS = {
    *("mac", "pairs", "rss", "hash", "offloads", "tunnel", "unicast", "multicast", "rx"),
    *("vlans", "coalescing"),
}


# A saved section as the commands that lead to it.
def _as_commands(saved: Mapping[str, Any]) -> Iterator[bytes]:
    if "mac" in saved:
        yield set_mac(saved["mac"])
    if "unicast" in saved or "multicast" in saved:
        tables = (saved["unicast"], saved["multicast"])
        yield commands.MAC_TABLE_SET + b"".join(_table(tuple(table)) for table in tables)
    if "pairs" in saved:
        yield set_pairs(saved["pairs"])
    for key, kind in (
        ("rss", commands.RSS_CONFIG),
        ("hash", commands.HASH_CONFIG),
        ("tunnel", commands.HASH_TUNNEL_SET),
    ):
        if key in saved:
            yield kind + saved[key]
    if "offloads" in saved:
        yield commands.GUEST_OFFLOADS_SET + saved["offloads"].to_bytes(8, "little")
    for name, on in saved.get("rx", {}).items():
        yield set_rx_mode(_MODES[name], on)
    for vlan in saved.get("vlans", ()):
        yield commands.VLAN_ADD + vlan.to_bytes(2, "little")
    for command in saved.get("coalescing", ()):
        if command[:1] != commands.COAL_TX_SET[:1]:
            raise ValueError("coalescing")
        yield command


def _table(addresses: tuple[bytes, ...]) -> bytes:
    if any(len(address) != _MAC for address in addresses):
        raise ValueError("an address of the MAC table")
    return len(addresses).to_bytes(4, "little") + b"".join(addresses)


def _tables(data: bytes) -> tuple[tuple[bytes, ...], tuple[bytes, ...]] | None:
    found = []
    for _ in range(2):
        count = int.from_bytes(data[:4], "little")
        end = 4 + _MAC * count
        if len(data) < max(4, end):
            return None
        found.append(tuple(data[at : at + _MAC] for at in range(4, end, _MAC)))
        data = data[end:]
    return None if data else (found[0], found[1])


def _learn_table(state: ControlState, data: bytes) -> ControlState:
    tables = _tables(data)
    assert tables is not None
    return replace(state, unicast=tables[0], multicast=tables[1])


# The pairs take the place of RSS and the other way round (virtio 1.4, section 5.1.6.5.5).
_LEARN: Mapping[bytes, Callable[[ControlState, bytes], ControlState]] = MappingProxyType(
    {
        commands.MAC_ADDR_SET: lambda state, data: replace(state, mac=data),
        commands.MAC_TABLE_SET: _learn_table,
        commands.VQ_PAIRS_SET: lambda state, data: replace(
            state, pairs=int.from_bytes(data, "little"), rss=None
        ),
        commands.RSS_CONFIG: lambda state, data: replace(state, rss=data, pairs=None),
        commands.HASH_CONFIG: lambda state, data: replace(state, hash=data),
        commands.GUEST_OFFLOADS_SET: lambda state, data: replace(
            state, offloads=int.from_bytes(data, "little")
        ),
        commands.HASH_TUNNEL_SET: lambda state, data: replace(state, tunnel=data),
    }
)


def _exactly(size: int) -> Callable[[bytes], bool]:
    return lambda data: len(data) == size


def _is_rss(data: bytes) -> bool:
    # hash types, mask, unclassified queue; the table; queues for transmission; the key.
    if len(data) < 8:
        return False
    mask = int.from_bytes(data[4:6], "little")
    key = 8 + 2 * (mask + 1) + 2
    return not mask & (mask + 1) and len(data) > key and len(data) == key + 1 + data[key]


def _is_hash(data: bytes) -> bool:
    return len(data) > 12 and len(data) == 13 + data[12]


# Each command with what its data must be; and the features, any of which it takes.
_FORMS: Mapping[bytes, tuple[Callable[[bytes], bool], tuple[NetFeature, ...]]] = MappingProxyType(
    {
        **dict.fromkeys(
            (commands.PROMISC, commands.ALLMULTI), (_exactly(1), (NetFeature.CTRL_RX,))
        ),
        **dict.fromkeys(
            (commands.ALLUNI, commands.NOMULTI, commands.NOUNI, commands.NOBCAST),
            (_exactly(1), (NetFeature.CTRL_RX_EXTRA,)),
        ),
        commands.MAC_TABLE_SET: (
            lambda data: _tables(data) is not None,
            (NetFeature.CTRL_RX,),
        ),
        commands.MAC_ADDR_SET: (_exactly(_MAC), (NetFeature.CTRL_MAC_ADDR,)),
        **dict.fromkeys(
            (commands.VLAN_ADD, commands.VLAN_DEL),
            (
                lambda data: len(data) == 2 and int.from_bytes(data, "little") <= _MAX_VLAN,
                (NetFeature.CTRL_VLAN,),
            ),
        ),
        commands.ANNOUNCE_ACK: (_exactly(0), (NetFeature.GUEST_ANNOUNCE,)),
        commands.VQ_PAIRS_SET: (
            lambda data: len(data) == 2 and 0 < int.from_bytes(data, "little") <= _MAX_PAIRS,
            (NetFeature.MQ,),
        ),
        commands.RSS_CONFIG: (_is_rss, (NetFeature.RSS,)),
        commands.HASH_CONFIG: (_is_hash, (NetFeature.HASH_REPORT,)),
        commands.GUEST_OFFLOADS_SET: (_exactly(8), (NetFeature.CTRL_GUEST_OFFLOADS,)),
        **dict.fromkeys(
            (commands.COAL_TX_SET, commands.COAL_RX_SET), (_exactly(8), (NetFeature.NOTF_COAL,))
        ),
        commands.COAL_VQ_SET: (_exactly(12), (NetFeature.VQ_NOTF_COAL,)),
        commands.COAL_VQ_GET: (
            lambda data: len(data) in (4, 12),
            (NetFeature.VQ_NOTF_COAL,),
        ),
        commands.HASH_TUNNEL_SET: (_exactly(4), (NetFeature.HASH_TUNNEL,)),
        commands.STATS_QUERY: (_exactly(0), (NetFeature.DEVICE_STATS,)),
        commands.STATS_GET: (
            lambda data: len(data) > 0 and len(data) % 16 == 0,
            (NetFeature.DEVICE_STATS,),
        ),
    }
)


def refusal(command: bytes, features: int | None = None) -> str:
    """Why a command is not one for a device that negotiated ``features``; empty if it is.

    What can't be understood could not be told again: the device does not get to see it.
    """
    form = _FORMS.get(command[:2])
    if form is None:
        return "it is none that is known"
    fits, needs = form
    if features is not None and not any(features & feature.mask for feature in needs):
        return f"{needs[0].name} was not negotiated"
    return "" if fits(command[2:]) else f"{len(command) - 2} bytes are not its data"
