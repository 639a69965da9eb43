"""What operators do with a bridge: the documents' commands, on a disk of the storage daemon's."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from tests.peers.process import eventually

from .reader import HostJob, Reader

STORAGE = (
    "qemu-storage-daemon --blockdev driver=file,node-name=d,filename=/srv/disk.img "
    "--export type=vhost-user-blk,id=e,node-name=d,writable=on,addr.type=unix,"
    "addr.path=/run/blk0.sock"
)
SERVE = "vhost-bridge serve --name vm1 --listen /run/vm1.sock --backend vhost-user:/run/blk0.sock"
# A front-end whose device runs, and that has nothing to ask for.
IDLE = (
    "qemu-io --image-opts driver=virtio-blk-vhost-user,path=/run/vm1.sock,cache.direct=on "
    "-c 'write -P 7 0 64k' -c 'sleep 100000'"
)
FETCH = (
    "from urllib.request import urlopen; "
    'print(urlopen("http://127.0.0.1:9273/metrics", timeout=10).read().decode())'
)


@pytest.fixture
def reader() -> Iterator[Reader]:
    here = {
        "inspect -j blk0": "inspect -j /run/blk0.sock --type block",
        "/etc/vhost-bridge.toml": "/srv/vhost-bridge.toml",
        "/var/lib/node_exporter": "/srv",
        "/srv/states/*": "/srv/*.state",
    }
    with Reader(here=here) as person:
        with person.place.path("/srv/disk.img").open("wb") as image:
            image.truncate(32 << 20)
        storage = person.begin(STORAGE)
        eventually(lambda: person.exists("/run/blk0.sock"), "the storage daemon's socket")
        assert storage.ended() is None, storage.text()
        # Another host is this one.
        ssh = person.place.path("/programs/ssh")
        ssh.write_text('#!/bin/sh\nshift\nexec "$@"\n')
        ssh.chmod(0o755)
        yield person


def running(reader: Reader, more: str = "") -> HostJob:
    """A bridge with a front-end."""
    bridge = reader.begin(f"{SERVE} {more}")
    eventually(lambda: "serving 1 bridge" in bridge.text(), "the bridge serves")
    reader.begin(IDLE)
    eventually(lambda: "running" in reader.run("vhost-bridge status vm1"), "its device runs")
    return bridge


def test_states(reader: Reader) -> None:
    """Through a pipe, by varlinkctl, and looked at as files."""
    running(reader)
    reader.run("vhost-bridge suspend vm1")
    reader.follow("docs/control.md#operations")
    reader.run("vhost-bridge resume vm1")
    reader.follow("docs/control.md#the-interface")
    assert reader.place.path("/srv/vm1.state").stat().st_size > 100
    for name in ("before", "after"):
        shutil.copy(reader.place.path("/srv/vm1.state"), reader.place.path(f"/srv/{name}.state"))
    reader.follow("docs/control.md#saved-states-without-a-daemon")


def test_answers_for_programs(reader: Reader) -> None:
    """JSON and jq, traces and metrics."""
    reader.follow("docs/inspect.md#inspect")
    bridge = running(reader, "--trace /srv/vm1.trace")
    *_, selected = reader.commands("docs/control.md#monitor")
    reader.do(selected)
    exported, moved = reader.commands("docs/monitoring.md#prometheus")[-2:]
    reader.do(exported)
    reader.do(moved)
    metrics = reader.place.path("/srv/vhost-bridge.prom").read_text()
    assert 'vhost_bridge_state{bridge="vm1",state="running"} 1' in metrics
    bridge.stop()
    bridge.wait()
    shutil.copy(reader.place.path("/srv/vm1.trace"), reader.place.path("/srv/vm1.trace.1"))
    reader.follow("docs/tracing.md#reading-it")
    assert "<svg" in reader.place.path("/srv/vm1.svg").read_text()


def test_metrics_of_a_file_of_bridges(reader: Reader) -> None:
    reader.write(
        "vhost-bridge.toml",
        '[[bridge]]\nname = "vm1"\nlisten = "/run/vm1.sock"\n'
        'backend = "vhost-user:/run/blk0.sock"\n',
    )
    reader.do(reader.commands("docs/monitoring.md#prometheus")[0])
    assert "vhost_bridge_bridges 1\n" in reader.run(f"python -c '{FETCH}'")


def test_back_end_that_the_bridge_starts(reader: Reader) -> None:
    reader.follow("docs/serving.md#starting-the-back-end")
    assert "pid" in reader.run("vhost-bridge status fs1")
