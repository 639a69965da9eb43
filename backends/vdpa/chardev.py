"""One open ``/dev/vhost-vdpa-N``: every ioctl and IOTLB message as a typed, blocking method.

Callers run these in a thread: some parents (VDUSE) block for up to 30 s. Source:
``linux/vhost.h`` and ``drivers/vhost/vdpa.c``.
"""

from __future__ import annotations

import errno
import os
import time
from enum import IntFlag
from pathlib import Path
from typing import Any

from vhostbridge.backends.errors import KernelRefused, TargetError
from vhostbridge.backends.fds import OwnedFd
from vhostbridge.backends.holders import holders
from vhostbridge.backends.trace import OFF, Tracer
from vhostbridge.native import ffi, lib


class BackendFeature(IntFlag):
    """Masks of GET/SET_BACKEND_FEATURES (the header has bit numbers)."""

    IOTLB_MSG_V2 = 1 << lib.VHOST_BACKEND_F_IOTLB_MSG_V2
    IOTLB_BATCH = 1 << lib.VHOST_BACKEND_F_IOTLB_BATCH
    IOTLB_ASID = 1 << lib.VHOST_BACKEND_F_IOTLB_ASID
    SUSPEND = 1 << lib.VHOST_BACKEND_F_SUSPEND
    RESUME = 1 << lib.VHOST_BACKEND_F_RESUME
    ENABLE_AFTER_DRIVER_OK = 1 << lib.VHOST_BACKEND_F_ENABLE_AFTER_DRIVER_OK
    DESC_ASID = 1 << lib.VHOST_BACKEND_F_DESC_ASID
    IOTLB_PERSIST = 1 << lib.VHOST_BACKEND_F_IOTLB_PERSIST


#: What a bridge has use for; descriptor address spaces are for shadow rings of another kind.
USED = (
    BackendFeature.IOTLB_MSG_V2
    | BackendFeature.IOTLB_BATCH
    | BackendFeature.IOTLB_ASID
    | BackendFeature.SUSPEND
    | BackendFeature.RESUME
    | BackendFeature.ENABLE_AFTER_DRIVER_OK
    | BackendFeature.IOTLB_PERSIST
)


