"""The control interface's socket, and how a daemon is found by it."""

from __future__ import annotations

import socket
import stat
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest
import trio

from tests.unit.controlled import FakeBridge, daemon
from vhostbridge.backends.errors import BridgeError, TargetError
from vhostbridge.bridge.control import serve_control
from vhostbridge.bridge.control_client import ControlClient, daemon_of

# The socket


def test_socket_is_its_users_alone_and_goes_with_the_daemon(tmp_path: Path) -> None:
    path = tmp_path / "c"
    with daemon(path, FakeBridge()):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not path.exists()


def test_socket_of_a_dead_daemon_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "c"))
    with daemon(tmp_path / "c", FakeBridge()), ControlClient(tmp_path / "c") as client:
        assert client.bridges() == ["vm1"]


def test_socket_of_a_live_daemon_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "c"
    with daemon(path, FakeBridge()):
        with pytest.raises(TargetError, match="is in use"):
            trio.run(serve_control, path, {})
        with ControlClient(path) as client:
            assert client.bridges() == ["vm1"]


def test_usual_folder_is_made_for_the_user_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "vhost-bridge"
    monkeypatch.setattr("vhostbridge.bridge.control.control_folder", lambda: folder)
    with daemon(folder / "vm1.sock", FakeBridge()):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


# Finding the daemon of a name


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    found = tmp_path / "vhost-bridge"
    found.mkdir()
    monkeypatch.setattr("vhostbridge.bridge.control_client.control_folder", lambda: found)
    return found


def test_bridge_is_found_whatever_its_daemons_socket_is_called(folder: Path) -> None:
    with ExitStack() as stack:
        stack.enter_context(daemon(folder / "vm1.sock", FakeBridge("vm1")))
        stack.enter_context(daemon(folder / "many.sock", FakeBridge("vm2"), FakeBridge("vm3")))
        for name, file in (("vm1", "vm1.sock"), ("vm2", "many.sock"), ("vm3", "many.sock")):
            with daemon_of(name, None) as client:
                assert client.path == folder / file
        with pytest.raises(TargetError, match="no bridge 'vm4'") as refused:
            daemon_of("vm4", None)
        assert "running: vm1, vm2, vm3" in refused.value.hint


def test_socket_of_a_dead_daemon_does_not_hide_the_bridge(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(folder / "vm1.sock"))
    with pytest.raises(TargetError, match=r"no daemon at .*it has gone"):
        daemon_of("vm1", None)
    with daemon(folder / "x.sock", FakeBridge("vm1")), daemon_of("vm1", None) as client:
        assert client.path == folder / "x.sock"


def test_without_any_daemon_there_is_no_bridge(folder: Path) -> None:
    with pytest.raises(TargetError, match="no bridge 'vm1'"):
        daemon_of("vm1", None)
    folder.rmdir()
    with pytest.raises(TargetError, match="no bridge 'vm1'"):
        daemon_of("vm1", None)


@pytest.mark.parametrize(
    ("answer", "said"),
    [(b"", "closed the connection"), (b"x\0", "sent something that is no JSON")],
)
def test_what_is_no_daemon_is_named(answer: bytes, said: str, tmp_path: Path) -> None:
    def serve() -> None:
        sock, _ = listener.accept()
        with sock:
            sock.recv(1000)
            sock.send(answer)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "c"))
        listener.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        with ControlClient(tmp_path / "c") as client, pytest.raises(BridgeError, match=said):
            client.bridges()
        thread.join()


def test_daemon_that_does_not_answer_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "c"))
        listener.listen()
        with (
            ControlClient(tmp_path / "c") as client,
            pytest.raises(TargetError, match="does not answer within"),
        ):
            client.bridges(0.05)
