"""The control interface: what its methods do to bridges."""

from __future__ import annotations

import logging
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.unit.controlled import STATE, FakeBridge, daemon, some_fds
from vhostbridge.backends.errors import (
    BridgeError,
    InvalidTransition,
    KernelRefused,
    StateError,
    TargetError,
    TransportLost,
)
from vhostbridge.backends.fds import OwnedFd
from vhostbridge.bridge.control import Control, description
from vhostbridge.bridge.control_client import ControlClient, Incompatible
from vhostbridge.bridge.pauses import Pause, Tally
from vhostbridge.bridge.status import BridgeStatus, VringStatus, from_wire, to_wire
from vhostbridge.bridge.varlink import Call, Framer, Reply, decode_reply, sent_fds

NAME = "io.vhostbridge.Control"
PAUSE = Pause("switch", 1e9, {"suspend": 1.0, "state": 0.5, "resume": 0.0})
#: A parameter of the definition, as Python's type.
KINDS = {"string": str, "int": int, "bool": bool, "[]string": list}


@pytest.fixture
def bridge() -> FakeBridge:
    return FakeBridge()


@pytest.fixture
def socket_path(tmp_path: Path, bridge: FakeBridge) -> Iterator[Path]:
    path = tmp_path / "control.sock"
    with daemon(path, bridge, FakeBridge("vm2")):
        yield path


@pytest.fixture
def client(socket_path: Path) -> Iterator[ControlClient]:
    with ControlClient(socket_path) as connected:
        yield connected


def ask(path: Path, method: str, /, *fds: OwnedFd, **given: Any) -> list[Reply]:
    """All replies to one call."""
    replies: list[Reply] = []
    framer = Framer()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(str(path))
        sock.sendmsg([Call(f"{NAME}.{method}", given).encode()], sent_fds(fds))
        while not replies or replies[-1].continues:
            data = sock.recv(65536)
            assert data, "hung up"
            replies += map(decode_reply, framer.feed(data))
    return replies


# The definition


def test_definition_and_methods_have_the_same_parameters() -> None:
    declared = {
        name: {
            key: (KINDS[kind], bool(optional))
            for key, optional, kind in re.findall(r"(\w+): (\??)([\[\]\w]+)", parameters)
        }
        for name, parameters in re.findall(r"^method (\w+)\(([^)]*)\)", description(), re.MULTILINE)
    }
    methods = Control({}).interface().methods
    assert declared == {
        name: {key: (one.kind, one.optional) for key, one in method.parameters.items()}
        for name, method in methods.items()
    }


def test_definition_and_status_have_the_same_members(bridge: FakeBridge) -> None:
    message = to_wire(bridge.status())
    types = dict(re.findall(r"^type (\w+) \((.*?)^\)", description(), re.MULTILINE | re.DOTALL))
    assert set(re.findall(r"(\w+):", types["BridgeStatus"])) == message.keys()
    vrings: Any = message["vrings"]
    assert set(re.findall(r"(\w+):", types["Vring"])) == vrings[0].keys()


def test_status_survives_the_wire() -> None:
    vring = VringStatus(1, 2, True, False, True, 3, None, 5, "x")
    status = BridgeStatus(
        "n", "b", "l", None, "running", "f", True, False, True, 7, 8, 9,
        {"suspend": {"how": "no", "why": "w"}}, (vring,), control={"driver": "bridge"},
        pauses={"switch": Tally(2, 3.0, {"suspend": 3.0}, PAUSE, PAUSE)}, paused=PAUSE,
    )  # fmt: skip
    assert from_wire(to_wire(status)) == status


def test_what_an_older_daemon_does_not_tell_has_a_default(bridge: FakeBridge) -> None:
    message = to_wire(bridge.status())
    for later in ("pauses", "paused", "moment", "frontEndSince", "control", "shadow"):
        del message[later]
    vrings: Any = message["vrings"]
    for later in ("inFlight", "requests"):
        del vrings[0][later]
    assert from_wire(message) == bridge.status()
    del message["state"]
    with pytest.raises(KeyError):
        from_wire(message)


def test_what_a_newer_daemon_tells_more_is_left_out(bridge: FakeBridge) -> None:
    status = bridge.status()
    assert from_wire({**to_wire(status), "newer": 1}) == status


# Looking


def test_list_has_the_names(client: ControlClient) -> None:
    assert client.bridges() == ["vm1", "vm2"]


def test_status_of_one_and_of_all(client: ControlClient, bridge: FakeBridge) -> None:
    assert client.status("vm1") == [bridge.status()]
    assert [one.name for one in client.status()] == ["vm1", "vm2"]


