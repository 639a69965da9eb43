"""Guides and documents whose devices are the kernel's: their commands, as they are written."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from tests.docs.follow import agrees

from .blk import BlockDriver
from .devices import block_device, net_device, sh, simulator_options, wait_until
from .frontend import VERSION_1, Frontend
from .memory import Memory
from .reader import OtherJob, Reader
from .vduse import vduse_block, vhost_user_block
from .vring import SplitRing

FLUSH = 1 << 9
SERVE = "vhost-bridge serve --name vm1 --listen /run/vm1.sock --backend"


@contextlib.contextmanager
def guest_on(path: str, driver: BlockDriver | None = None) -> Iterator[BlockDriver]:
    """A driver that has written through the bridge, and stays; or one that goes on."""
    with Frontend(path) as frontend:
        frontend.negotiate(VERSION_1 | FLUSH)
        if driver is None:
            driver = BlockDriver(SplitRing(Memory()))
            frontend.set_memory([driver.ring.memory])
            frontend.start([driver.ring])
            driver.write_blocks("guide", range(20))
        else:
            frontend.set_memory([driver.ring.memory])
            driver.ring.new_eventfds()
            frontend.start([driver.ring], [driver.ring.used_index])
        yield driver


def check_readme() -> None:
    """Installing with pip is what tests/install does."""
    with block_device(), Reader() as reader:
        *before, suspend = [
            command
            for command in reader.commands("README.md#install-and-use")
            if command.where == "host" and "/opt/vhost-bridge" not in command.text
        ]
        assert "suspend" in suspend.text
        for command in before:
            reader.do(command)
        with guest_on("/run/vm1.sock"):
            reader.do(suspend)


def check_vdpa() -> None:
    with Reader() as reader:
        reader.follow("docs/guides/vdpa.md#from-nothing-to-a-device")
        reader.follow("docs/guides/vdpa.md#which-driver-has-it")
        reader.follow("docs/guides/vdpa.md#what-to-check")
    sh("vdpa dev del blk1")


def check_vduse() -> None:
    """What a guest wrote is in the file."""
    with Reader() as reader:
        reader.follow("docs/guides/vduse.md#a-disk-from-a-file")
        reader.follow("docs/guides/vduse.md#what-to-check")
        with guest_on("/run/disk.sock") as driver:
            driver.check_blocks("guide", range(20))
        reader.follow("docs/guides/vduse.md#the-end-of-it")
    assert any(Path("/srv/disk.img").read_bytes()[: 20 * 4096])


def check_libblkio() -> None:
    with Reader() as reader:
        reader.follow("docs/guides/libblkio.md#qemus-tools")
        reader.follow("docs/guides/libblkio.md#nbdkit")
    sh("vdpa dev del blk0")


def check_looking() -> None:
    """`list` finds bridges by their command lines, so this one is no fork of ours."""
    with (
        block_device(),
        net_device(),
        vduse_block() as device,
        vhost_user_block(device.file) as disk,
    ):
        os.symlink(disk, "/run/blk.sock")
        with Reader() as reader:
            reader.follow("docs/inspect.md")
    os.unlink("/run/blk.sock")
    with block_device(), net_device(), Reader() as reader:
        job = OtherJob(f"{SERVE} vdpa:net0")
        reader.jobs.append(job)
        wait_until(lambda: "serving 1 bridge" in job.text(), 40)
        reader.follow("docs/inspect.md#list")


def check_control() -> None:
    """Suspended, saved, loaded, moved and reset under a driver whose data stays right."""
    with block_device("blk1"), block_device("blk0"), Reader() as reader:
        reader.jobs.append(reader.begin(f"{SERVE} vdpa:blk1"))
        wait_until(lambda: "serving 1 bridge" in reader.jobs[0].text(), 40)
        with guest_on("/run/vm1.sock"):
            monitor, until, _ = reader.commands("docs/control.md#monitor")
            following = reader.begin(monitor.text)
            reader.jobs.append(following)
            wait_until(lambda: "state: running" in following.text())
            reader.run("vhost-bridge switch vm1 vdpa:blk0")
            wait_until(lambda: agrees(monitor.output, following.text()))
            reader.do(until)
            reader.follow("docs/control.md#status")
            reader.follow("docs/moving.md#suspend-and-go-on")
            reader.follow("docs/control.md")


def check_moving() -> None:
    """A driver goes on behind another bridge, where the state stopped. The devices share data."""
    with (
        simulator_options("", block="shared_backend=1"),
        block_device("blk0"),
        block_device("blk1"),
        Reader() as reader,
    ):
        reader.follow("docs/serving.md")
        *save, serve = reader.commands("docs/moving.md#to-another-device-or-another-transport")
        with guest_on("/run/vm1.sock") as driver:
            for command in save:
                reader.do(command)
        (first,) = reader.jobs
        first.stop()
        first.wait()
        reader.do(serve)
        with guest_on("/run/vm1.sock", driver):
            driver.check_blocks("guide", range(20))
            assert "vdpa:blk1" in reader.run("vhost-bridge status vm1")


def check_switching() -> None:
    with vduse_block("blk0") as device, vhost_user_block(device.file) as storage:
        os.symlink(storage, "/run/storage.sock")
        with Reader() as reader:
            reader.follow("docs/switching.md#devices-that-are-not-the-same")
            wait_until(lambda: "serving 1 bridge" in reader.jobs[0].text(), 40)
            with guest_on("/run/vm1.sock") as driver:
                reader.follow("docs/switching.md")
                driver.check_blocks("guide", range(20))
    os.unlink("/run/storage.sock")


def check_tracing() -> None:
    trace = Path("/var/tmp/vm1.trace")
    with block_device(), Reader() as reader:
        reader.follow("docs/tracing.md#taking-one")
        with guest_on("/run/vm1.sock"):
            pass
    assert '"VHOST_SET_OWNER"' in trace.read_text()
    trace.unlink()