class Chardev:
    """The character device. Opening it resets the device; so does closing it.

    Every method raises ``KernelRefused`` naming the ioctl when the kernel says no.
    """

    def __init__(self, node: Path, trace: Tracer = OFF) -> None:
        """Open ``node`` and become its owner; ``trace`` is told of every call.

        Raises:
            TargetError: it is missing, busy (and by whom) or not permitted.
        """
        self.node = node
        self.trace = trace
        began = self._watch()
        try:
            self._fd = OwnedFd(os.open(node, os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            self._tell(began, "open", -(error.errno or errno.EIO))
            raise _open_error(node, error) from None
        self._tell(began, "open", 0)
        try:
            self._ioctl("SET_OWNER", lib.VHOST_SET_OWNER, ffi.NULL)
        except KernelRefused:
            self._fd.close()
            raise

    def close(self) -> None:
        began = 0 if self._fd.closed else self._watch()
        self._fd.close()
        self._tell(began, "close", 0)

    # When a call begins, for ``_tell`` after it; 0 while nobody traces.
    def _watch(self) -> int:
        return time.monotonic_ns() if self.trace.on else 0

    def _tell(self, began: int, call: int | str, result: int, argument: Any = None) -> None:
        if began:
            from . import tracing  # which needs this module

            duration = time.monotonic_ns() - began
            details = (str(self.node), call, argument, result, duration)
            self.trace.record(tracing.described, *details, began=began)

    # No ioctl of vhost returns a positive result.
    def _ioctl(self, name: str, request: int, argument: Any) -> None:
        began = self._watch()
        result = lib.vb_ioctl(self._fd.fileno(), request, argument)
        self._tell(began, request, result, argument)
        if result < 0:
            raise KernelRefused(f"{self.node}: {name}", -result)

    def _get(self, name: str, request: int, ctype: str) -> int:
        value = ffi.new(f"{ctype} *")
        self._ioctl(name, request, value)
        return int(value[0])

    def _set(self, name: str, request: int, ctype: str, value: int) -> None:
        self._ioctl(name, request, ffi.new(f"{ctype} *", value))

    def _vring(self, name: str, request: int, index: int, num: int = 0) -> int:
        state = ffi.new("struct vhost_vring_state *", (index, num))
        self._ioctl(f"{name} of vring {index}", request, state)
        return int(state.num)

    def _vring_fd(self, name: str, request: int, index: int, fd: OwnedFd | None) -> None:
        number = -1 if fd is None else fd.fileno()
        file = ffi.new("struct vhost_vring_file *", (index, number))
        self._ioctl(f"{name} of vring {index}", request, file)

    # What the device is

    def device_id(self) -> int:
        return self._get("GET_DEVICE_ID", lib.VHOST_VDPA_GET_DEVICE_ID, "uint32_t")

    def features(self) -> int:
        return self._get("GET_FEATURES", lib.VHOST_GET_FEATURES, "uint64_t")

    def set_features(self, features: int) -> None:
        self._set("SET_FEATURES", lib.VHOST_SET_FEATURES, "uint64_t", features)

    def backend_features(self) -> BackendFeature:
        value = self._get("GET_BACKEND_FEATURES", lib.VHOST_GET_BACKEND_FEATURES, "uint64_t")
        return BackendFeature(value)

    def set_backend_features(self, features: BackendFeature) -> None:
        self._set("SET_BACKEND_FEATURES", lib.VHOST_SET_BACKEND_FEATURES, "uint64_t", int(features))

    def vring_size_max(self) -> int:
        return self._get("GET_VRING_NUM", lib.VHOST_VDPA_GET_VRING_NUM, "uint16_t")

    def vring_count(self) -> int:
        return self._get("GET_VQS_COUNT", lib.VHOST_VDPA_GET_VQS_COUNT, "uint32_t")

    def group_count(self) -> int:
        return self._get("GET_GROUP_NUM", lib.VHOST_VDPA_GET_GROUP_NUM, "uint32_t")

    def address_space_count(self) -> int:
        return self._get("GET_AS_NUM", lib.VHOST_VDPA_GET_AS_NUM, "unsigned int")

    def config_size(self) -> int:
        return self._get("GET_CONFIG_SIZE", lib.VHOST_VDPA_GET_CONFIG_SIZE, "uint32_t")

    def iova_range(self) -> tuple[int, int]:
        """First and last usable IOVA, both inclusive."""
        value = ffi.new("struct vhost_vdpa_iova_range *")
        self._ioctl("GET_IOVA_RANGE", lib.VHOST_VDPA_GET_IOVA_RANGE, value)
        return int(value.first), int(value.last)

    # Status and configuration

    def status(self) -> int:
        return self._get("GET_STATUS", lib.VHOST_VDPA_GET_STATUS, "uint8_t")

    def set_status(self, status: int) -> None:
        """Add status bits, or reset with 0. Never call it with DRIVER_OK while suspended."""
        self._set(f"SET_STATUS {status:#x}", lib.VHOST_VDPA_SET_STATUS, "uint8_t", status)

    def _config(self, name: str, request: int, offset: int, data: bytes) -> bytes:
        header = offset.to_bytes(4, "little") + len(data).to_bytes(4, "little")
        buffer = bytearray(header + data)
        self._ioctl(f"{name} {offset}+{len(data)}", request, ffi.from_buffer(buffer))
        return bytes(buffer[len(header) :])

    def config(self, offset: int, size: int) -> bytes:
        return self._config("GET_CONFIG", lib.VHOST_VDPA_GET_CONFIG, offset, bytes(size))

    def set_config(self, offset: int, data: bytes) -> None:
        """Parents may ignore the write and still succeed."""
        self._config("SET_CONFIG", lib.VHOST_VDPA_SET_CONFIG, offset, data)

    def set_config_call(self, fd: OwnedFd | None) -> None:
        number = -1 if fd is None else fd.fileno()
        self._set("SET_CONFIG_CALL", lib.VHOST_VDPA_SET_CONFIG_CALL, "int", number)

    # Vrings

    def set_vring_num(self, index: int, num: int) -> None:
        self._vring("SET_VRING_NUM", lib.VHOST_SET_VRING_NUM, index, num)

    def vring_base(self, index: int) -> int:
        """Where the ring stands; only trustworthy while the device is suspended."""
        return self._vring("GET_VRING_BASE", lib.VHOST_GET_VRING_BASE, index)

    def set_vring_base(self, index: int, base: int) -> None:
        self._vring("SET_VRING_BASE", lib.VHOST_SET_VRING_BASE, index, base)

    def set_vring_addr(self, index: int, descriptor: int, driver: int, device: int) -> None:
        """Ring areas as IOVAs. Flags and log address stay 0: vhost-vdpa has no dirty log."""
        address = ffi.new(
            "struct vhost_vring_addr *",
            {
                "index": index,
                "desc_user_addr": descriptor,
                "avail_user_addr": driver,
                "used_user_addr": device,
            },
        )
        self._ioctl(f"SET_VRING_ADDR of vring {index}", lib.VHOST_SET_VRING_ADDR, address)

    def set_vring_kick(self, index: int, fd: OwnedFd | None) -> None:
        self._vring_fd("SET_VRING_KICK", lib.VHOST_SET_VRING_KICK, index, fd)

    def set_vring_call(self, index: int, fd: OwnedFd | None) -> None:
        self._vring_fd("SET_VRING_CALL", lib.VHOST_SET_VRING_CALL, index, fd)

    def set_vring_err(self, index: int, fd: OwnedFd | None) -> None:
        self._vring_fd("SET_VRING_ERR", lib.VHOST_SET_VRING_ERR, index, fd)

    def set_vring_enable(self, index: int, enabled: bool) -> None:
        self._vring("SET_VRING_ENABLE", lib.VHOST_VDPA_SET_VRING_ENABLE, index, int(enabled))

    def vring_group(self, index: int) -> int:
        return self._vring("GET_VRING_GROUP", lib.VHOST_VDPA_GET_VRING_GROUP, index)

    def vring_descriptor_group(self, index: int) -> int:
        return self._vring("GET_VRING_DESC_GROUP", lib.VHOST_VDPA_GET_VRING_DESC_GROUP, index)

    def vring_size(self, index: int) -> int:
        """The largest size of this vring, where the parent has one per vring (Linux 6.10)."""
        return self._vring("GET_VRING_SIZE", lib.VHOST_VDPA_GET_VRING_SIZE, index)

    def set_group_asid(self, group: int, asid: int) -> None:
        self._vring("SET_GROUP_ASID", lib.VHOST_VDPA_SET_GROUP_ASID, group, asid)

    # Suspending

    # The handler reads a vring index from the argument before it knows the request, so a
    # request without argument still gets a readable word.
    def suspend(self) -> None:
        self._ioctl("SUSPEND", lib.VHOST_VDPA_SUSPEND, ffi.new("uint32_t *"))

    def resume(self) -> None:
        self._ioctl("RESUME", lib.VHOST_VDPA_RESUME, ffi.new("uint32_t *"))

    # IOTLB; the kernel answers EFAULT or EINVAL whatever the reason was

    def _iotlb(
        self, name: str, kind: int, iova: int = 0, size: int = 0, address: int = 0, asid: int = 0
    ) -> None:
        perm = lib.VHOST_ACCESS_RW if address else 0
        began = self._watch()
        result = lib.vb_iotlb(self._fd.fileno(), asid, kind, perm, iova, size, address)
        self._tell(began, f"VHOST_IOTLB_{name}", result, (asid, perm, iova, size, address))
        if result < 0:
            raise KernelRefused(f"{self.node}: IOTLB {name} {iova:#x}+{size:#x}", -result)

    def iotlb_batch_begin(self, asid: int = 0) -> None:
        self._iotlb("BATCH_BEGIN", lib.VHOST_IOTLB_BATCH_BEGIN, asid=asid)

    def iotlb_batch_end(self, asid: int = 0) -> None:
        self._iotlb("BATCH_END", lib.VHOST_IOTLB_BATCH_END, asid=asid)

    def iotlb_map(self, iova: int, size: int, address: int, asid: int = 0) -> None:
        """Let the device read and write ``size`` bytes of our memory at ``iova``."""
        self._iotlb("UPDATE", lib.VHOST_IOTLB_UPDATE, iova, size, address, asid)

    def iotlb_unmap(self, iova: int, size: int, asid: int = 0) -> None:
        """Remove every entry that overlaps the range, whole. ``size`` is never 0: with iova 0
        that would wipe the address space."""
        if size <= 0:
            raise ValueError("size must be positive")
        self._iotlb("INVALIDATE", lib.VHOST_IOTLB_INVALIDATE, iova, size, asid=asid)


def _open_error(node: Path, error: OSError) -> TargetError:
    if error.errno == errno.EBUSY:
        users = ", ".join(str(holder) for holder in holders(node))
        return TargetError(
            f"{node} is busy: held by " + (users if users else "another process"),
            "a vhost-vdpa device has one user at a time: stop that one first",
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return TargetError(
            f"no permission to open {node}",
            f"run as root, or let this user in: chown or a udev rule for {node.name}",
        )
    if error.errno == errno.EIO:
        return TargetError(
            f"{node} does not answer: Input/output error",
            "a VDUSE device whose process died stays broken: delete it and create it anew",
        )
    return TargetError(f"cannot open {node}: {error.strerror}", "vhost-bridge list shows devices")