def test_bridge_that_is_not_there_is_refused_with_those_that_are(client: ControlClient) -> None:
    for use in (lambda: client.status("vm3"), lambda: client.operate("Suspend", "vm3")):
        with pytest.raises(TargetError, match="no bridge 'vm3'") as refused:
            use()
        assert "running: vm1, vm2" in refused.value.hint


# Operations


def test_operations_are_done_and_tell_the_state(
    client: ControlClient, bridge: FakeBridge, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    states = [client.operate(verb, "vm1") for verb in ("Suspend", "Resume", "Reset")]
    assert states == ["suspended", "running", "reset"]
    assert bridge.asked == ["suspend", "resume", "reset"]
    assert f"vm1: suspend asked for by pid {os.getpid()}, uid {os.geteuid()}" in caplog.text


@pytest.mark.parametrize(
    ("error", "kind", "message", "hint"),
    [
        (InvalidTransition("m", "h"), InvalidTransition, "m", "h"),
        (StateError("m"), StateError, "m", ""),
        (TransportLost("m"), TransportLost, "m", ""),
        (KernelRefused("SUSPEND", 5), KernelRefused, "SUSPEND: Input/output error (EIO)", ""),
        (ExceptionGroup("g", [StateError("m", "h")]), StateError, "m", "h"),
        (ZeroDivisionError(), BridgeError, "internal error", "log"),
    ],
)
def test_errors_keep_class_message_and_hint(
    error: Exception,
    kind: type[BridgeError],
    message: str,
    hint: str,
    client: ControlClient,
    bridge: FakeBridge,
) -> None:
    bridge.error = error
    with pytest.raises(BridgeError) as refused:
        client.operate("Resume", "vm1")
    assert type(refused.value) is kind
    assert refused.value.message == message and hint in refused.value.hint
    bridge.error = None
    assert client.operate("Resume", "vm1") == "running"


def test_refusal_names_the_class_on_the_wire(socket_path: Path, bridge: FakeBridge) -> None:
    bridge.error = InvalidTransition("cannot", "allowed now: reset")
    (reply,) = ask(socket_path, "Suspend", name="vm1")
    assert reply.error == f"{NAME}.Refused"
    assert reply.parameters == {
        "kind": "InvalidTransition",
        "message": "cannot",
        "hint": "allowed now: reset",
    }


# Save and load


def save_to(client: ControlClient, path: Path) -> int:
    with OwnedFd(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)) as sink:
        return client.save("vm1", sink, lambda count: None)


def load_from(client: ControlClient, path: Path, *, dry_run: bool = False) -> tuple[str, list[str]]:
    with OwnedFd(os.open(path, os.O_RDONLY | os.O_CLOEXEC)) as source:
        return client.load("vm1", source, lambda count: None, dry_run=dry_run)


def test_save_and_load_by_descriptor(
    client: ControlClient, bridge: FakeBridge, tmp_path: Path
) -> None:
    assert save_to(client, tmp_path / "s") == len(STATE)
    assert (tmp_path / "s").read_bytes() == STATE
    assert load_from(client, tmp_path / "s") == ("suspended", [])
    assert bridge.loaded == STATE


def test_save_and_load_through_a_pipe(
    client: ControlClient, bridge: FakeBridge, socket_path: Path
) -> None:
    reader, writer = map(OwnedFd, os.pipe2(os.O_CLOEXEC))
    saved: list[int] = []

    def save() -> None:
        with ControlClient(socket_path) as other, writer:
            saved.append(other.save("vm2", writer, lambda count: None))

    thread = threading.Thread(target=save)
    thread.start()
    with reader:
        client.load("vm1", reader, lambda count: None)
    thread.join()
    assert saved == [len(STATE)]
    assert bridge.loaded == STATE


