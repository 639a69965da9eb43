"""A QEMU guest's disk: vhost-user-blk, the bridge and qemu-storage-daemon.

The tests share one guest and its disk of 32 MiB; each leaves them usable.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.peers.bridge import Bridge
from tests.peers.guest import Guest, GuestError, vhost_user_blk
from tests.peers.process import eventually
from tests.peers.storage import StorageDaemon, make_image

MIB = 1 << 20
UNTIL = "for i in $(seq 300); do {} && exit 0; sleep 0.1; done; exit 1"


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StorageDaemon]:
    folder = tmp_path_factory.mktemp("disk")
    with StorageDaemon(make_image(folder / "image"), folder / "sock", queues=2) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def middle(storage: StorageDaemon, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bridge]:
    listen = tmp_path_factory.mktemp("bridge") / "vm.sock"
    with Bridge(f"vhost-user:{storage.socket}", listen=listen) as running:
        yield running


@pytest.fixture(scope="module")
def guest(middle: Bridge) -> Iterator[Guest]:
    with Guest(vhost_user_blk(middle.listen, queues=2)) as running:
        yield running


def digest_of(image: Path, mib: int, skip: int) -> str:
    with image.open("rb") as file:
        file.seek(skip * MIB)
        return hashlib.sha256(file.read(mib * MIB)).hexdigest()


def wait_for_writes(image: Path) -> None:
    before = image.stat().st_mtime_ns
    eventually(lambda: image.stat().st_mtime_ns != before, "the guest writes")


def test_written_data_is_read_back_and_in_the_image(guest: Guest, storage: StorageDaemon) -> None:
    """What the guest wrote and read, by direct I/O, is what the image file holds."""
    assert guest.read_write(8, 0) == digest_of(storage.image, 8, 0)


def test_every_queue_is_used(guest: Guest, storage: StorageDaemon) -> None:
    """The guest has two hardware queues, and the data sent from each processor is right."""
    assert guest.run("ls /sys/block/vda/mq").split() == ["0", "1"]
    for processor in (0, 1):
        assert guest.run(f"taskset -c {processor} rw /dev/vda 1 {processor}") == digest_of(
            storage.image, 1, processor
        )


def test_stop_and_continue_under_io(guest: Guest, storage: StorageDaemon, middle: Bridge) -> None:
    """QMP stop suspends the device: the image is still. After cont all goes on, and is right."""
    guest.begin("for i in $(seq 40); do rw /dev/vda 1 $((i % 8 + 8)) || exit 1; done")
    for _ in range(6):
        wait_for_writes(storage.image)
        log = len(middle.output)
        guest.qmp.execute("stop")
        frozen = digest_of(storage.image, 32, 0)
        assert digest_of(storage.image, 32, 0) == frozen
        guest.qmp.execute("cont")
        middle.wait_for_output("running vrings", start=log)
    digests = guest.end().split()
    for place in range(8):
        last = max(i for i in range(1, 41) if i % 8 == place)
        assert digests[last - 1] == digest_of(storage.image, 1, 8 + place)


def test_changed_capacity_reaches_the_guest(guest: Guest, storage: StorageDaemon) -> None:
    """The back-end's configuration change notification: the guest sees and uses more."""
    storage.resize(40 * MIB)
    guest.run(UNTIL.format(f"[ $(cat /sys/block/vda/size) = {40 * MIB // 512} ]"))
    assert guest.read_write(4, 36) == digest_of(storage.image, 4, 36)


def test_memory_that_is_added_while_running(guest: Guest, storage: StorageDaemon) -> None:
    """I/O into hot-added memory, which the guest uses first; removed again, the device goes on."""
    guest.run("echo online_movable >/sys/devices/system/memory/auto_online_blocks")
    dimm = {"qom-type": "memory-backend-memfd", "size": 256 * MIB, "share": True}
    guest.qmp.execute("object-add", id="more", **dimm)
    guest.qmp.execute("device_add", driver="pc-dimm", id="dimm", memdev="more")
    free = "awk '/zone +Movable/ {z=1} z && /nr_free_pages/ {print $2; exit}' /proc/zoneinfo"
    guest.run(UNTIL.format(f"[ $({free}) -gt 60000 ]"))
    before = int(guest.run(free))
    # A process's buffer and a file in tmpfs are taken from the movable zone, the new memory.
    guest.run("dd if=/dev/vda of=/tmp/copy bs=32M count=1 iflag=direct")
    assert before - int(guest.run(free)) > 0.9 * 32 * MIB / 4096
    assert guest.run("sha256sum </tmp/copy | cut -c1-64") == digest_of(storage.image, 32, 0)
    guest.run("dd if=/dev/urandom of=/tmp/new bs=1M count=8")
    guest.run("dd if=/tmp/new of=/dev/vda bs=1M count=8 oflag=direct")
    assert guest.run("sha256sum </tmp/new | cut -c1-64") == digest_of(storage.image, 8, 0)
    guest.run("rm /tmp/copy /tmp/new")
    guest.qmp.execute("device_del", id="dimm")
    guest.qmp.wait_for_event("DEVICE_DELETED")
    guest.qmp.execute("object-del", id="more")
    assert guest.read_write(8, 24) == digest_of(storage.image, 8, 24)


