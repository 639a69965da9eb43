"""The contracts find a device that breaks one, and nothing wrong with one that doesn't."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path

import pytest
import trio
import trio.testing

from vhostbridge.backends.errors import BridgeError, ConfigError, TargetError, Unsupported
from vhostbridge.backends.lifecycle import Ability, How
from vhostbridge.bridge.conform import bench as bench_module
from vhostbridge.bridge.conform import runner
from vhostbridge.bridge.conform.bench import Bench
from vhostbridge.bridge.conform.block import SCRATCH_BLOCKS
from vhostbridge.bridge.conform.contracts import CONTRACTS, named
from vhostbridge.bridge.conform.outcome import Conformance, Outcome, Result, Subject
from vhostbridge.bridge.conform.plan import Allowed, prepare
from vhostbridge.bridge.conform.report import conform_report, conform_text
from vhostbridge.bridge.conform.runner import check, conform

from .conform_device import DISK_SIZE, Disk, opened
from .fakes import CAPABILITIES

READ, WRITE = Allowed(), Allowed(write=True)

# What a device does wrong, the contract that it breaks, and what the evidence says.
FAULTS = [
    ("forgets", "requests-complete", "requests are not complete after 1 s"),
    ("runs while suspended", "suspend-stops", "area of vring 0"),
    ("calls while suspended", "suspend-stops", "vring 0 called"),
    ("tells while suspended", "suspend-stops", "configuration changes were notified"),
    ("leaves in flight", "suspend-completes", "no request is listed as in flight"),
    ("second suspend moves", "suspend-twice", "became"),
    ("repeats", "resume-continues", "a request was repeated"),
    ("skips", "resume-continues", "requests are not complete after 1 s"),
    ("loses kicks", "kick-kept", "requests are not complete after 1 s"),
    ("no call after resume", "call-after-resume", "no call came in 1 s"),
    ("counts saves", "save-twice", "the second"),
    ("counts saves", "internal-state-twice", "first 15 bytes with SHA-256"),
    ("loads no base", "load-continues", "are there after load"),
    ("repeats", "load-continues", "a request was repeated"),
    ("loads nothing", "internal-state-loads", "load of the internal state: the disk does not take"),
    ("resumes anything", "illegal-refused", "resume of a device that is running was not refused"),
    ("writes after reset", "reset-running", "after reset: "),
    ("remembers after reset", "reset-running", "requests are not complete after 1 s"),
    ("remembers after reset", "reset-suspended", "requests are not complete after 1 s"),
    ("ignores bases", "base-wraps", "stopped at base 0, its used index is 65533"),
    ("keeps the size", "other-ring-size", "vring 0"),
    ("vring does not stop", "vring-stops", "its used index went on"),
    ("breaks at suspend", "suspend-twice", "suspend: the disk hung up"),
]


async def checked(disk: Disk, name: str, allowed: Allowed = READ) -> Outcome:
    (contract,) = named([name])
    async with opened(disk):
        prepared = await prepare(disk, allowed)
        bench = Bench(disk, prepared.plan)
        try:
            return await check(bench, contract)
        finally:
            bench.close()


@pytest.mark.parametrize("name", [contract.name for contract in CONTRACTS])
async def test_device_that_keeps_a_contract_passes(
    name: str, autojump_clock: trio.testing.MockClock
) -> None:
    outcome = await checked(Disk(), name)
    expected = Result.NOT_OFFERED if name == "config-change-held" else Result.PASS
    assert outcome.result is expected, outcome.evidence


@pytest.mark.parametrize(("fault", "name", "evidence"), FAULTS)
async def test_device_that_breaks_a_contract_fails_it(
    fault: str, name: str, evidence: str, autojump_clock: trio.testing.MockClock
) -> None:
    outcome = await checked(Disk([fault]), name)
    assert outcome.result is Result.FAIL
    assert evidence in outcome.evidence


def test_every_contract_is_broken_by_some_fault() -> None:
    unseen = {c.name for c in CONTRACTS} - {name for _, name, _ in FAULTS}
    assert unseen == {"config-change-held"}


async def test_write_that_is_lost_is_found(autojump_clock: trio.testing.MockClock) -> None:
    outcome = await checked(Disk(["drops a write"]), "kick-kept", WRITE)
    assert outcome.result is Result.FAIL
    assert "brought" in outcome.evidence


async def test_what_a_device_can_not_do_is_not_offered(
    autojump_clock: trio.testing.MockClock,
) -> None:
    disk = Disk()
    disk.capabilities = replace(CAPABILITIES, load=Ability(How.NO, "it takes none"))
    outcome = await checked(disk, "load-continues")
    assert (outcome.result, outcome.evidence) == (Result.NOT_OFFERED, "it takes none")


async def test_device_of_unknown_type_gets_no_requests(
    autojump_clock: trio.testing.MockClock,
) -> None:
    disk = Disk(["forgets"])
    disk.info = replace(disk.info, device_id=None)
    assert (await checked(disk, "suspend-completes")).result is Result.PASS
    outcome = await checked(Disk(), "kick-kept")
    assert outcome.result is Result.PASS
    disk = Disk()
    disk.info = replace(disk.info, device_id=None)
    outcome = await checked(disk, "kick-kept")
    assert outcome.result is Result.NOT_OFFERED
    assert "--type" in outcome.evidence


# The whole run


def left_in(folder: Path) -> list[Path]:
    return list(folder.iterdir())


def kept_in(file: Path) -> tuple[bytes, int]:
    return file.read_bytes(), file.stat().st_mode & 0o777


class Shop:
    """Where ``conform`` gets its devices: a new one on the same store each time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *faults: list[str]) -> None:
        self.store = bytearray(os.urandom(DISK_SIZE))
        self.faults = list(faults)
        self.disks: list[Disk] = []
        self.closed_after = 1000
        self.on_write: Callable[[], None] = lambda: None
        monkeypatch.setattr(runner, "open_device", self.open)

    def open(self, uri: str, device_id: int | None) -> AbstractAsyncContextManager[Disk]:
        if len(self.disks) >= self.closed_after:
            raise TargetError("there is no socket")
        disk = Disk(self.faults.pop(0) if self.faults else (), self.store)
        disk.info = replace(disk.info, device_id=device_id)
        disk.on_write = self.on_write
        self.disks.append(disk)
        return opened(disk)

    async def conform(self, allowed: Allowed = READ, *names: str) -> Conformance:
        return await conform("vhost-user:/x", 2, allowed, contracts=named(names))


