"""Goes through the contracts on one device, opened anew after each that it broke."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from math import inf

import trio

from vhostbridge.backends import check_backend, open_device
from vhostbridge.backends.device import Device
from vhostbridge.backends.errors import (
    BridgeError,
    ConfigError,
    TargetError,
    Unsupported,
    find_bridge_error,
)
from vhostbridge.backends.lifecycle import Ability
from vhostbridge.bridge.inspect import PATIENCE, classify

from .bench import Bench
from .contracts import CONTRACTS, Contract
from .outcome import Breach, Conformance, NotOffered, Outcome, Result, Subject
from .plan import Allowed, Prepared, prepare, read_config
from .scratch import Scratch

# How long one contract may take, in seconds, however slow its operations are.
_WHOLE = 120.0

#: How a device is left that nothing has happened to.
AS_FOUND = "as found"
_NOTHING = Allowed()

#: Is told what is being tried.
Progress = Callable[[str], None]


def backend_of(target: str) -> str:
    """The back-end URI of a target: one that ``serve`` or one that ``inspect`` takes.

    Raises:
        ConfigError: it is malformed.
    """
    scheme, colon, rest = target.partition(":")
    if colon and rest and scheme.startswith("vhost-user-"):
        check_backend(target)
        return target
    kind, name = classify(target)
    return f"{kind}:{name}"


@asynccontextmanager
async def opened(uri: str, device_id: int | None) -> AsyncIterator[Device]:
    """The device, open; a back-end that is busy with someone else is an error soon."""
    patience = inf if uri.startswith("vhost-user-listen:") else PATIENCE
    there = False
    with trio.CancelScope(deadline=trio.current_time() + patience) as scope:
        async with open_device(uri, device_id) as device:
            scope.deadline = inf
            there = True
            yield device
    if scope.cancelled_caught and not there:
        raise TargetError(
            f"{uri}: nobody answered within {PATIENCE:g} s",
            "most back-ends serve one front-end at a time: this one may have a VMM already",
        )


@dataclass(slots=True)
class _Run:
    uri: str
    device_id: int | None
    allowed: Allowed
    progress: Progress
    todo: list[Contract]
    total: int
    outcomes: list[Outcome] = field(default_factory=list)
    prepared: Prepared | None = None
    scratch: Scratch | None = None
    #: Why the device may not be as it was.
    not_left: str = ""


async def conform(
    target: str,
    device_id: int | None = None,
    allowed: Allowed = _NOTHING,
    *,
    contracts: Sequence[Contract] = CONTRACTS,
    progress: Progress = lambda what: None,
) -> Conformance:
    """Check contracts on the device that ``target`` names.

    It is left as it was found: reset, without memory, its disk with its content. Otherwise
    ``left`` says what could not be put back.

    Raises:
        BridgeError: there is no such device, or what is allowed doesn't fit it. Nothing was tried.
    """
    uri = backend_of(target)
    if device_id is not None and uri.startswith("vdpa:"):
        raise ConfigError("--type is for vhost-user back-ends", "a vDPA device tells its type")
    run = _Run(uri, device_id, allowed, progress, list(contracts), len(contracts))
    await _session(run)
    while run.todo:
        try:
            await _session(run)
        except Exception as error:
            known = find_bridge_error(error)
            if known is None:
                raise
            _give_up(run, known)
    if run.scratch is not None and run.scratch.file is not None:
        await _put_back_later(run)
    prepared = run.prepared
    assert prepared is not None
    if run.scratch is None or run.scratch.file is None:
        run.not_left = await _look_again(run, prepared)
    subject = Subject(target, prepared.transport, prepared.facts)
    return Conformance(subject, tuple(run.outcomes), run.not_left or AS_FOUND)


# One opening of the device: contracts until one fails or all are done.
async def _session(run: _Run) -> None:
    async with opened(run.uri, run.device_id) as device:
        if run.prepared is None:
            run.prepared = await prepare(device, run.allowed)
        bench = Bench(device, run.prepared.plan)
        early = True
        try:
            await _keep_scratch(run, run.prepared, bench)
            await _go_through(run, bench)
            early = False
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + _WHOLE):
                await _tidy(run, bench, last=early or not run.todo)
            bench.close()


async def _go_through(run: _Run, bench: Bench) -> None:
    while run.todo:
        contract = run.todo.pop(0)
        run.progress(f"{len(run.outcomes) + 1}/{run.total} {contract.name}")
        outcome = await check(bench, contract)
        run.outcomes.append(outcome)
        if outcome.result is Result.FAIL:
            return


async def check(bench: Bench, contract: Contract) -> Outcome:
    """Try one contract on a device that is RESET; it is RESET again unless it failed."""
    began = trio.current_time()
    result, evidence = Result.PASS, ""
    try:
        with trio.fail_after(_WHOLE):
            try:
                _check_offered(bench, contract)
                await contract.check(bench)
            except NotOffered as reason:
                result, evidence = Result.NOT_OFFERED, str(reason)
            await bench.reset()
    except Breach as breach:
        result, evidence = Result.FAIL, str(breach)
    except BridgeError as error:
        result, evidence = Result.FAIL, f"{bench.step}: {error}"
    except trio.TooSlowError:
        result, evidence = Result.FAIL, f"{bench.step}: not through in {_WHOLE:g} s"
    seconds = round(trio.current_time() - began, 3)
    return Outcome(contract.name, contract.statement, result, evidence, seconds)


def _check_offered(bench: Bench, contract: Contract) -> None:
    for need in contract.needs:
        ability: Ability = getattr(bench.device.capabilities, need)
        if not ability:
            raise NotOffered(ability.why)
    bench.step = "before anything"
    if contract.needs_requests and bench.plan.no_requests:
        raise NotOffered(bench.plan.no_requests)


# What is left to do when a back-end does not come back.
def _give_up(run: _Run, error: BridgeError) -> None:
    run.not_left = f"it can't be opened any more: {error}"
    run.outcomes += [
        Outcome(one.name, one.statement, Result.NOT_RUN, "the device is gone", 0.0)
        for one in run.todo
    ]
    run.todo.clear()


# Leaving


async def _keep_scratch(run: _Run, prepared: Prepared, bench: Bench) -> None:
    if not run.allowed.write or run.scratch is not None:
        return
    assert prepared.disk is not None
    run.scratch = Scratch(prepared.disk)
    try:
        await run.scratch.keep(bench)
    except Breach as breach:
        raise Unsupported(f"the scratch area can't be read: {breach}") from None


# After the last contract, or before an early end. In between the scratch area stays as it is.
async def _tidy(run: _Run, bench: Bench, *, last: bool) -> None:
    try:
        await bench.leave()
        if last and run.scratch is not None:
            await run.scratch.put_back(bench)
            await bench.leave()
        run.not_left = ""
    except (Breach, BridgeError) as error:
        run.not_left = f"it could not be reset: {error}"


async def _put_back_later(run: _Run) -> None:
    assert run.scratch is not None and run.prepared is not None
    problem = ""
    try:
        async with opened(run.uri, run.device_id) as device:
            bench = Bench(device, run.prepared.plan)
            try:
                await run.scratch.put_back(bench)
                await bench.leave()
            finally:
                bench.close()
    except Exception as error:
        problem = str(error.exceptions[0] if isinstance(error, ExceptionGroup) else error)
    if run.scratch.file is not None:
        run.not_left = (
            f"the disk's content from sector {run.scratch.start} on was not put back, it is in "
            f"{run.scratch.file}: {problem}"
        )


# Whether the next user finds what we found. A device that could not be reset was by its closing.
async def _look_again(run: _Run, prepared: Prepared) -> str:
    if not run.uri.startswith(("vdpa:", "vhost-user:")):
        return run.not_left
    try:
        async with opened(run.uri, run.device_id) as device:
            data = await read_config(device, device.info.device_id)
            features = device.info.features
    except Exception as error:
        known = find_bridge_error(error)
        if known is None:
            raise
        return f"it can't be opened any more: {known}"
    if (features, data) == prepared.found:
        return ""
    return (
        f"features {prepared.found[0]:#x} and configuration {prepared.found[1].hex()} became "
        f"{features:#x} and {data.hex()}"
    )
