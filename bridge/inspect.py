"""Look at one device or back-end socket, and tell what it offers and can do.

A device that can't be opened, because it is in use or for another reason, is described by what
netlink and sysfs tell.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import trio

from vhostbridge.backends.errors import ConfigError, KernelRefused, PeerError, TargetError
from vhostbridge.backends.holders import unix_listener
from vhostbridge.backends.vdpa.chardev import BackendFeature, Chardev
from vhostbridge.backends.vdpa.device import VdpaDevice
from vhostbridge.backends.vdpa.discovery import NoSuchDevice, VdpaNode, bus_devices, resolve
from vhostbridge.backends.vdpa.inventory import (
    InventoryEntry,
    Report,
    device_report,
    take_inventory,
)
from vhostbridge.backends.vdpa.netlink import NetlinkRefused, VdpaNetlink
from vhostbridge.backends.vdpa.opening import device_on
from vhostbridge.backends.vhostuser.connect import open_vhost_user
from vhostbridge.backends.vhostuser.device import VhostUserDevice
from vhostbridge.backends.virtio import describe_vring, device_id_of, device_name
from vhostbridge.backends.virtio_config import ConfigValue, config_sizes, decode_config

from .facts import (
    backend_vring_count,
    capabilities_report,
    features_report,
    flag_names,
    obstacles,
    protocol_names,
    vrings_report,
)
from .listing import holder_report, node_holders, running_bridges
from .offer import offered_protocol

T = TypeVar("T")

# How long a back-end may take to answer everything, in seconds. One that is busy with another
# front-end never answers.
PATIENCE = 3.0


def classify(target: str) -> tuple[str, str]:
    """Say which transport a target is on, ``vdpa`` or ``vhost-user``, and name or path there.

    Raises:
        ConfigError: a form of back-end that can't be looked at.
    """
    scheme, colon, rest = target.partition(":")
    if colon and rest and scheme in ("vdpa", "vhost-user"):
        return scheme, rest
    if colon and scheme in ("vhost-user-listen", "vhost-user-fd"):
        raise ConfigError(
            f"{scheme}: can't be inspected", "inspect the socket that the back-end listens on"
        )
    if _is_socket(target):
        return "vhost-user", target
    if "/" in target and not Path(target).name.startswith("vhost-vdpa-") and not _exists(target):
        return "vhost-user", target
    return "vdpa", target


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return False


def _exists(path: str) -> bool:
    return Path(path).exists()


def inspect(target: str, device_type: str | None = None) -> Report:
    """Everything that can be told of ``target``; keys of what nobody tells are left out.

    ``device_type`` names a vhost-user device's type, which that transport doesn't tell. A vDPA
    device that is free is opened and closed, which resets it. Blocks.

    Raises:
        ConfigError: the type is unknown, or given for a vDPA device.
        TargetError: there is no such device or socket, or its server doesn't answer.
    """
    kind, name = classify(target)
    device_id = None if device_type is None else device_id_of(device_type)
    if kind == "vhost-user":
        return {"target": target, **trio.run(_inspect_backend, name, device_id)}
    if device_id is not None:
        raise ConfigError("--type is for vhost-user sockets", "a vDPA device tells its type itself")
    return {"target": target, **trio.run(_inspect_vdpa, name)}


# vDPA


async def _inspect_vdpa(wanted: str) -> Report:
    node: VdpaNode | None = None
    try:
        node = resolve(wanted)
        name, problem = node.name, None
    except NoSuchDevice:
        raise
    except TargetError as error:
        name, problem = _name_of(wanted), error
    entry = next((one for one in take_inventory().devices if one.name == name), None)
    report = {"transport": "vhost-vdpa", "name": name, **_management_facts(entry)}
    if node is not None:
        report |= {"node": str(node.node), "held_by": _held_by(node)}
        try:
            return report | await _open_and_describe(node) | _statistics(name, report)
        except TargetError as error:
            problem = error
    assert problem is not None
    report |= {"opened": False, "not_opened": problem.message, "not_opened_hint": problem.hint}
    return report | _statistics(name, report)


def _name_of(wanted: str) -> str:
    node = Path(wanted).name
    return next((one.name for one in bus_devices() if one.char_device == node), wanted)


def _held_by(node: VdpaNode) -> list[Report]:
    return node_holders(node.name, node.node, running_bridges())


# What there is without opening the device, in the shape of what there is with it.
def _management_facts(entry: InventoryEntry | None) -> Report:
    if entry is None:
        return {}
    known = device_report(entry)
    keys = ("type", "vendor_id", "mgmtdev", "driver", "node", "interfaces")
    report: Report = {key: known[key] for key in keys if key in known}
    if entry.info is not None:
        report["device_id"] = entry.info.device_id
    config = dict(entry.config.fields) if entry.config is not None else {}
    features = entry.config.features if entry.config is not None else None
    if features is not None and entry.config is not None:
        negotiated = entry.config.negotiated_features
        report["features"] = features_report(features, entry.config.device_id, negotiated)
    if config:
        report["config"] = config
    if info := entry.info:
        sizes = [info.max_vq_size] * info.max_vqs
        report["vrings"] = vrings_report(info.device_id, info.max_vqs, features or 0, config, sizes)
    return report


async def _open_and_describe(node: VdpaNode) -> Report:
    chardev = Chardev(node.node)
    try:
        device = device_on(f"vdpa:{node.name}", chardev)
    except BaseException:
        chardev.close()
        raise
    try:
        data = await device.read_config(0, device.info.config_size)
        return _vdpa_facts(device, chardev, data)
    finally:
        await device.aclose()


def _vdpa_facts(device: VdpaDevice, chardev: Chardev, data: bytes) -> Report:
    info = device.info
    assert info.device_id is not None
    config = decode_config(info.device_id, data, info.features)
    sizes = [_if_known(chardev.vring_size, i, info.vring_size_max) for i in range(info.vring_limit)]
    vrings = vrings_report(info.device_id, info.vring_limit, info.features, config, sizes)
    for index, vring in enumerate(vrings):
        group = _if_known(chardev.vring_group, index, None)
        if group is not None:
            vring["group"] = group
        if BackendFeature.DESC_ASID in device.backend_features:
            vring["descriptor_group"] = _if_known(chardev.vring_descriptor_group, index, None)
    known = {f.name or "": f.value for f in BackendFeature}
    return {
        "opened": True,
        "type": device_name(info.device_id),
        "device_id": info.device_id,
        "features": features_report(info.features, info.device_id),
        "config": config,
        "config_size": info.config_size,
        "vrings": vrings,
        "groups": chardev.group_count(),
        "address_spaces": chardev.address_space_count(),
        "iova": {"first": hex(info.iova_first), "last": hex(info.iova_last)},
        "backend_features": {
            "mask": hex(device.backend_features),
            "names": flag_names(device.backend_features, known),
        },
        **_common_facts(device),
    }


# The kernel, or the device's driver, may be older than a question.
def _if_known(ask: Callable[[int], int], index: int, otherwise: T) -> int | T:
    try:
        return ask(index)
    except KernelRefused:
        return otherwise


def _common_facts(device: VdpaDevice | VhostUserDevice) -> Report:
    info = device.info
    return {
        "queue_num": info.queue_num,
        "memory_regions": info.region_max,
        "protocol_features": {"offered": protocol_names(offered_protocol(device))},
        "capabilities": capabilities_report(device.capabilities),
        "obstacles": obstacles(info, device.capabilities),
    }


# Counters that a vendor's driver keeps; they need privilege, and negotiated features.
def _statistics(name: str, report: Report) -> Report:
    vrings = report.get("vrings")
    found: list[Report] = []
    with suppress(TargetError, KernelRefused), VdpaNetlink() as netlink:
        for index in range(len(vrings) if isinstance(vrings, list) else 0):
            try:
                counted = netlink.queue_statistics(name, index)
            except NetlinkRefused:
                break
            label = describe_vring(
                counted.device_id, index, counted.negotiated_features, counted.max_queue_pairs
            )
            found.append({"index": index, "name": label, "counters": dict(counted.counters)})
    return {"statistics": found} if found else {}


# vhost-user


async def _inspect_backend(path: str, device_id: int | None) -> Report:
    listener = unix_listener(Path(path))
    served: Report = {"transport": "vhost-user", "socket": path}
    if listener is not None:
        backends = (f"vhost-user:{path}",)
        served["served_by"] = holder_report(listener, running_bridges(), backends)
    try:
        with trio.fail_after(PATIENCE):
            async with open_vhost_user(f"vhost-user:{path}", path) as device:
                return served | await _backend_facts(device, device_id)
    except trio.TooSlowError:
        who = "its server" if listener is None else str(listener)
        raise TargetError(
            f"{path}: {who} accepted the connection and did not answer within {PATIENCE:g} s",
            "most back-ends serve one front-end at a time: this one may have a VMM already",
        ) from None


async def _backend_facts(device: VhostUserDevice, device_id: int | None) -> Report:
    info = device.info
    report: Report = {"opened": True}
    config: dict[str, ConfigValue] = {}
    if not info.config_size:
        report["config_problem"] = "the back-end has none to read (no CONFIG): the VMM makes it up"
    elif device_id is None:
        report["config_problem"] = "--type says how to read it"
    else:
        data = await _read_config(device, device_id)
        config = decode_config(device_id, data, info.features)
        report |= {"config": config, "config_size": len(data)}
        if not data:
            report["config_problem"] = "the back-end refuses to read any of it"
    if device_id is not None:
        report |= {"type": device_name(device_id), "device_id": device_id}
        count = backend_vring_count(device_id, info.queue_num, info.features, config)
        report["vrings"] = vrings_report(device_id, count, info.features, config)
    report |= {"features": features_report(info.features, device_id), **_common_facts(device)}
    offered = device.protocol_offered
    report["protocol_features"] = {
        "mask": hex(offered),
        "device": protocol_names(offered),
        "offered": protocol_names(offered_protocol(device)),
    }
    return report


async def _read_config(device: VhostUserDevice, device_id: int) -> bytes:
    for size in config_sizes(device_id, device.info.features):
        with suppress(PeerError):
            return await device.read_config(0, size)
    return b""