@pytest.fixture
def shop(monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock) -> Shop:
    return Shop(monkeypatch)


@pytest.fixture(autouse=True)
def little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_module, "COMPLETE", 1.0)


@pytest.fixture(autouse=True)
def scratch_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


async def test_sound_device_is_opened_once_and_looked_at_again(shop: Shop) -> None:
    conformance = await shop.conform()
    assert conformance.count(Result.PASS) == len(CONTRACTS) - 1
    assert (conformance.failed, conformance.left, len(shop.disks)) == (False, "as found", 2)


async def test_device_that_failed_is_opened_anew(shop: Shop) -> None:
    shop.faults = [["resumes anything"], []]
    conformance = await shop.conform(READ, "illegal-refused", "reset-running", "vring-stops")
    assert [o.result for o in conformance.outcomes] == [Result.FAIL, Result.PASS, Result.PASS]
    assert conformance.failed and conformance.left == "as found"
    assert len(shop.disks) == 3


async def test_contracts_of_a_device_that_is_gone_are_not_run(shop: Shop) -> None:
    shop.faults, shop.closed_after = [["breaks at suspend"]], 1
    conformance = await shop.conform(READ, "suspend-twice", "vring-stops")
    assert [o.result for o in conformance.outcomes] == [Result.FAIL, Result.NOT_RUN]
    assert conformance.failed and "can't be opened any more" in conformance.left


async def test_device_that_can_not_be_opened_is_an_error(shop: Shop) -> None:
    shop.closed_after = 0
    with pytest.raises(TargetError, match="there is no socket"):
        await shop.conform()


async def test_reads_write_nothing(shop: Shop) -> None:
    before = bytes(shop.store)
    await shop.conform()
    assert bytes(shop.store) == before
    assert all(disk.written == 0 for disk in shop.disks)


async def test_scratch_area_is_put_back(shop: Shop, scratch_files: Path) -> None:
    before = bytes(shop.store)
    conformance = await shop.conform(WRITE)
    assert (conformance.failed, conformance.left) == (False, "as found")
    assert sum(disk.written for disk in shop.disks) > 2 * SCRATCH_BLOCKS
    assert bytes(shop.store) == before
    assert left_in(scratch_files) == []


async def test_scratch_area_is_put_back_on_a_device_opened_for_it(
    shop: Shop, scratch_files: Path
) -> None:
    before = bytes(shop.store)
    shop.faults = [["breaks at suspend"]]
    conformance = await shop.conform(WRITE, "requests-complete", "suspend-twice")
    assert (conformance.failed, conformance.left) == (True, "as found")
    assert bytes(shop.store) == before
    assert left_in(scratch_files) == []


