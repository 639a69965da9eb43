"""systemd's varlinkctl understands the control interface and can call every method of it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.peers.process import eventually
from tests.rig.root import peer_argv
from tests.unit.controlled import STATE, FakeBridge, daemon
from vhostbridge.backends.errors import InvalidTransition
from vhostbridge.bridge.control import description

NAME = "io.vhostbridge.Control"


class Varlinkctl:
    """varlinkctl of the tree, at one socket."""

    def __init__(self, address: Path, folder: Path) -> None:
        self.address = address
        self.folder = folder

    def run(self, *argv: str, text: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            peer_argv(["varlinkctl", "--no-pager", *argv]),
            input=text,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def show(self, command: str, *argv: str) -> str:
        done = self.run(command, str(self.address), *argv)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def call(self, method: str, *options: str, **parameters: Any) -> list[dict[str, Any]]:
        """The replies to a call."""
        given = json.dumps(parameters)
        done = self.run(*options, "-j", "call", str(self.address), f"{NAME}.{method}", given)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.replace("\x1e", "").splitlines()]


@pytest.fixture
def bridge() -> FakeBridge:
    return FakeBridge()


@pytest.fixture
def varlinkctl(tmp_path: Path, bridge: FakeBridge) -> Iterator[Varlinkctl]:
    with daemon(tmp_path / "c.sock", bridge):
        yield Varlinkctl(tmp_path / "c.sock", tmp_path)


def test_definition_is_valid(varlinkctl: Varlinkctl) -> None:
    done = varlinkctl.run("validate-idl", text=description())
    assert done.returncode == 0, done.stderr


def test_service_is_described(varlinkctl: Varlinkctl) -> None:
    info = varlinkctl.show("info")
    assert "vhost-bridge" in info and NAME in info
    assert varlinkctl.show("list-interfaces").split() == [NAME, "org.varlink.service"]


@pytest.mark.parametrize("interface", [NAME, "org.varlink.service"])
def test_interfaces_are_introspected(interface: str, varlinkctl: Varlinkctl) -> None:
    told = varlinkctl.show("introspect", interface)
    assert f"interface {interface}\n" in told and "method " in told and "error " in told


def test_operations_are_called(varlinkctl: Varlinkctl, bridge: FakeBridge) -> None:
    assert varlinkctl.call("List") == [{"bridges": ["vm1"]}]
    assert varlinkctl.call("Suspend", name="vm1") == [{"state": "suspended"}]
    ((status,),) = [reply["bridges"] for reply in varlinkctl.call("Status", name="vm1")]
    assert (status["name"], status["frontEnd"], status["vrings"][0]["base"]) == ("vm1", 4711, 9)
    assert varlinkctl.call("Resume", name="vm1") == [{"state": "running"}]
    assert varlinkctl.call("Reset", name="vm1") == [{"state": "reset"}]
    assert bridge.asked == ["suspend", "resume", "reset"]


def test_save_and_load_by_path_tell_progress(varlinkctl: Varlinkctl, bridge: FakeBridge) -> None:
    file = varlinkctl.folder / "s"
    *progress, last = varlinkctl.call("Save", "--more", name="vm1", path=str(file))
    assert last == {"bytes": len(STATE), "done": True}
    assert all(reply["done"] is False for reply in progress)
    assert file.read_bytes() == STATE
    dry = varlinkctl.call("Load", name="vm1", path=str(file), dryRun=True)
    assert dry == [{"bytes": len(STATE), "done": True, "reasons": [], "state": "running"}]
    *_, last = varlinkctl.call("Load", "--more", name="vm1", path=str(file))
    assert last == {"bytes": len(STATE), "done": True, "reasons": [], "state": "suspended"}
    assert bridge.loaded == STATE


def test_errors_are_shown(varlinkctl: Varlinkctl, bridge: FakeBridge) -> None:
    bridge.error = InvalidTransition("cannot resume a device that is running", "allowed: suspend")
    call = ("call", str(varlinkctl.address))
    refused = varlinkctl.run(*call, f"{NAME}.Resume", '{"name":"vm1"}')
    assert refused.returncode != 0 and f"{NAME}.Refused" in refused.stderr
    missing = varlinkctl.run(*call, f"{NAME}.Resume", '{"name":"vm2"}')
    assert missing.returncode != 0 and f"{NAME}.NoSuchBridge" in missing.stderr
    unknown = varlinkctl.run(*call, f"{NAME}.Nothing", "{}")
    assert unknown.returncode != 0 and "MethodNotFound" in unknown.stderr


def test_oneway_is_done(varlinkctl: Varlinkctl, bridge: FakeBridge) -> None:
    done = varlinkctl.run(
        "--oneway", "call", str(varlinkctl.address), f"{NAME}.Suspend", '{"name":"vm1"}'
    )
    assert done.returncode == 0, done.stderr
    eventually(lambda: bridge.asked == ["suspend"], "the call without an answer")