def test_system_reset_under_io(guest: Guest, storage: StorageDaemon) -> None:
    """The guest is reset while it writes; it boots and its disk is as good as before."""
    guest.begin("for i in $(seq 100); do rw /dev/vda 1 $((i % 8)) || exit 1; done")
    wait_for_writes(storage.image)
    guest.qmp.execute("system_reset")
    guest.wait_ready()
    assert guest.read_write(8, 0) == digest_of(storage.image, 8, 0)


def test_qemu_that_is_killed_leaves_a_usable_device(
    storage: StorageDaemon, middle: Bridge, guest: Guest
) -> None:
    """Killed while it writes; the next QEMU finds the device and right data. The last test here."""
    guest.begin("for i in $(seq 100); do rw /dev/vda 1 $((i % 8)) || exit 1; done")
    wait_for_writes(storage.image)
    guest.kill()
    with pytest.raises(GuestError, match="gone"):
        guest.end()
    with Guest(vhost_user_blk(middle.listen)) as successor:
        assert successor.read_write(8, 0) == digest_of(storage.image, 8, 0)
    middle.check_log()


def test_features_that_are_withheld_are_not_the_guests(disk: StorageDaemon, tmp_path: Path) -> None:
    """Those that it sees otherwise; the disk works without them."""
    withheld = {"SIZE_MAX": 1, "TOPOLOGY": 10, "CONFIG_WCE": 11}
    seen = []
    for names in ("DISCARD", ",".join([*withheld, "DISCARD"])):
        options = ["--type", "block", "--without-features", names]
        target = f"vhost-user:{disk.socket}"
        with (
            Bridge(target, listen=tmp_path / "vm.sock", arguments=options) as bridge,
            Guest(vhost_user_blk(bridge.listen)) as guest,
        ):
            seen.append(guest.run("cat /sys/block/vda/device/features").strip())
            assert guest.read_write(2, 0) == digest_of(disk.image, 2, 0)
    before, after = seen
    assert {name for name, bit in withheld.items() if before[bit] == "1"} == set(withheld)
    assert [after[bit] for bit in withheld.values()] == ["0", "0", "0"]
    assert before[13] == "0", "DISCARD"


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("SIZE_MAX,VERSION_1", "a device can't be offered without VERSION_1"),
        ("RO", "a device can't be offered without RO"),
        ("TSO", "virtio-block has no feature 'TSO'"),
    ],
)
def test_features_that_can_not_be_withheld_are_told_at_the_start(
    disk: StorageDaemon, tmp_path: Path, names: str, said: str
) -> None:
    options = ["--type", "block", "--without-features", names]
    bridge = Bridge(f"vhost-user:{disk.socket}", listen=tmp_path / "vm.sock", arguments=options)
    assert bridge.wait() == 2
    assert said in bridge.output
    bridge.kill()


def test_qemu_that_listens(disk: StorageDaemon, tmp_path: Path) -> None:
    """With --connect the bridge dials QEMU's socket (server=on), again and again."""
    path = tmp_path / "qemu.sock"
    with Bridge(f"vhost-user:{disk.socket}", connect=path) as bridge:
        for round_ in (1, 2):
            with Guest(vhost_user_blk(path, server=True)) as guest:
                assert guest.read_write(4, 0) == digest_of(disk.image, 4, 0)
            bridge.wait_for_departures(round_)


def test_back_end_that_dies_idle_is_replaced_under_the_guest(
    disk: StorageDaemon, tmp_path: Path
) -> None:
    """The guest's driver sees nothing of it; its data is there and its disk goes on."""
    with (
        Bridge(f"vhost-user:{disk.socket}", listen=tmp_path / "vm.sock") as bridge,
        Guest(vhost_user_blk(bridge.listen)) as guest,
    ):
        before = guest.read_write(4, 0)
        disk.kill()
        bridge.wait_for_output("waiting for the back-end: ")
        log = len(bridge.output)
        with StorageDaemon(disk.image, disk.socket, queues=4):
            bridge.wait_for_output("running vrings", start=log)
            assert (
                guest.run("dd if=/dev/vda bs=1M count=4 2>/dev/null | sha256sum | cut -c1-64")
                == before
            )
            assert guest.read_write(4, 4) == digest_of(disk.image, 4, 4)