async def test_scratch_area_that_stays_is_told_with_its_file(
    shop: Shop, scratch_files: Path
) -> None:
    before = bytes(shop.store)
    shop.faults, shop.closed_after = [["breaks at suspend"]], 1
    conformance = await shop.conform(WRITE, "requests-complete", "suspend-twice")
    (file,) = left_in(scratch_files)
    assert f"was not put back, it is in {file}: " in conformance.left
    assert kept_in(file) == (before[-SCRATCH_BLOCKS * 4096 :], 0o600)


async def test_scratch_area_is_put_back_after_an_interrupt(shop: Shop, scratch_files: Path) -> None:
    before = bytes(shop.store)
    with trio.CancelScope() as scope:

        def interrupt() -> None:
            if shop.disks[0].written == 20:
                scope.cancel()

        shop.on_write = interrupt
        await shop.conform(WRITE)
    assert scope.cancelled_caught
    assert shop.disks[0].written > 20
    assert bytes(shop.store) == before
    assert left_in(scratch_files) == []


# What is allowed


@pytest.mark.parametrize(
    ("changes", "allowed", "error", "message"),
    [
        ({"features": 1 << 32 | 1 << 5}, WRITE, Unsupported, "the disk is read-only"),
        ({"config_size": 0}, WRITE, Unsupported, "no room for a scratch area"),
        ({"device_id": 1}, WRITE, ConfigError, "--write is for block devices, this is a net dev"),
        ({"device_id": None}, WRITE, ConfigError, "this is a device of unknown type"),
        ({}, Allowed(traffic=True), ConfigError, "--traffic is for network devices"),
    ],
)
async def test_what_makes_no_sense_is_refused(
    changes: dict[str, object], allowed: Allowed, error: type[BridgeError], message: str
) -> None:
    disk = Disk()
    disk.info = replace(disk.info, **changes)  # type: ignore[arg-type]
    with pytest.raises(error, match=message):
        await prepare(disk, allowed)


async def test_type_of_a_vdpa_device_is_not_taken() -> None:
    with pytest.raises(ConfigError, match="--type is for vhost-user back-ends"):
        await conform("vdpa:blk0", 2)


def test_contract_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"no contract 'kick-kep'.*did you mean kick-kept"):
        named(["kick-kep"])


@pytest.mark.parametrize(
    ("target", "uri"),
    [
        ("blk0", "vdpa:blk0"),
        ("/dev/vhost-vdpa-7", "vdpa:/dev/vhost-vdpa-7"),
        ("vhost-user:/x", "vhost-user:/x"),
        ("/nowhere/x.sock", "vhost-user:/nowhere/x.sock"),
        ("vhost-user-listen:/x", "vhost-user-listen:/x"),
        ("vhost-user-fd:3", "vhost-user-fd:3"),
    ],
)
def test_targets(target: str, uri: str) -> None:
    assert runner.backend_of(target) == uri


# Reports

OUTCOMES = (
    Outcome("one", "It does one.", Result.PASS, "", 0.25),
    Outcome("two", "It does two.", Result.FAIL, "it did three", 1.0),
    Outcome("three", "It does three.", Result.NOT_OFFERED, "no three", 0.0),
    Outcome("four", "It does four.", Result.NOT_OFFERED, "no three", 0.0),
)
SUBJECT = Subject("blk0", "vdpa", {"type": "block", "vrings": 1})


def test_report_for_json() -> None:
    report = conform_report(Conformance(SUBJECT, OUTCOMES, "as found"))
    assert list(report) == ["target", "transport", "device", "contracts", "summary"]
    assert report["summary"] == {
        "pass": 1,
        "fail": 1,
        "not offered": 2,
        "not run": 0,
        "left": "as found",
    }
    assert isinstance(report["contracts"], list)
    assert report["contracts"][1] == {
        "name": "two",
        "statement": "It does two.",
        "result": "fail",
        "evidence": "it did three",
        "seconds": 1.0,
    }


def test_report_for_people() -> None:
    assert list(conform_text(Conformance(SUBJECT, OUTCOMES, "as found"))) == [
        "blk0: block on vdpa, 1 vrings",
        "",
        "CONTRACT  RESULT       SECONDS",
        "one       pass         0.25",
        "two       FAIL         1.00",
        "three     not offered  0.00",
        "four      not offered  0.00",
        "",
        "FAIL two: It does two.",
        "  it did three",
        "",
        "three, four: no three",
        "",
        "1 pass, 1 fail, 2 not offered; the device was left as found",
    ]


def test_report_of_a_device_that_is_not_as_it_was() -> None:
    *_, last = conform_text(Conformance(SUBJECT, OUTCOMES[:1], "it is gone"))
    assert last == "1 pass; the device is not as it was: it is gone"
