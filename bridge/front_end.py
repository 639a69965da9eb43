"""What a front-end has set up, as far as its messages told."""

from __future__ import annotations

from vhostbridge.backends.lifecycle import Status
from vhostbridge.backends.vhostuser.messages import ProtocolFeature
from vhostbridge.backends.virtio import TransportFeature

from .memory import MemoryTable
from .vring import FrontendVring


class FrontEnd:
    """The features, memory and vrings that a front-end set up last."""

    def __init__(self) -> None:
        self.features = 0
        self.protocol = ProtocolFeature(0)
        self.status = 0
        self.memory = MemoryTable()
        self.vrings: dict[int, FrontendVring] = {}

    @property
    def packed(self) -> bool:
        return bool(self.features & TransportFeature.RING_PACKED.mask)

    @property
    def enables_at_once(self) -> bool:
        """Whether vrings are enabled from SET_FEATURES on: without bit 30, where no
        SET_VRING_ENABLE comes."""
        return bool(self.features) and not self.features & TransportFeature.PROTOCOL_FEATURES.mask

    @property
    def may_start(self) -> bool:
        """Whether it gave leave to run the vrings that are ready."""
        if self.status & Status.DRIVER_OK:
            return True
        return any(v.enabled and v.ready for v in self.vrings.values())

    @property
    def running(self) -> list[FrontendVring]:
        """The vrings that run, or would if the device were not suspended."""
        return [vring for vring in self.vrings.values() if vring.running]

    @property
    def none_enabled(self) -> bool:
        """Whether vrings run, and all of them are disabled."""
        return bool(self.running) and not any(vring.enabled for vring in self.running)

    @property
    def used_logs(self) -> dict[int, int]:
        """Where writes to used rings are to be logged, by vring, as guest addresses."""
        return {
            vring.index: place
            for vring in self.vrings.values()
            if vring.address is not None and (place := vring.address.log_place) is not None
        }

    def loses_vrings(self, table: MemoryTable) -> bool:
        """Whether with ``table`` for its memory a region goes that a running vring lies in."""
        used = {key for vring in self.running for key in vring.regions(self.memory, self.packed)}
        return not used <= {region.key for region in table.regions}
