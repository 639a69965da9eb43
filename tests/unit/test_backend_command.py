"""Programs that a bridge keeps running: what they get, what is logged, how they end."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import trio

from vhostbridge.backends.errors import ConfigError, TargetError
from vhostbridge.bridge import backend_command
from vhostbridge.bridge.backend_command import BackendCommand
from vhostbridge.bridge.config import BridgeConfig, parse_command


def sh(script: str) -> BackendCommand:
    return BackendCommand("b", ["sh", "-c", script])


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(20):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level("INFO")
    return caplog


async def test_it_has_no_descriptors_of_ours_and_no_signals_ignored(
    log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not those that are inheritable either, and nothing of what systemd tells us."""
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/notify")
    inheritable = os.dup(2)
    os.set_inheritable(inheritable, True)
    try:
        command = sh(
            "ls -m /proc/self/fd; echo notify: [$NOTIFY_SOCKET];"
            "grep -E 'Sig(Ign|Blk)' /proc/self/status; echo end >&2; exec sleep 100"
        )
        async with command.running():
            await until(lambda: "back-end: end" in log.text)
            assert command.pid is not None
            assert os.getsid(command.pid) == command.pid
    finally:
        os.close(inheritable)
    lines = [r.message for r in log.records]
    assert "b: back-end: 0, 1, 2, 3" in lines  # the last one is of ls itself
    assert "b: back-end: notify: []" in lines
    masks = [int(line.split()[-1], 16) for line in lines if "Sig" in line]
    # glibc's own two signals can't be had back once one was used.
    assert [mask & ~(3 << 31) for mask in masks] == [0, 0]
    assert lines[-1].endswith("was ended by SIGTERM")


async def test_it_is_started_again_after_a_pause_that_grows(
    log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend_command, "FIRST_PAUSE", 0.05)
    monkeypatch.setattr(backend_command, "LAST_PAUSE", 0.2)
    began: list[float] = []
    real = backend_command._spawn

    def counted(*arguments: object) -> int:
        began.append(trio.current_time())
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(backend_command, "_spawn", counted)
    async with sh("exit 7").running():
        await until(lambda: len(began) == 6)
    pauses = [b - a for a, b in pairwise(began)]
    assert all(p >= at for p, at in zip(pauses, (0.05, 0.1, 0.2, 0.2, 0.2), strict=True))
    assert "the back-end (pid " in log.text and "ended with status 7" in log.text


async def test_what_it_started_in_its_group_ends_with_it(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    command = sh(f"sleep 1000 & echo $! $$ >{pids}; wait")
    async with command.running():
        await until(lambda: pids.exists() and pids.read_text().endswith("\n"))
        children = [int(word) for word in pids.read_text().split()]
        assert all(map(alive, children))
    await until(lambda: not any(map(alive, children)))


async def test_one_that_does_not_end_when_told_to_is_killed(
    log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend_command, "END", 0.1)
    async with sh("trap '' TERM; echo here; while :; do sleep 1; done").running():
        await until(lambda: "here" in log.text)
    assert log.records[-1].message.endswith("was ended by SIGKILL")


async def test_its_last_words_are_in_the_log(log: pytest.LogCaptureFixture) -> None:
    async with sh("trap 'echo last words; exit 3' TERM; echo here; sleep 1000 & wait").running():
        await until(lambda: "here" in log.text)
    assert [r.message for r in log.records][-2:] == [
        "b: back-end: last words",
        log.records[-1].message,
    ]
    assert log.records[-1].message.endswith("ended with status 3")


async def test_control_characters_and_endless_lines_are_cut(log: pytest.LogCaptureFixture) -> None:
    async with sh(
        "printf '\\033[31mred\\n'; head -c 5000 /dev/zero | tr '\\0' x; sleep 100"
    ).running():
        await until(lambda: "xxx" in log.text)
    texts = [r.message for r in log.records if "back-end: " in r.message]
    assert texts[0] == "b: back-end: [31mred"
    assert all(len(text) < 2100 for text in texts)


async def test_a_program_that_is_not_there_is_an_error() -> None:
    with pytest.RaisesGroup(
        pytest.RaisesExc(TargetError, match="cannot start /nowhere/x: No such")
    ):
        async with BackendCommand("b", ["/nowhere/x"]).running():
            raise AssertionError


def test_it_dies_with_a_daemon_that_is_killed() -> None:
    """Even one that can't end it."""
    script = (
        "import trio\n"
        "from vhostbridge.bridge.backend_command import BackendCommand\n"
        "async def main():\n"
        "    command = BackendCommand('b', ['sleep', '1000'])\n"
        "    async with command.running():\n"
        "        print(command.pid, flush=True)\n"
        "        await trio.sleep(1000)\n"
        "trio.run(main)\n"
    )
    reader, writer = os.pipe()
    pid = os.posix_spawn(
        sys.executable,
        [sys.executable, "-c", script],
        os.environ,
        file_actions=[(os.POSIX_SPAWN_DUP2, writer, 1)],
    )
    os.close(writer)
    with os.fdopen(reader) as output:
        child = int(output.readline())
    assert alive(child)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    trio.run(until, lambda: not alive(child) or _is_zombie(child))


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_commands_are_words() -> None:
    assert parse_command("a 'b c' --d=\"e f\"") == ("a", "b c", "--d=e f")
    assert parse_command(["a", "b c"]) == ("a", "b c")
    assert parse_command(()) == ()


@pytest.mark.parametrize("command", ["", "  ", "a 'b", [], ["a", 1], [""], ["a\0b"]])
def test_what_is_no_command_is_refused(command: str | list[object]) -> None:
    with pytest.raises(ConfigError, match="is no command"):
        parse_command(command)


@pytest.mark.parametrize("backend", ["vdpa:blk0", "vhost-user-fd:3"])
def test_only_vhost_user_sockets_have_a_command(backend: str) -> None:
    with pytest.raises(ConfigError, match="no back-end that a command starts"):
        BridgeConfig(name="b", backend=backend, listen="/l", backend_command=("x",))
