"""A network device's control vring, where the bridge is its driver."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from .guest import MemoryRegion, VringSetup


class ControlVring(ABC):
    """What a device needs to know of a control vring that is not the guest's.

    Attributes:
        index: of the vring, since ``renew``.
        region: the memory that the vring and all its commands lie in, outside guest memory.
        isolated: whether the device reaches nothing but ``region`` through this vring, and the
            region through no other one. Set by the device when it starts.
    """

    index: int
    region: MemoryRegion
    isolated: bool = False

    @abstractmethod
    def renew(self, features: int) -> VringSetup:
        """Begin anew with these negotiated features; gives the vring for the device."""

    @abstractmethod
    def introduce(self, features: int, vrings: Sequence[VringSetup]) -> None:
        """Tell a device that was just started what it has to know before ``vrings`` run. Blocks.

        Raises:
            BridgeError: it does not take it, or does not answer; it is reset then.
        """
