"""The command line: what it prints, how it fails, completion and the manual page."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import click
import pytest

from vhostbridge import cli as command_line
from vhostbridge.backends.errors import (
    BridgeError,
    ConfigError,
    InvalidTransition,
    KernelRefused,
    PeerError,
    TargetError,
    TransportLost,
    Unsupported,
)
from vhostbridge.backends.vdpa.inventory import Inventory
from vhostbridge.bridge import completion, inspect, listing

ROOT = Path(__file__).parents[2]
HEAVY = ("trio", "cffi", "_cffi_backend", "pyroute2", "vhostbridge.native")


class Ran(NamedTuple):
    code: int
    out: str
    err: str


def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *argv: str | Path
) -> Ran:
    monkeypatch.setattr(sys, "argv", ["vhost-bridge", *map(str, argv)])
    with pytest.raises(SystemExit) as exit_:
        command_line.main()
    shown = capsys.readouterr()
    assert isinstance(exit_.value.code, int)
    return Ran(exit_.value.code, shown.out, shown.err)


# Errors and exit codes


@pytest.mark.parametrize(
    ("argv", "message", "hint"),
    [
        (["inspekt"], "there is no command 'inspekt'", "did you mean inspect?"),
        (["zzz"], "there is no command 'zzz'", "vhost-bridge --help lists them"),
        (["inspect"], "missing argument 'TARGET'", "vhost-bridge inspect --help"),
        (["serve"], "serve needs --name", "or --config with a file that names the bridges"),
        (["serve", "--name", "a"], "serve needs --backend", "or --config"),
        (["serve", "--name", "a", "--backend", "tcp:1"], "bridge a needs exactly one of", "listen"),
        (["serve", "--config", "x", "--fd", "3"], "--config and --fd exclude each other", ""),
        (["serve", "--control", "x", "--no-control"], "--control and --no-control exclude", ""),
        (["inspect", "vdpa:x", "--type", "net"], "--type is for vhost-user sockets", "itself"),
        (["inspect", "a", "--type", "blokc"], "no virtio device type is called", "mean block?"),
        (["inspect", "vhost-user-fd:3"], "vhost-user-fd: can't be inspected", "listens on"),
    ],
)
def test_wrong_usage_is_one_line_and_a_hint_and_status_2(
    argv: list[str],
    message: str,
    hint: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran = run(capsys, monkeypatch, *argv)
    first, second = ran.err.splitlines()
    assert (ran.code, ran.out) == (2, "")
    assert first.startswith(f"vhost-bridge: {message}")
    assert second.startswith("  hint: ") and hint in second


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (BridgeError("x"), 1),
        (InvalidTransition("x"), 1),
        (Unsupported("x"), 1),
        (TargetError("x"), 1),
        (PeerError("x"), 1),
        (KernelRefused("x", 1), 1),
        (ConfigError("x"), 2),
        (TransportLost("x"), 3),
        (ExceptionGroup("nursery", [TransportLost("x")]), 3),
    ],
)
def test_each_kind_of_error_has_its_exit_code(
    error: Exception,
    code: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(listing, "list_report", fail)
    assert run(capsys, monkeypatch, "list").code == code


def test_a_bug_is_not_dressed_up_as_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(listing, "list_report", fail)
    monkeypatch.setattr(sys, "argv", ["vhost-bridge", "list"])
    with pytest.raises(ZeroDivisionError):
        command_line.main()


@pytest.mark.parametrize("argv", [["-v", "list"], ["list", "-v"], ["list", "--debug"]])
def test_debug_shows_the_traceback_wherever_it_stands(
    argv: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise TargetError("gone")

    monkeypatch.setattr(listing, "list_report", fail)
    monkeypatch.setattr(sys, "argv", ["vhost-bridge", *argv])
    with pytest.raises(TargetError):
        command_line.main()


def test_no_command_prints_help_on_standard_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = run(capsys, monkeypatch)
    assert (ran.code, ran.out) == (2, "")
    assert "Exit codes:" in ran.err


@pytest.mark.parametrize("name", sorted(command_line.cli.commands))
def test_every_command_explains_itself_with_examples(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = run(capsys, monkeypatch, name, "--help")
    assert ran.code == 0
    assert f"\n    vhost-bridge {name}" in ran.out.partition("Examples:")[2]


# What the command writes to stderr, and then which heavy modules it has loaded.
def loaded_by(argv: list[str]) -> str:
    program = (
        "import sys\n"
        "from vhostbridge.cli import main\n"
        f"sys.argv = ['vhost-bridge', *{argv!r}]\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=30
    )
    return done.stderr


@pytest.mark.parametrize("argv", [["--version"], ["--help"], ["serve", "--help"]])
def test_help_and_version_load_nothing_heavy(argv: list[str]) -> None:
    assert loaded_by(argv) == "[]\n"


def test_list_loads_nothing_heavy_but_what_asks_the_kernel() -> None:
    assert loaded_by(["list"]).splitlines()[-1] == "['pyroute2']"


@pytest.mark.parametrize("argv", [["--help"], ["list", "--json"], ["completion", "bash"]])
def test_full_disk_is_one_line(argv: list[str]) -> None:
    """Whatever the command is: its output goes to a file."""
    with open("/dev/full", "w", encoding="utf-8") as full:
        ran = subprocess.run(
            [sys.executable, "-m", "vhostbridge", *argv],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-1] == (
        "vhost-bridge: cannot write standard output: No space left on device"
    )
    assert "Traceback" not in ran.stderr


def test_error_in_the_journal_has_the_priority_of_one(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "vhostbridge", "serve", "--name", "b"]
    with (tmp_path / "journal").open("w") as stream:
        found = os.fstat(stream.fileno())
        env = {**os.environ, "JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"}
        subprocess.run(argv, stderr=stream, env=env, timeout=30, check=False)
    lines = (tmp_path / "journal").read_text().splitlines()
    assert len(lines) == 2 and all(line.startswith("<3>") for line in lines)


# list


@pytest.fixture
def no_kernel_vdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = Unsupported("this kernel has no vDPA", "modprobe vdpa")
    nothing = Inventory(management=(), devices=(), problem=missing)
    monkeypatch.setattr(listing, "take_inventory", lambda root: nothing)
    monkeypatch.setattr(listing, "running_bridges", lambda root: [])


@pytest.mark.usefixtures("no_kernel_vdpa")
def test_list_without_vdpa_is_empty_json_and_a_note(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = run(capsys, monkeypatch, "list", "-j")
    report = json.loads(ran.out)
    assert (ran.code, report["mgmtdev"], report["dev"], report["bridges"]) == (0, {}, {}, [])
    assert ran.err == ("vhost-bridge: note: this kernel has no vDPA\n  hint: modprobe vdpa\n")


@pytest.mark.usefixtures("no_kernel_vdpa")
def test_list_without_vdpa_is_no_text_and_a_note(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = run(capsys, monkeypatch, "list")
    assert (ran.code, ran.out) == (0, "")
    assert "note: this kernel has no vDPA" in ran.err


# inspect


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[tuple[socket.socket, Path]]:
    path = tmp_path / "back-end.sock"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen()
        yield sock, path


def test_a_server_that_does_not_answer_is_given_up_and_named(
    listener: tuple[socket.socket, Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inspect, "PATIENCE", 0.05)
    ran = run(capsys, monkeypatch, "inspect", listener[1])
    assert (ran.code, ran.out) == (1, "")
    assert f"pid {os.getpid()}" in ran.err
    assert "did not answer within 0.05 s" in ran.err
    assert "one front-end at a time" in ran.err


def test_a_server_that_hangs_up_is_a_lost_transport(
    listener: tuple[socket.socket, Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = threading.Thread(target=lambda: listener[0].accept()[0].close())
    server.start()
    ran = run(capsys, monkeypatch, "inspect", listener[1])
    server.join()
    assert ran.code == 3


# Completion


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_call_the_command(
    shell: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = run(capsys, monkeypatch, "completion", shell)
    assert f"{completion.VARIABLE}={shell}_complete" in ran.out


@pytest.mark.parametrize(
    ("line", "candidates"),
    [
        ("vhost-bridge ins", ["inspect"]),
        ("vhost-bridge inspect --ty", ["--type"]),
        ("vhost-bridge inspect x --type blo", ["block"]),
        # bash has cut the word at the colon, and only replaces what is behind it
        ("vhost-bridge serve --backend vhost-user:{folder}/b", ["{folder}/back-end.sock"]),
        ("vhost-bridge inspect {folder}/b", ["{folder}/back-end.sock"]),
    ],
)
def test_bash_completes(
    line: str, candidates: list[str], listener: tuple[socket.socket, Path], tmp_path: Path
) -> None:
    program = tmp_path / "program"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m vhostbridge "$@"\n')
    program.chmod(0o755)
    line = line.format(folder=tmp_path)
    test = (
        f"{completion.script('bash', command_line.cli)}\n"
        f"compopt() {{ :; }}; COMP_WORDBREAKS=' :='; COMP_LINE={shlex.quote(line)}\n"
        f"COMP_POINT=${{#COMP_LINE}}; _vhost_bridge_completion {shlex.quote(str(program))}\n"
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", test], capture_output=True, text=True, timeout=30, cwd=ROOT
    )
    assert done.stdout.split() == [one.format(folder=tmp_path) for one in candidates], done.stderr


# Manual page


@pytest.fixture(scope="module")
def man() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_man_page", ROOT / "packaging/man.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_manual_page_has_every_command_and_option(man: ModuleType) -> None:
    page = man.page()
    context = click.Context(command_line.cli, info_name="vhost-bridge")
    for name, command in command_line.cli.commands.items():
        section = page.partition(f".SS {name}\n")[2].partition("\n.S")[0]
        assert section, name
        for parameter in command.get_params(context):
            names = parameter.opts if isinstance(parameter, click.Option) else []
            for option in set(names) - {"--help", "-h"}:
                assert f"\\fB{man.escape(option)}\\fR" in section, (name, option)
    for number in range(4):
        assert f"\n.B {number}\n" in page
    for name in ("show", "diff", "verify"):
        assert f".SS state {name}\n.B vhost\\-bridge\n.B state {name}\n" in page


def test_manual_page_makes_text_safe_for_roff(man: ModuleType) -> None:
    assert man.escape("a-b\\c\n.d 'e'") == "a\\-b\\ec\n\\&.d \\(aqe\\(aq"
