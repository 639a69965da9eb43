"""Suspend, resume, save and load on the kernel's simulators, and states that cross transports."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

from vhostbridge.backends.fds import OwnedFd
from vhostbridge.bridge.control_client import ControlClient

from . import libblkio
from .blk import IN, OUT, BlockDriver, Request, content
from .devices import block_device, net_device, serving, simulator_options, wait_until
from .frontend import Frontend
from .libblkio import USER
from .memory import Memory
from .net import NetDriver, vhost_user_echo
from .vduse import vduse_block, vhost_user_block
from .vring import SplitRing

MIB = 1 << 20
ROUNDS = 500 if os.environ.get("VHOST_BRIDGE_SOAK") else 50
STATE = Path("/tmp/model.state")


@contextlib.contextmanager
def control(name: str) -> Iterator[ControlClient]:
    with ControlClient(Path(f"/run/vhost-bridge/{name}.sock")) as client:
        yield client


def suspend(name: str) -> None:
    with control(name) as client:
        assert client.operate("Suspend", name) == "suspended"


def resume(name: str) -> None:
    with control(name) as client:
        assert client.operate("Resume", name) == "running"


def save(name: str) -> None:
    """Write the state of a suspended bridge to STATE."""
    STATE.unlink(missing_ok=True)
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    with OwnedFd(os.open(STATE, flags, 0o600)) as file, control(name) as client:
        assert client.save(name, file, lambda count: None) == STATE.stat().st_size


# Suspend and resume


def check_libblkio_suspended_at_any_moment() -> None:
    """Under a verified random load; while suspended the vring's indices agree and stand still."""
    chance = random.Random(31)
    state = Path("/tmp/model.history")
    state.unlink(missing_ok=True)
    options = {"size": 4 * MIB, "depth": 16, "state": state, "seed": 3}
    with block_device(), serving(("blk", "vdpa:blk0")) as bridge:
        libblkio.run(USER, bridge.socket, "fill", **options)
        client = libblkio.start(USER, bridge.socket, "write-read", seconds=900, **options)
        with control("blk") as asked:
            wait_until(lambda: asked.status("blk")[0].state == "running")
        for _ in range(ROUNDS):
            time.sleep(chance.uniform(0, 0.02))
            suspend("blk")
            with control("blk") as asked:
                first, second = asked.status("blk")[0], asked.status("blk")[0]
            assert first.vrings[0].base == first.vrings[0].used, first
            assert first.vrings[0].problem == "", first
            assert first.vrings[0].used == second.vrings[0].used
            resume("blk")
        assert client.poll() is None, client.communicate()[0]
        libblkio.kill(client)
        libblkio.run(USER, bridge.socket, "verify", **options)


def check_numbered_frames_over_suspends() -> None:
    with net_device(), serving(("net", "vdpa:net0")) as bridge:
        driver = NetDriver(Memory(4 * MIB))
        with Frontend(bridge.socket) as frontend:
            frontend.negotiate()
            frontend.set_memory([driver.memory])
            frontend.start(driver.rings)
            for _ in range(ROUNDS):
                driver.send_numbered(7)
                suspend("net")
                driver.send_numbered(5)
                with control("net") as asked:
                    before = asked.status("net")[0].vrings
                    assert asked.status("net")[0].vrings == before
                resume("net")
                driver.receive(driver.sent)
            driver.check()


def check_requests_of_a_suspended_device_wait() -> None:
    """They are done when it goes on; each once, and announced."""
    with (
        block_device(),
        serving(("blk", "vdpa:blk0")) as bridge,
        running(bridge.socket) as (_, driver),
    ):
        driver.write_blocks("before", range(20))
        suspend("blk")
        for block in range(20):
            driver.submit(Request(OUT, block * 8, content("after", block)))
        time.sleep(0.1)
        assert driver.take() == []
        resume("blk")
        driver.run(())
        driver.check_blocks("after", range(20))


