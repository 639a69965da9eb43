"""Bridge configurations: what is wrong is said with its place, and nothing is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from vhostbridge.backends.errors import ConfigError
from vhostbridge.bridge import config
from vhostbridge.bridge.config import BridgeConfig, load_config, parse_mode

GOOD = '[[bridge]]\nname = "a"\nlisten = "/run/a"\nbackend = "vdpa:a"\n'


def load(tmp_path: Path, text: str) -> list[BridgeConfig]:
    (tmp_path / "f.toml").write_text(text)
    return load_config(tmp_path / "f.toml").bridges


def test_file_gives_its_bridges_in_order(tmp_path: Path) -> None:
    text = GOOD + '[[bridge]]\nname="b"\nconnect="/run/b"\nbackend="vhost-user:/x"\n'
    bridges = load(tmp_path, text + 'socket-mode="660"\n')
    assert [(b.name, b.listen, b.connect, b.socket_mode) for b in bridges] == [
        ("a", "/run/a", None, 0o600),
        ("b", None, "/run/b", 0o660),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected [[bridge]] tables"),
        ("[[bridge]]\nname=", "f.toml: "),
        (GOOD + "x = 1\n", "bridge 1: unknown key 'x'"),
        (GOOD.replace('"a"', "3", 1), "bridge 1: name must be a str"),
        (GOOD.replace('listen = "/run/a"\n', ""), "exactly one of listen, connect and fd"),
        (GOOD + 'connect = "/run/b"\n', "exactly one of listen, connect and fd"),
        (GOOD.replace("vdpa:a", "pci:a"), "'pci:a' is no back-end"),
        (GOOD + GOOD, "name 'a' is used twice"),
        (GOOD.replace('backend = "vdpa:a"\n', ""), "bridge 1: backend is missing"),
        ("[bridge]\nname = 1\n", "expected [[bridge]] tables"),
        ("control = 3\n" + GOOD, "control must be a path, or false"),
        ('control = ""\n' + GOOD, "control must be a path, or false"),
        (GOOD + 'without-features = ["MQ", 3]\n', "bridge 1: ['MQ', 3] is no list of features"),
        (GOOD + 'without-features = "MQ,,TSO"\n', "bridge 1: 'MQ,,TSO' is no list of features"),
    ],
)
def test_wrong_file_is_refused_with_the_place(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load(tmp_path, text)
    assert said in str(refused.value)


@pytest.mark.parametrize("names", ['"MQ, SIZE_MAX"', '["MQ", "SIZE_MAX"]'])
def test_features_to_do_without_are_a_list_or_a_string(tmp_path: Path, names: str) -> None:
    (bridge,) = load(tmp_path, GOOD + f"without-features = {names}\n")
    assert bridge.without_features == ("MQ", "SIZE_MAX")


@pytest.mark.parametrize(
    ("line", "control"),
    [
        ("", "{folder}/vhost-bridge/f.sock"),
        ('control = "/x/y.sock"\n', "/x/y.sock"),
        ("control = true\n", "{folder}/vhost-bridge/f.sock"),
        ("control = false\n", None),
    ],
)
def test_file_says_where_the_control_socket_is(
    line: str, control: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "f.toml").write_text(line + GOOD)
    expected = control and Path(control.format(folder=tmp_path))
    assert load_config(tmp_path / "f.toml").control == expected


def test_control_socket_of_root_is_in_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/elsewhere")
    assert config.usual_control("vm1") == Path("/run/vhost-bridge/vm1.sock")


def test_user_without_a_runtime_folder_has_no_usual_control_socket(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    assert config.usual_control("vm1") is None


def test_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path / "none.toml")


@pytest.mark.parametrize("text", ["", "8", "rw", "1777", "0o600", "999"])
def test_socket_mode_is_three_octal_digits(text: str) -> None:
    with pytest.raises(ConfigError, match="is no socket mode"):
        parse_mode(text)


@pytest.mark.parametrize(
    ("second", "where"),
    [
        ('name = "b"\n# a remark\nlistne = "/x"\n', "line 8: bridge 2: unknown key 'listne'"),
        ('name = "b"\n\n"shadow" = 3\n', "line 8: bridge 2: shadow must be a bool"),
        ('name = "b"\n', "line 5: bridge 2: backend is missing"),
    ],
)
def test_mistake_is_told_with_its_line(second: str, where: str, tmp_path: Path) -> None:
    path = tmp_path / "many.toml"
    first = '[[bridge]]\nname = "a"\nlisten = "/a"\nbackend = "vdpa:a"\n'
    path.write_text(first + "[[bridge]]\n" + second)
    with pytest.raises(ConfigError) as told:
        load_config(path)
    assert str(told.value).startswith(f"{path}, {where}")
