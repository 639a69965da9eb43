"""Descriptors from and for the service manager."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from vhostbridge.backends.fds import OwnedFd
from vhostbridge.bridge import keeping
from vhostbridge.bridge.keeping import Keeper
from vhostbridge.bridge.notify import Notifier


class Told(Notifier):
    """Remembers what it should tell."""

    keeps = True

    def __init__(self) -> None:
        self.told: list[str] = []

    def keep(self, name: str, fd: int) -> bool:
        os.fstat(fd)
        self.told.append(f"keep {name}")
        return True

    def forget(self, name: str) -> None:
        self.told.append(f"forget {name}")


@pytest.fixture
def first(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Where inherited descriptors begin; not at 3, which this process has for itself."""
    monkeypatch.setattr(keeping, "_FIRST", 200)
    yield 200
    for number in range(200, 210):
        try:
            os.close(number)
        except OSError:
            continue


def listening(path: Path, number: int) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen()
        os.dup2(sock.fileno(), number)


def environment(*names: str, pid: int | None = None) -> dict[str, str]:
    return {
        "LISTEN_PID": str(os.getpid() if pid is None else pid),
        "LISTEN_FDS": str(len(names)),
        "LISTEN_FDNAMES": ":".join(names),
    }


def test_listening_sockets_are_found_by_their_paths(tmp_path: Path, first: int) -> None:
    listening(tmp_path / "a", first)
    listening(tmp_path / "b", first + 1)
    told = Told()
    keeper = Keeper(told, environment("vhost-bridge.socket", keeping._name(str(tmp_path / "b"))))
    a, b = (keeper.listening(str(tmp_path / name)) for name in "ab")
    assert a is not None and b is not None
    assert (a.ours, b.ours) == (False, True)
    assert not os.get_inheritable(a.fd.fileno())
    assert keeper.listening(str(tmp_path / "a")) is None
    a.fd.close()
    b.fd.close()
    assert told.told == []


def test_session_is_forgotten_as_soon_as_it_is_there(first: int) -> None:
    with OwnedFd(os.memfd_create("x")) as file:
        os.dup2(file.fileno(), first)
    told = Told()
    keeper = Keeper(told, environment("session.vm1"))
    assert set(keeper.sessions) == {"vm1"}
    assert told.told == ["forget session.vm1"]
    keeper.drop_unused(())
    assert keeper.sessions == {}


def test_state_is_forgotten_as_soon_as_it_is_there(first: int) -> None:
    with OwnedFd(os.memfd_create("x")) as file:
        os.dup2(file.fileno(), first)
    told = Told()
    keeper = Keeper(told, environment("state.KEPT.vm.1"))
    assert {name: origin for name, (origin, _) in keeper.states.items()} == {"vm.1": "KEPT"}
    assert told.told == ["forget state.KEPT.vm.1"]
    keeper.drop_unused(())
    assert keeper.states == {}
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(first)


def test_what_no_bridge_has_asked_for_is_for_the_next_process(first: int) -> None:
    """This one ends while it still starts; a bridge that begins now must not read it."""
    with OwnedFd(os.memfd_create("x")) as file:
        for number in (first, first + 1):
            os.dup2(file.fileno(), number)
    told = Told()
    keeper = Keeper(told, environment("session.vm1", "state.KEPT.vm2"))
    keeper.keep_again()
    assert told.told[2:] == ["keep session.vm1", "keep state.KEPT.vm2"]
    assert (keeper.sessions, keeper.states) == ({}, {})
    for number in (first, first + 1):
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(number)


def test_descriptors_for_another_process_are_not_ours(tmp_path: Path, first: int) -> None:
    listening(tmp_path / "a", first)
    keeper = Keeper(Told(), environment("a", pid=os.getpid() + 1))
    assert keeper.listening(str(tmp_path / "a")) is None
    assert Keeper(Told(), {}).listening(str(tmp_path / "a")) is None


def test_kept_socket_whose_path_is_gone_is_forgotten(tmp_path: Path, first: int) -> None:
    listening(tmp_path / "a", first)
    (tmp_path / "a").unlink()
    name = keeping._name(str(tmp_path / "a"))
    told = Told()
    assert Keeper(told, environment(name)).listening(str(tmp_path / "a")) is None
    assert told.told == [f"forget {name}"]


def test_what_no_bridge_wants_is_closed(
    tmp_path: Path, first: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A path of ours goes with it, a socket unit's stays."""
    listening(tmp_path / "ours", first)
    listening(tmp_path / "theirs", first + 1)
    name = keeping._name(str(tmp_path / "ours"))
    told = Told()
    keeper = Keeper(told, environment(name, "unit.socket"))
    keeper.drop_unused({"vm1"})
    assert not (tmp_path / "ours").exists() and (tmp_path / "theirs").exists()
    assert told.told == [f"forget {name}"]
    assert "theirs: inherited, but no bridge listens there" in caplog.text
    for number in (first, first + 1):
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(number)


def test_what_is_no_listening_socket_is_told(first: int, caplog: pytest.LogCaptureFixture) -> None:
    a, b = socket.socketpair()
    with a, b:
        os.dup2(a.fileno(), first)
    with OwnedFd(os.memfd_create("x")) as file:
        os.dup2(file.fileno(), first + 1)
    keeper = Keeper(Told(), environment("a.socket", "b.socket"))
    keeper.close()
    for name in ("a.socket", "b.socket"):
        assert f"{name}: not used: no listening UNIX stream socket" in caplog.text