def test_save_and_load_by_path(socket_path: Path, bridge: FakeBridge, tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    assert ask(socket_path, "Save", name="vm1", path=path) == [
        Reply({"bytes": len(STATE), "done": True})
    ]
    assert (tmp_path / "s").read_bytes() == STATE
    assert ask(socket_path, "Load", name="vm1", path=path) == [
        Reply({"bytes": len(STATE), "done": True, "reasons": [], "state": "suspended"})
    ]
    assert bridge.loaded == STATE


def test_file_of_a_save_that_fails_stays_as_it_was(
    socket_path: Path, bridge: FakeBridge, tmp_path: Path
) -> None:
    (tmp_path / "s").write_bytes(b"before")
    bridge.error = StateError("half-way")
    (reply,) = ask(socket_path, "Save", name="vm1", path=str(tmp_path / "s"))
    assert reply.error == f"{NAME}.Refused"
    assert (tmp_path / "s").read_bytes() == b"before"
    assert sorted(os.listdir(tmp_path)) == ["control.sock", "s"]


def test_more_tells_the_bytes_so_far(socket_path: Path, bridge: FakeBridge, tmp_path: Path) -> None:
    bridge.gate = trio.Event()
    reader, writer = map(OwnedFd, os.pipe2(os.O_CLOEXEC))
    framer, replies = Framer(), list[Reply]()
    with reader, writer, socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(str(socket_path))
        parameters = {"name": "vm1", "fileDescriptor": 0}
        sock.sendmsg([Call(f"{NAME}.Save", parameters, more=True).encode()], sent_fds([writer]))
        while not replies:
            replies += map(decode_reply, framer.feed(sock.recv(65536)))
    assert replies == [Reply({"bytes": len(STATE) // 2, "done": False}, continues=True)]


def test_caller_that_goes_away_cancels_the_save(bridge: FakeBridge, tmp_path: Path) -> None:
    bridge.gate = trio.Event()
    with daemon(tmp_path / "c", bridge):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(tmp_path / "c"))
            parameters = {"name": "vm1", "path": str(tmp_path / "s")}
            sock.send(Call(f"{NAME}.Save", parameters, more=True).encode())
            assert sock.recv(1)  # it is half-way
        assert bridge.cancelled.wait(20)
    assert os.listdir(tmp_path) == []


def test_dry_run_tells_all_reasons_and_loads_nothing(
    client: ControlClient, bridge: FakeBridge, tmp_path: Path
) -> None:
    (tmp_path / "s").write_bytes(STATE)
    assert load_from(client, tmp_path / "s", dry_run=True) == ("running", [])
    bridge.reasons = ["too small", "too old"]
    assert load_from(client, tmp_path / "s", dry_run=True) == ("running", ["too small", "too old"])
    assert bridge.asked == ["dry run", "dry run"] and bridge.loaded == b""


def test_state_that_does_not_fit_is_an_error_with_all_reasons(
    client: ControlClient, bridge: FakeBridge, tmp_path: Path
) -> None:
    (tmp_path / "s").write_bytes(STATE)
    bridge.reasons = ["too small", "too old"]
    with pytest.raises(Incompatible) as refused:
        load_from(client, tmp_path / "s")
    assert refused.value.reasons == ["too small", "too old"]
    assert bridge.loaded == b""


@pytest.mark.parametrize(
    ("given", "fds", "named"),
    [
        ({}, 0, "path"),
        ({"path": "/x", "fileDescriptor": 0}, 1, "path"),
        ({"path": "x"}, 0, "path"),
        ({"path": "/x\0y"}, 0, "path"),
        ({"path": "/\ud800"}, 0, "path"),
        ({"fileDescriptor": 0}, 0, "fileDescriptor"),
        ({"fileDescriptor": 1}, 1, "fileDescriptor"),
        ({"fileDescriptor": -1}, 1, "fileDescriptor"),
        ({"fileDescriptor": True}, 2, "fileDescriptor"),
        # /dev/null, for reading only
        ({"fileDescriptor": 0}, 1, "fileDescriptor"),
    ],
)
def test_save_takes_one_absolute_path_or_one_descriptor_to_write(
    given: dict[str, Any], fds: int, named: str, socket_path: Path, bridge: FakeBridge
) -> None:
    sent = some_fds(fds)
    (reply,) = ask(socket_path, "Save", *sent, name="vm1", **given)
    for fd in sent:
        fd.close()
    assert reply == Reply({"parameter": named}, "org.varlink.service.InvalidParameter")
    assert bridge.asked == []


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_PATH])
def test_load_takes_a_descriptor_to_read(flags: int, socket_path: Path, tmp_path: Path) -> None:
    (tmp_path / "s").touch()
    with OwnedFd(os.open(tmp_path / "s", flags | os.O_CLOEXEC)) as file:
        (reply,) = ask(socket_path, "Load", file, name="vm1", fileDescriptor=0)
    assert reply == Reply({"parameter": "fileDescriptor"}, "org.varlink.service.InvalidParameter")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "No such file"),
        (lambda path: path.mkdir(), "is no regular file"),
        (os.mkfifo, "is no regular file"),
    ],
)
def test_load_by_path_takes_regular_files(
    make: Callable[[Path], object], said: str, socket_path: Path, tmp_path: Path
) -> None:
    make(tmp_path / "s")
    (reply,) = ask(socket_path, "Load", name="vm1", path=str(tmp_path / "s"))
    assert reply.error == f"{NAME}.Refused" and said in str(reply.parameters["message"])
