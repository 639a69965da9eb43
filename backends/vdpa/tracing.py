"""What a trace says of the calls on a vhost-vdpa device, named as in the kernel's headers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from vhostbridge.backends.errors import errno_name
from vhostbridge.backends.lifecycle import Status
from vhostbridge.backends.trace import Record, bit_names
from vhostbridge.backends.virtio import device_name, feature_names
from vhostbridge.native import ffi, lib

from .chardev import BackendFeature

Fields = dict[str, object]
# The type byte of vhost's ioctls (VHOST_VIRTIO).
_MAGIC = 0xAF


@functools.cache
def names() -> Mapping[int, str]:
    """Every vhost ioctl that we know, by its number."""
    numbers = {name: getattr(lib, name) for name in dir(lib) if name.startswith("VHOST_")}
    return {number: name for name, number in numbers.items() if number >> 8 & 0xFF == _MAGIC}


def described(
    device_id: int | None, node: str, call: int | str, argument: Any, result: int, duration: int
) -> Iterable[Record]:
    """The record of a call that returned; ``duration`` is in nanoseconds.

    ``call`` is an ioctl's number, with its argument as cffi has it; or the name of an IOTLB
    message, with asid, permissions, iova, size and user address; or ``open`` or ``close``.
    """
    name = call if isinstance(call, str) else names().get(call, f"ioctl {call:#x}")
    fields: Fields = {}
    if isinstance(argument, tuple):
        fields = _iotlb(*argument)
    elif what := _FIELDS.get(name):
        fields = what(device_id, argument)
    record: dict[str, object] = {
        "kind": "ioctl",
        "from": "bridge",
        "to": node,
        "name": name,
        "result": -1 if result < 0 else result,
        "duration": duration,
    }
    if result < 0:
        record["errno"] = errno_name(-result)
    if fields:
        record["fields"] = fields
    yield record


def _iotlb(asid: int, perm: int, iova: int, size: int, address: int) -> Fields:
    fields: Fields = {"asid": asid}
    if size:
        fields |= {"iova": hex(iova), "size": hex(size)}
    if address:
        fields |= {"uaddr": hex(address), "perm": ("none", "RO", "WO", "RW")[perm & 3]}
    return fields


# What an argument means; read after the call, so it is what the kernel answered where it answers.


def _value(device_id: int | None, argument: Any) -> Fields:
    return {"value": int(argument[0])}


def _features(device_id: int | None, argument: Any) -> Fields:
    value = int(argument[0])
    return {"features": hex(value), "names": feature_names(value, device_id)}


def _backend_features(device_id: int | None, argument: Any) -> Fields:
    value = int(argument[0])
    return {"features": hex(value), "names": bit_names(BackendFeature, value)}


def _status(device_id: int | None, argument: Any) -> Fields:
    value = int(argument[0])
    return {"status": hex(value), "names": bit_names(Status, value)}


def _type(device_id: int | None, argument: Any) -> Fields:
    value = int(argument[0])
    return {"id": value, "type": device_name(value)}


def _descriptor(device_id: int | None, argument: Any) -> Fields:
    return {"fd": int(argument[0])}


def _range(device_id: int | None, argument: Any) -> Fields:
    return {"first": hex(argument.first), "last": hex(argument.last)}


def _vring(meaning: str) -> Callable[[int | None, Any], Fields]:
    def fields(device_id: int | None, argument: Any) -> Fields:
        number = int(argument.num)
        value = hex(number) if meaning == "base" else number
        return {"index": int(argument.index), meaning: value}

    return fields


def _vring_fd(device_id: int | None, argument: Any) -> Fields:
    return {"index": int(argument.index), "fd": int(argument.fd)}


def _vring_addr(device_id: int | None, argument: Any) -> Fields:
    return {
        "index": int(argument.index),
        "descriptor": hex(argument.desc_user_addr),
        "avail": hex(argument.avail_user_addr),
        "used": hex(argument.used_user_addr),
    }


def _config(device_id: int | None, argument: Any) -> Fields:
    data = bytes(ffi.buffer(argument))
    offset = int.from_bytes(data[:4], "little")
    return {"offset": offset, "size": len(data) - 8, "data": data[8:].hex()}


_FIELDS: Mapping[str, Callable[[int | None, Any], Fields]] = {
    "VHOST_GET_FEATURES": _features,
    "VHOST_SET_FEATURES": _features,
    "VHOST_GET_BACKEND_FEATURES": _backend_features,
    "VHOST_SET_BACKEND_FEATURES": _backend_features,
    "VHOST_SET_VRING_NUM": _vring("size"),
    "VHOST_GET_VRING_BASE": _vring("base"),
    "VHOST_SET_VRING_BASE": _vring("base"),
    "VHOST_SET_VRING_ADDR": _vring_addr,
    "VHOST_SET_VRING_KICK": _vring_fd,
    "VHOST_SET_VRING_CALL": _vring_fd,
    "VHOST_SET_VRING_ERR": _vring_fd,
    "VHOST_VDPA_GET_DEVICE_ID": _type,
    "VHOST_VDPA_GET_STATUS": _status,
    "VHOST_VDPA_SET_STATUS": _status,
    "VHOST_VDPA_GET_CONFIG": _config,
    "VHOST_VDPA_SET_CONFIG": _config,
    "VHOST_VDPA_SET_CONFIG_CALL": _descriptor,
    "VHOST_VDPA_SET_VRING_ENABLE": _vring("enabled"),
    "VHOST_VDPA_GET_IOVA_RANGE": _range,
    "VHOST_VDPA_GET_VRING_NUM": _value,
    "VHOST_VDPA_GET_CONFIG_SIZE": _value,
    "VHOST_VDPA_GET_VQS_COUNT": _value,
    "VHOST_VDPA_GET_GROUP_NUM": _value,
    "VHOST_VDPA_GET_AS_NUM": _value,
    "VHOST_VDPA_GET_VRING_GROUP": _vring("group"),
    "VHOST_VDPA_GET_VRING_DESC_GROUP": _vring("group"),
    "VHOST_VDPA_GET_VRING_SIZE": _vring("size"),
    "VHOST_VDPA_SET_GROUP_ASID": _vring("asid"),
}
