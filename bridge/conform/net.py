"""Numbered frames to a network device, and buffers for what it receives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vhostbridge.backends.virtio import NetFeature

from .driver import Driver, Memory, Ring, Segment
from .outcome import Breach

FEATURES = NetFeature.MAC.mask

RX, TX = 0, 1
_HEADER = 12  # struct virtio_net_hdr_v1 (virtio 1.4, section 5.1.6)
_SPAN = 2048
# IEEE's local experimental ethertype 1: nobody takes the frames for something else.
_ETHERTYPE = b"\x88\xb5"
_FRAME_SIZE = 128


@dataclass(slots=True)
class NetPlan:
    """What is known of the network device, for all drivers of one run."""

    #: Frames go to the device's own address: to nobody else on a network.
    mac: bytes
    sent: int = 0

    def frame(self, number: int) -> bytes:
        head = self.mac + self.mac + _ETHERTYPE + number.to_bytes(4, "big")
        return head.ljust(_FRAME_SIZE, b"\0")


class NetDriver(Driver):
    """Keeps all receive buffers offered; a request is one frame on the transmit vring."""

    makes_requests = True

    def __init__(self, memory: Memory, rings: Sequence[Ring], plan: NetPlan) -> None:
        super().__init__(memory, rings)
        self._plan = plan
        self._rx, self._tx = rings[RX], rings[TX]
        name = "buffers of vring {}"
        self._free = [memory.take(_SPAN, 64, name.format(TX)) for _ in range(self._tx.size)]
        self._sending: dict[int, int] = {}
        self._receiving: dict[int, int] = {}
        for _ in range(self._rx.size):
            self._receive_into(memory.take(_SPAN, 64, name.format(RX)))

    def _receive_into(self, at: int) -> None:
        self._receiving[self._rx.add([Segment(at, _SPAN, writable=True)])] = at

    @property
    def outstanding(self) -> int:
        return len(self._sending)

    def submit(self, count: int) -> int:
        offered = min(count, len(self._free))
        for _ in range(offered):
            at = self._free.pop(0)
            data = bytes(_HEADER) + self._plan.frame(self._plan.sent)
            self._plan.sent += 1
            self.memory.bytes[at : at + len(data)] = data
            self._sending[self._tx.add([Segment(at, len(data))])] = at
        return offered

    def reap(self) -> None:
        for head, _ in self._tx.take_used():
            self._free.append(self._sending.pop(head))
        done = [(self._receiving.pop(head), size) for head, size in self._rx.take_used()]
        for at, size in done:
            if not _HEADER <= size <= _SPAN:
                raise Breach(f"vring {RX}: {size} bytes were received into a buffer of {_SPAN}")
            self._receive_into(at)
        if done:
            self._rx.kick()
