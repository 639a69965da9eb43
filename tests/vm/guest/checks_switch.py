"""A running driver's device moves between vDPA devices, and between the transports."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path

from vhostbridge.backends.errors import BridgeError

from . import libblkio
from .blk import BLOCK, IN, OUT, BlockDriver, Request, content
from .checks_model import arrive, control
from .devices import block_device, net_device, serving, simulator_options
from .frontend import ALL, CONFIG, Frontend
from .memory import Memory
from .net import NetDriver, vhost_user_echo
from .vduse import vduse_block, vhost_user_block
from .vring import SplitRing

MIB = 1 << 20
ROUNDS = 200 if os.environ.get("VHOST_BRIDGE_SOAK") else 20
BLOCKS = 150
PER_BLOCK = BLOCK // 512


def switch(name: str, backend: str) -> dict[str, float]:
    """Move a bridge; the parts of the pause in seconds."""
    with control(name) as client:
        report = client.switch(name, backend)
        assert report.moved, report
        assert report.state == "running"
        assert client.status(name)[0].backend == backend
        return dict(report.phases)


class Load:
    """Random reads and writes, at most one to a block at a time; every byte is compared."""

    def __init__(self) -> None:
        self.driver = BlockDriver(SplitRing(Memory(4 * MIB)))
        self._chance = random.Random(51)
        self._version = dict.fromkeys(range(BLOCKS), 0)
        self._busy: dict[int, int] = {}
        self._count = 0

    def submit(self, count: int) -> None:
        for _ in range(min(count, self.driver.room)):
            block = self._chance.choice([b for b in self._version if b not in self._busy])
            self._count += 1
            self._busy[block] = self._count
            if self._chance.random() < 0.5:
                data = content(self._count, block)
                self.driver.submit(Request(OUT, block * PER_BLOCK, data))
            else:
                self.driver.submit(Request(IN, block * PER_BLOCK, size=BLOCK))

    def compare(self, done: Sequence[tuple[Request, int, bytes]]) -> None:
        for request, status, data in done:
            block = request.sector // PER_BLOCK
            count = self._busy.pop(block)
            assert status == 0
            if request.kind == OUT:
                self._version[block] = count
            else:
                assert data == content(self._version[block], block), block

    def settle(self) -> None:
        """Wait for what is in flight, and read everything."""
        while self.driver.pending:
            self.compare(self.driver.wait())
        for version in set(self._version.values()):
            blocks = [b for b, v in self._version.items() if v == version]
            self.driver.check_blocks(version, blocks)


def go_round(first: str, others: Sequence[str], rounds: int) -> None:
    """Switch a bridge on and on under load."""
    load = Load()
    with serving(("blk", first)) as bridge, Frontend(bridge.socket) as frontend:
        arrive(frontend, load.driver, [0])
        load.driver.write_blocks(0, range(BLOCKS))
        for number in range(rounds):
            load.submit(20)
            switch("blk", others[number % len(others)])
            load.compare(load.driver.take())
            load.submit(5)
        load.settle()


def check_block_between_vdpa_devices_on_one_store() -> None:
    with (
        simulator_options("", block="shared_backend=1"),
        block_device("blk1"),
        block_device("blk2"),
    ):
        go_round("vdpa:blk1", ["vdpa:blk2", "vdpa:blk1"], ROUNDS)


def check_block_between_vdpa_and_vhost_user() -> None:
    """VDUSE and vhost-user-blk serve the same file, each by a process of its own."""
    with vduse_block() as device, vhost_user_block(device.file) as socket:
        user = f"vhost-user:{socket}"
        go_round(user, ["vdpa:vd0", user], ROUNDS)
        go_round("vdpa:vd0", [user, "vdpa:vd0"], 4)


def check_driver_that_uses_all_it_is_offered() -> None:
    """libblkio's can't move to VDUSE, which lacks features; it can where those are withheld."""
    options: dict[str, object] = {"size": 4 * MIB, "seed": 3, "state": "/tmp/checks-blocks"}
    load = options | {"depth": 8, "seconds": 600}
    Path("/tmp/checks-blocks").unlink(missing_ok=True)
    with vduse_block() as device, vhost_user_block(device.file) as socket:
        user = f"vhost-user:{socket}"
        with serving(("blk", user)) as bridge:
            libblkio.run(libblkio.USER, bridge.socket, "fill", **options)
            with libblkio.running(bridge.socket, **load), control("blk") as client:
                reasons = client.switch("blk", "vdpa:vd0", dry_run=True).reasons
        lacking = "the device lacks features that were negotiated: "
        (names,) = [r.removeprefix(lacking) for r in reasons if r.startswith(lacking)]
        without = ["--type", "block", "--without-features", names]
        with serving(("blk", user), more=without) as bridge:
            with libblkio.running(bridge.socket, **load):
                for target in ("vdpa:vd0", user, "vdpa:vd0"):
                    switch("blk", target)
            libblkio.run(libblkio.USER, bridge.socket, "verify", **options)


def check_numbered_frames_between_vdpa_devices() -> None:
    driver = NetDriver(Memory(4 * MIB))
    with (
        net_device("net1"),
        net_device("net2"),
        serving(("net", "vdpa:net1")) as bridge,
        Frontend(bridge.socket) as frontend,
    ):
        arrive(frontend, driver, [0, 0])
        for number in range(ROUNDS):
            driver.send_numbered(9)
            switch("net", ["vdpa:net2", "vdpa:net1"][number % 2])
            driver.receive(driver.sent)
        driver.check()


def check_numbered_frames_between_vdpa_and_vhost_user() -> None:
    """DPDK's back-end has no configuration space: a front-end that does not ask for one."""
    driver = NetDriver(Memory(4 * MIB))
    with (
        net_device(),
        vhost_user_echo() as socket,
        serving(("net", "vdpa:net0")) as bridge,
        Frontend(bridge.socket) as frontend,
    ):
        frontend.negotiate(protocol=ALL & ~CONFIG)
        frontend.set_memory([driver.memory])
        frontend.start(driver.rings)
        for number in range(4):
            driver.exchange(50, window=16)
            switch("net", [f"vhost-user:{socket}", "vdpa:net0"][number % 2])
        driver.exchange(50, window=16)
        driver.check()


def check_other_device_that_is_busy_changes_nothing() -> None:
    load = Load()
    with (
        simulator_options("", block="shared_backend=1"),
        block_device("blk1"),
        block_device("blk2") as node,
        serving(("blk", "vdpa:blk1")) as bridge,
        Frontend(bridge.socket) as frontend,
    ):
        arrive(frontend, load.driver, [0])
        load.driver.write_blocks(0, range(BLOCKS))
        load.submit(20)
        with open(node, "r+b", buffering=0), control("blk") as client:
            said = ""
            try:
                client.switch("blk", "vdpa:blk2")
            except BridgeError as error:
                said = str(error)
            assert node in said, said
            assert client.status("blk")[0].backend == "vdpa:blk1"
        load.settle()


def check_net_device_can_not_take_over_from_a_block_device() -> None:
    load = Load()
    with (
        block_device(),
        net_device(),
        serving(("blk", "vdpa:blk0")) as bridge,
        Frontend(bridge.socket) as frontend,
    ):
        arrive(frontend, load.driver, [0])
        load.driver.write_blocks(0, range(BLOCKS))
        load.submit(20)
        with control("blk") as client:
            reasons = client.switch("blk", "vdpa:net0", dry_run=True).reasons
        assert any("net device" in reason for reason in reasons), reasons
        load.settle()
