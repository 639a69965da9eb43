"""What a check can come to."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Result(Enum):
    """How a contract fared."""

    PASS = "pass"
    FAIL = "fail"
    #: The device lacks it, or there is no way to see it from here.
    NOT_OFFERED = "not offered"
    #: The device was gone by then.
    NOT_RUN = "not run"


class Breach(Exception):
    """The device broke a contract; the text is the evidence."""


class NotOffered(Exception):
    """The contract can't be checked on this device; the text says why."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One contract's result. ``evidence`` is empty where there is nothing to explain."""

    name: str
    statement: str
    result: Result
    evidence: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Subject:
    """The device that was checked."""

    target: str
    transport: str
    #: Type, features, vrings, capabilities: ready for JSON.
    facts: dict[str, object]


@dataclass(frozen=True, slots=True)
class Conformance:
    """All outcomes, and how the device was left."""

    subject: Subject
    outcomes: tuple[Outcome, ...]
    left: str

    def count(self, result: Result) -> int:
        return sum(outcome.result is result for outcome in self.outcomes)

    @property
    def failed(self) -> bool:
        """Whether a contract was broken, or not tried because the device was gone."""
        return bool(self.count(Result.FAIL) or self.count(Result.NOT_RUN))