def check_a_stop_of_the_front_end_while_suspended() -> None:
    with (
        block_device(),
        serving(("blk", "vdpa:blk0")) as bridge,
        running(bridge.socket) as (frontend, driver),
    ):
        driver.write_blocks("x", range(30))
        suspend("blk")
        base = frontend.stop_ring(0)
        assert base == driver.ring.used_index
        frontend.set_status(0)
        frontend.start([driver.ring], [base])
        driver.submit(Request(IN, 0, size=4096))
        time.sleep(0.1)
        assert driver.take() == []
        resume("blk")
        driver.run(())
        driver.check_blocks("x", range(30))


# Save and load


@contextlib.contextmanager
def running(path: str) -> Iterator[tuple[Frontend, BlockDriver]]:
    with Frontend(path) as frontend:
        driver = BlockDriver(SplitRing(Memory()))
        frontend.negotiate()
        frontend.config(0, 8)
        frontend.set_memory([driver.ring.memory])
        frontend.start([driver.ring])
        yield frontend, driver


def arrive(frontend: Frontend, driver: BlockDriver | NetDriver, bases: list[int]) -> None:
    """Bring a driver that goes on where it was."""
    rings = driver.rings if isinstance(driver, NetDriver) else [driver.ring]
    frontend.negotiate()
    frontend.set_memory([rings[0].memory])
    frontend.start(rings, bases)


def leave_in_the_middle(name: str, path: str) -> BlockDriver:
    """A driver with requests that its device has not seen yet; its state is in STATE."""
    with running(path) as (_, driver):
        driver.write_blocks("first", range(40))
        suspend(name)
        for block in range(20):
            driver.submit(Request(OUT, block * 8, content("second", block)))
        save(name)
    return driver


def go_on(path: str, driver: BlockDriver) -> None:
    """All that waited is done, once, and all data is right."""
    with Frontend(path) as frontend:
        arrive(frontend, driver, [driver.ring.used_index])
        driver.run(())
        driver.check_blocks("second", range(20))
        driver.check_blocks("first", range(20, 40))


def check_state_moves_to_another_device_on_the_same_store() -> None:
    with (
        simulator_options("", block="shared_backend=1"),
        block_device("blk1"),
        block_device("blk2"),
    ):
        with serving(("one", "vdpa:blk1")) as bridge:
            driver = leave_in_the_middle("one", bridge.socket)
        with serving(("two", "vdpa:blk2"), more=["--incoming", str(STATE)]) as bridge:
            go_on(bridge.socket, driver)


def check_frames_go_on_in_another_device() -> None:
    driver = NetDriver(Memory(4 * MIB))
    with net_device("net1"), net_device("net2"):
        with serving(("one", "vdpa:net1")) as bridge, Frontend(bridge.socket) as frontend:
            arrive(frontend, driver, [0, 0])
            driver.exchange(200)
            suspend("one")
            driver.send_numbered(9)
            save("one")
        with (
            serving(("two", "vdpa:net2"), more=["--incoming", str(STATE)]) as bridge,
            Frontend(bridge.socket) as frontend,
        ):
            arrive(frontend, driver, [driver.rx.used_index, driver.tx.used_index])
            driver.receive(driver.sent)
            driver.exchange(200)
            driver.check()


def check_state_crosses_from_vdpa_to_vhost_user() -> None:
    with vduse_block() as device:
        with serving(("vdpa", "vdpa:vd0")) as bridge:
            driver = leave_in_the_middle("vdpa", bridge.socket)
        with (
            vhost_user_block(device.file) as socket,
            serving(("user", f"vhost-user:{socket}"), more=["--incoming", str(STATE)]) as bridge,
        ):
            go_on(bridge.socket, driver)


def check_state_crosses_from_vhost_user_to_vdpa() -> None:
    with vduse_block() as device:
        with (
            vhost_user_block(device.file) as socket,
            serving(("user", f"vhost-user:{socket}")) as bridge,
        ):
            driver = leave_in_the_middle("user", bridge.socket)
        with serving(("vdpa", "vdpa:vd0"), more=["--incoming", str(STATE)]) as bridge:
            go_on(bridge.socket, driver)


