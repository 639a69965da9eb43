"""What there is to say of a device's features, configuration, vrings and abilities: pure functions.

They turn what a transport told into plain values for JSON; masks and addresses are hexadecimal
strings, because JSON numbers lose bits beyond 2**53.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from vhostbridge.backends.device import DeviceInfo
from vhostbridge.backends.lifecycle import Capabilities
from vhostbridge.backends.vhostuser.messages import ProtocolFeature
from vhostbridge.backends.virtio import DeviceId, FsFeature, describe_vring, feature_names
from vhostbridge.backends.virtio_config import ConfigValue

from .offer import HIDDEN

if TYPE_CHECKING:
    # It brings netlink with it, which takes longer to import than all the rest.
    from vhostbridge.backends.vdpa.inventory import Report


def flag_names(flags: int, known: Mapping[str, int]) -> list[str]:
    """Name each bit that is set, lowest first; a bit without a name is ``bit_N``."""
    names = {mask: name for name, mask in known.items()}
    bits = (bit for bit in range(flags.bit_length()) if flags >> bit & 1)
    return [names.get(1 << bit, f"bit_{bit}") for bit in bits]


def protocol_names(features: int) -> list[str]:
    """Name vhost-user protocol features."""
    return flag_names(features, {f.name or "": f.value for f in ProtocolFeature})


def features_report(features: int, device_id: int | None, negotiated: int | None = None) -> Report:
    """The device's features; those of them that a front-end is offered; the rest and why."""
    hidden = {feature: why for feature, why in HIDDEN.items() if features & feature.mask}
    offered = features & ~sum(feature.mask for feature in hidden)
    report: Report = {
        "mask": hex(features),
        "device": feature_names(features, device_id),
        "offered": feature_names(offered, device_id),
        "hidden": {feature.name: why for feature, why in hidden.items()},
    }
    if negotiated is not None:
        report["negotiated"] = feature_names(negotiated, device_id)
    return report


def vrings_report(
    device_id: int | None,
    count: int,
    features: int,
    config: Mapping[str, ConfigValue],
    max_sizes: Sequence[int | None] = (),
) -> list[Report]:
    """One entry a vring: index, name by what it carries, largest size where it is known."""
    pairs = config.get("max_dataqueues" if device_id == DeviceId.CRYPTO else "max_virtqueue_pairs")
    max_pairs = pairs if isinstance(pairs, int) else None
    vrings: list[Report] = []
    for index in range(count):
        vring: Report = {"index": index}
        if device_id is not None:
            vring["name"] = describe_vring(device_id, index, features, max_pairs)
        if index < len(max_sizes) and max_sizes[index] is not None:
            vring["max_size"] = max_sizes[index]
        vrings.append(vring)
    return vrings


def backend_vring_count(
    device_id: int | None, queue_num: int, features: int, config: Mapping[str, ConfigValue]
) -> int:
    """How many vrings a vhost-user back-end's answer to GET_QUEUE_NUM stands for.

    It counts pairs for net; virtiofsd counts all its vrings, and its configuration may say less.
    """
    if device_id == DeviceId.NET:
        return 2 * queue_num
    requests = config.get("num_request_queues")
    if device_id == DeviceId.FS and isinstance(requests, int):
        return requests + 1 + bool(features & FsFeature.NOTIFICATION.mask)
    return queue_num


def capabilities_report(capabilities: Capabilities) -> dict[str, dict[str, str]]:
    """How each thing is done and why so: ``{"suspend": {"how": "native", "why": …}, …}``."""
    abilities = {field.name: getattr(capabilities, field.name) for field in fields(capabilities)}
    return {
        name: {"how": ability.how.value, "why": ability.why} for name, ability in abilities.items()
    }


def obstacles(info: DeviceInfo, capabilities: Capabilities) -> dict[str, list[str]]:
    """Why the device can't be suspended, resumed, saved, loaded or migrated; absent where it can.

    ``migrate`` is migration by the VMM, which needs dirty logging too.
    """
    verbs = ("suspend", "resume", "save", "load")
    found = {verb: [ability.why] for verb in verbs if not (ability := getattr(capabilities, verb))}
    migrate = [f"{verb}: {why}" for verb in ("save", "load") for why in found.get(verb, ())]
    if not capabilities.dirty_log:
        migrate.append(f"dirty logging: {capabilities.dirty_log.why}")
    if migrate:
        found["migrate"] = migrate
    return found
