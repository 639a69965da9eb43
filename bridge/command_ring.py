"""The driver's side of a network device's control vring: commands as bytes, one at a time."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

from vhostbridge.backends.control_vring import ControlVring
from vhostbridge.backends.device import DeviceInfo
from vhostbridge.backends.errors import KernelRefused, TransportLost, Unsupported
from vhostbridge.backends.fds import OwnedFd, close_all, new_eventfd
from vhostbridge.backends.guest import MemoryRegion, VringSetup
from vhostbridge.backends.virtio import TransportFeature, net_control_vring
from vhostbridge.native import ffi, lib

from .control_commands import command_name

#: Bytes of the longest command, and of the longest reply.
COMMAND_MAX = 16 << 10
REPLY_MAX = 4 << 10
# How long a device may take for a command, in seconds. QEMU waits for its own for twice that.
PATIENCE = 5.0

_SLOTS = 64
# Descriptors of a command: it, and its reply.
_PARTS = 2
_PAGE = 4096
_COMMAND = _PAGE
_REPLY = _COMMAND + COMMAND_MAX
#: Bytes of the memory that the vring, commands and replies lie in.
SIZE = _REPLY + REPLY_MAX
# Where a packed ring starts: both indices 0, both wrap counters 1.
_PACKED_START = 0x80008000

Introduce = Callable[["CommandRing", int, Sequence[VringSetup]], None]


class CommandRing(ControlVring):
    """A control vring in memory of the bridge's own. Blocking; one thread at a time."""

    def __init__(self, info: DeviceInfo, iova: int, say: Introduce) -> None:
        """``say`` is called with the ring when a device was started and waits to be told things.

        Raises:
            Unsupported: the device's vrings have no room for a command.
            KernelRefused: the memory can't be mapped.
        """
        largest = info.vring_size_max
        if largest < _PARTS:
            raise Unsupported(
                f"{info.target} has vrings of {largest} descriptors at most, and a control command "
                f"takes {_PARTS}"
            )
        self.index = 2
        self._target = info.target
        self._pairs = info.queue_num
        # As split rings need it: a device may name any number.
        self._slots = 1 << min(_SLOTS, largest).bit_length() - 1
        self._say = say
        fd = OwnedFd(os.memfd_create("control-vring", os.MFD_CLOEXEC))
        os.ftruncate(fd.fileno(), SIZE)
        status = os.fstat(fd.fileno())
        self.region = MemoryRegion(iova, SIZE, fd, 0, (status.st_dev, status.st_ino, 0))
        address = lib.vb_map_shared(SIZE, fd.fileno(), 0)
        if address < 0:
            fd.close()
            raise KernelRefused("mapping a control vring", -address)
        self._address = address
        self._bytes = ffi.buffer(ffi.cast("char *", address), SIZE)
        self._handle = ffi.NULL
        self._kick, self._call = new_eventfd(), new_eventfd()

    def move(self, iova: int) -> None:
        """Lie elsewhere: the device does not have the vring now."""
        self.region = replace(self.region, guest_address=iova)

    def renew(self, features: int) -> VringSetup:
        index = net_control_vring(features, self._pairs)
        assert index is not None
        self.index = index
        packed = bool(features & TransportFeature.RING_PACKED.mask)
        lib.vb_commands_free(self._handle)
        self._bytes[0:SIZE] = bytes(SIZE)
        iova = self.region.guest_address
        self._handle = lib.vb_commands_new(self._address, iova, self._slots, packed)
        if self._handle == ffi.NULL:
            raise MemoryError("no memory for a control vring")
        layout = ffi.new("struct vb_shadow_layout *")
        lib.vb_shadow_layout(self._slots, 0, layout)
        return VringSetup(
            index=self.index,
            size=self._slots,
            descriptor_area=iova,
            driver_area=iova + layout.driver_area,
            device_area=iova + layout.device_area,
            base=_PACKED_START if packed else 0,
            kick=self._kick,
            call=self._call,
            err=None,
            enabled=True,
        )

    def introduce(self, features: int, vrings: Sequence[VringSetup]) -> None:
        self._say(self, features, vrings)

    def send(self, command: bytes, room: int = 1) -> bytes:
        """Give the device a command and return its reply of ``room`` bytes, the first one the ack.

        Raises:
            TransportLost: the device did not answer in ``PATIENCE``, or broke the vring. It can
                be told nothing more.
        """
        if not 0 < len(command) <= COMMAND_MAX or not 0 < room <= REPLY_MAX:
            raise ValueError(f"{len(command)} bytes for a command, {room} for its reply")
        self._bytes[_COMMAND : _COMMAND + len(command)] = command
        # A device that writes no ack has not done it.
        self._bytes[_REPLY : _REPLY + room] = b"\xff" * room
        iova = self.region.guest_address
        if lib.vb_commands_send(self._handle, iova + _COMMAND, len(command), iova + _REPLY, room):
            raise TransportLost(
                f"{self._target} still has a control command that it did not answer"
            )
        os.eventfd_write(self._kick.fileno(), 1)
        self._wait(command)
        return bytes(self._bytes[_REPLY : _REPLY + room])

    def _wait(self, command: bytes) -> None:
        poll = select.poll()
        poll.register(self._call.fileno(), select.POLLIN)
        deadline = time.monotonic() + PATIENCE
        while not (done := lib.vb_commands_done(self._handle)):
            if time.monotonic() > deadline:
                raise TransportLost(
                    f"{self._target} did not answer the control command {command_name(command)} "
                    f"within {PATIENCE:g} s",
                    "the device or its firmware hangs: see its driver's log",
                )
            # With event index it need not call: so not for long.
            poll.poll(1)
            with suppress(BlockingIOError):
                os.eventfd_read(self._call.fileno())
        if done < 0:
            raise TransportLost(f"{self._target} broke its control vring")

    def close(self) -> None:
        """Release everything; the device must be reset, or closed."""
        lib.vb_commands_free(self._handle)
        self._handle = ffi.NULL
        if not self.region.fd.closed:
            lib.vb_unmap(self._address, SIZE)
            close_all((self.region.fd, self._kick, self._call))