def check_frames_cross_from_vdpa_to_vhost_user_and_back() -> None:
    driver = NetDriver(Memory(4 * MIB))
    incoming = ["--incoming", str(STATE), "--type", "net"]

    def exchange(name: str, path: str) -> None:
        with Frontend(path) as frontend:
            arrive(frontend, driver, [driver.rx.used_index, driver.tx.used_index])
            driver.receive(driver.sent, 60)
            driver.exchange(100, window=16)
            suspend(name)
            driver.send_numbered(9)
            save(name)

    with net_device(), vhost_user_echo() as socket:
        with serving(("first", "vdpa:net0")) as bridge:
            exchange("first", bridge.socket)
        with serving(("second", f"vhost-user:{socket}"), more=incoming) as bridge:
            exchange("second", bridge.socket)
        with serving(("third", "vdpa:net0"), more=incoming[:2]) as bridge:
            exchange("third", bridge.socket)
    with (
        net_device(),
        serving(("last", "vdpa:net0"), more=incoming[:2]) as bridge,
        Frontend(bridge.socket) as frontend,
    ):
        arrive(frontend, driver, [driver.rx.used_index, driver.tx.used_index])
        driver.receive(driver.sent)
    driver.check()


def check_state_is_there_after_the_front_end_stopped() -> None:
    """QEMU asks after GET_VRING_BASE and status 0; two saves are the same."""
    with (
        simulator_options("", block="shared_backend=1"),
        block_device("blk1"),
        block_device("blk2"),
    ):
        with serving(("one", "vdpa:blk1")) as bridge, running(bridge.socket) as (frontend, driver):
            driver.write_blocks("first", range(40))
            for block in range(20):
                driver.submit(Request(OUT, block * 8, content("second", block)))
            driver.run(())
            frontend.stop_ring(0)
            frontend.set_status(0)
            save("one")
            first = STATE.read_bytes()
            save("one")
            assert STATE.read_bytes() == first
        with serving(("two", "vdpa:blk2"), more=["--incoming", str(STATE)]) as bridge:
            go_on(bridge.socket, driver)


def check_what_was_loaded_is_saved_again_as_it_was() -> None:
    """Features above all: the second migration of a device works as the first."""
    with block_device():
        with serving(("one", "vdpa:blk0")) as bridge:
            driver = leave_in_the_middle("one", bridge.socket)
        first = STATE.read_bytes()
        with serving(("two", "vdpa:blk0"), more=["--incoming", str(STATE)]):
            save("two")
        assert STATE.read_bytes() == first
        with (
            serving(("two", "vdpa:blk0"), more=["--incoming", str(STATE)]) as bridge,
            Frontend(bridge.socket) as frontend,
        ):
            arrive(frontend, driver, [driver.ring.used_index])
            suspend("two")
            save("two")
        assert len(STATE.read_bytes()) == len(first)


def check_front_end_that_is_elsewhere_is_refused_with_both_values() -> None:
    with block_device(), serving(("one", "vdpa:blk0")) as bridge:
        driver = leave_in_the_middle("one", bridge.socket)
    with (
        block_device(),
        serving(("two", "vdpa:blk0"), more=["--incoming", str(STATE)]) as bridge,
    ):
        with contextlib.suppress(Exception), Frontend(bridge.socket) as frontend:
            arrive(frontend, driver, [7])
        bridge.wait_for("vring 0 has base 0x7 where the state has 0x28")
        # The state was not used up.
        with Frontend(bridge.socket) as frontend:
            arrive(frontend, driver, [driver.ring.used_index])
            driver.run(())


def check_state_of_another_type_is_refused() -> None:
    with block_device(), serving(("one", "vdpa:blk0")) as bridge:
        leave_in_the_middle("one", bridge.socket)
    with net_device(), serving(("net", "vdpa:net0")), control("net") as client:
        with OwnedFd(os.open(STATE, os.O_RDONLY | os.O_CLOEXEC)) as file:
            _, reasons = client.load("net", file, lambda count: None, dry_run=True)
        assert "the state is of a block device, the device is a net device" in reasons, reasons
