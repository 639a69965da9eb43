"""The pure parts of list and inspect: facts in, plain values and lines of text out."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from vhostbridge.backends.device import DeviceInfo
from vhostbridge.backends.holders import Holder
from vhostbridge.backends.lifecycle import Ability, Capabilities, How
from vhostbridge.backends.vdpa.discovery import BusDevice
from vhostbridge.backends.vdpa.inventory import Inventory, InventoryEntry
from vhostbridge.backends.virtio import DeviceId, FsFeature, NetFeature, TransportFeature
from vhostbridge.backends.virtio_config import config_sizes
from vhostbridge.backends.virtio_features import BlockFeature
from vhostbridge.bridge import facts, inspect, listing, render

NO = Ability(How.NO, "because")
YES = Ability(How.NATIVE, "by itself")


def info(**changes: int) -> DeviceInfo:
    values: dict[str, Any] = {
        "device_id": int(DeviceId.BLOCK),
        "features": TransportFeature.VERSION_1.mask,
        "vring_limit": 1,
        "queue_num": 1,
        "vring_size_max": 256,
        "config_size": 96,
        "iova_first": 0,
        "iova_last": 2**64 - 1,
        "region_max": 509,
    }
    return DeviceInfo(target="vdpa:blk0", **{**values, **changes})


def abilities(**changes: Ability) -> Capabilities:
    names = ("suspend", "resume", "save", "load", "inflight", "dirty_log", "memory_hotplug")
    return Capabilities(**{**dict.fromkeys((*names, "vring_stop"), YES), **changes})


# list


NODES = (
    InventoryEntry(
        name="blk0",
        bus=BusDevice(name="blk0", driver="vhost_vdpa", char_device="vhost-vdpa-7"),
        info=None,
        config=None,
    ),
    InventoryEntry(
        name="net0",
        bus=BusDevice(name="net0", driver="virtio_vdpa", interfaces=("eth3",)),
        info=None,
        config=None,
    ),
)


def test_list_shows_who_holds_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    holder = Holder(41, "vhost-bridge", ("vhost-bridge", "serve"))
    bridge = listing.RunningBridge(pid=41, name="vm1", backend="vdpa:blk0", listen="/run/a")
    inventory = Inventory(management=(), devices=NODES)
    monkeypatch.setattr(listing, "take_inventory", lambda root: inventory)
    monkeypatch.setattr(listing, "running_bridges", lambda root: [bridge])
    monkeypatch.setattr(listing, "holders", lambda node: [holder])
    assert list(render.list_text(listing.list_report())) == [
        "VDPA DEVICE  TYPE  DRIVER       NODE               HELD BY",
        "blk0         ?     vhost_vdpa   /dev/vhost-vdpa-7  bridge vm1 (pid 41)",
        "net0         ?     virtio_vdpa                     this host, as eth3",
        "",
        "BRIDGE  PID  FRONT-END      BACK-END",
        "vm1     41   listen /run/a  vdpa:blk0",
    ]


@pytest.mark.parametrize(
    ("cmdline", "options"),
    [
        ("vhost-bridge serve --name a --backend=vdpa:b", {"name": "a", "backend": "vdpa:b"}),
        ("/usr/bin/python3 /usr/bin/vhost-bridge -v serve --fd 3", {"fd": "3"}),
        ("python3 -X dev -m vhostbridge serve --config /etc/x", {"config": "/etc/x"}),
        ("python3 -m vhostbridge serve --config /etc/x", {"config": "/etc/x"}),
        ("vhost-bridge serve --name", {"name": ""}),
        ("vhost-bridge list", None),
        ("vi vhost-bridge.toml serve", None),
        ("", None),
    ],
)
def test_bridges_are_recognised_by_their_command_lines(
    cmdline: str, options: dict[str, str] | None
) -> None:
    assert listing.serve_options(cmdline.split()) == options


def test_a_bridge_with_a_file_is_as_many_bridges_as_the_file_has(tmp_path: Path) -> None:
    table = '[[bridge]]\nname = "{0}"\nlisten = "/run/{0}"\nbackend = "vdpa:{0}"\n'
    (tmp_path / "b.toml").write_text(table.format("one") + table.format("two"))
    cmdline = ["vhost-bridge", "serve", "--config", "b.toml"]
    found = listing.bridges_of(9, cmdline, tmp_path)
    assert [(bridge.name, bridge.backend) for bridge in found] == [
        ("one", "vdpa:one"),
        ("two", "vdpa:two"),
    ]
    holder = Holder(9, "vhost-bridge", tuple(cmdline))
    assert listing.holder_report(holder, found, ["vdpa:two"])["bridge"] == "two"
    assert "bridge" not in listing.holder_report(holder, found, ["vdpa:three"])


def test_a_file_that_is_gone_still_leaves_a_bridge(tmp_path: Path) -> None:
    (bridge,) = listing.bridges_of(9, ["vhost-bridge", "serve", "--config", "b.toml"], tmp_path)
    assert bridge.report() == {"pid": 9, "config": "b.toml"}


# inspect


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("vdpa:blk0", ("vdpa", "blk0")),
        ("vhost-user:blk", ("vhost-user", "blk")),
        ("blk0", ("vdpa", "blk0")),
        ("/dev/vhost-vdpa-3", ("vdpa", "/dev/vhost-vdpa-3")),
        ("/run/not-there.sock", ("vhost-user", "/run/not-there.sock")),
        ("/dev/null", ("vdpa", "/dev/null")),
    ],
)
def test_a_target_tells_its_transport(target: str, expected: tuple[str, str]) -> None:
    assert inspect.classify(target) == expected


def test_a_socket_is_vhost_user_whatever_it_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind("back-end.sock")
    assert inspect.classify("back-end.sock") == ("vhost-user", "back-end.sock")


def test_features_are_split_into_offered_and_hidden_with_reasons() -> None:
    mask = (
        BlockFeature.MQ.mask
        | TransportFeature.VERSION_1.mask
        | TransportFeature.ACCESS_PLATFORM.mask
        | 1 << 50
    )
    report = facts.features_report(mask, DeviceId.BLOCK, TransportFeature.VERSION_1.mask)
    assert report["mask"] == hex(mask)
    assert report["device"] == ["MQ", "VERSION_1", "ACCESS_PLATFORM", "bit_50"]
    assert report["offered"] == ["MQ", "VERSION_1", "bit_50"]
    assert report["negotiated"] == ["VERSION_1"]
    hidden = report["hidden"]
    assert isinstance(hidden, dict) and "guest memory" in hidden["ACCESS_PLATFORM"]


def test_configuration_is_asked_for_in_the_sizes_of_valid_fields() -> None:
    assert config_sizes(DeviceId.BLOCK, BlockFeature.BLK_SIZE.mask) == [24, 8]
    assert config_sizes(DeviceId.RNG, 0) == []


@pytest.mark.parametrize(
    ("device_id", "queue_num", "features", "config", "count"),
    [
        (DeviceId.NET, 2, 0, {}, 4),
        (DeviceId.BLOCK, 4, 0, {"num_queues": 4}, 4),
        (DeviceId.FS, 1024, 0, {"num_request_queues": 1}, 2),
        (DeviceId.FS, 1024, FsFeature.NOTIFICATION.mask, {"num_request_queues": 1}, 3),
    ],
)
def test_queue_number_of_a_back_end_stands_for_vrings(
    device_id: int, queue_num: int, features: int, config: dict[str, int], count: int
) -> None:
    assert facts.backend_vring_count(device_id, queue_num, features, dict(config)) == count


def test_vrings_are_named_and_sized_where_that_is_known() -> None:
    features = NetFeature.CTRL_VQ.mask
    assert facts.vrings_report(DeviceId.NET, 3, features, {}, [256, 256, None]) == [
        {"index": 0, "name": "rx0", "max_size": 256},
        {"index": 1, "name": "tx0", "max_size": 256},
        {"index": 2, "name": "control"},
    ]
    assert facts.vrings_report(None, 1, 0, {}) == [{"index": 0}]


def test_capabilities_say_how_and_why() -> None:
    assert facts.capabilities_report(abilities(save=NO))["save"] == {"how": "no", "why": "because"}


def test_obstacles_are_the_reasons_of_what_the_device_cannot() -> None:
    found = facts.obstacles(info(), abilities(save=NO, dirty_log=NO))
    assert found["save"] == ["because"]
    assert found["migrate"] == ["save: because", "dirty logging: because"]
    assert "suspend" not in found


def test_inspect_text_says_that_a_held_device_was_not_opened() -> None:
    report: dict[str, object] = {
        "target": "blk0",
        "transport": "vhost-vdpa",
        "opened": False,
        "not_opened": "busy",
        "not_opened_hint": "stop it",
        "held_by": [{"pid": 3, "comm": "qemu-system-x86", "command": ["/bin/qemu-system-x86_64"]}],
    }
    lines = list(render.inspect_text(report))
    assert "not opened     busy" in lines
    assert "held by        qemu-system-x86_64 (pid 3)" in lines
