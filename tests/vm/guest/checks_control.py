"""The control vring of network devices: what the bridge tells a device whose front-end can't.

vdpa_sim_net has one queue pair, and one command; vdpa_sim_net_mq is that simulator with more of
both (tests/rig/vdpa_sim_net_mq.patch), and writes each command to the kernel's log.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from .checks_migration import Log
from .checks_model import control, resume, suspend
from .checks_switch import switch
from .devices import BridgeProcess, net_device, serving, sh, vdpa_device
from .frontend import ALL, LOG_SHMFD, STATUS, VERSION_1, Frontend, HungUp, Refused
from .memory import Memory
from .net import OURS, NetDriver, frame

CTRL_VQ, MQ = 1 << 17, 1 << 22
MIB = 1 << 20
PARAMETERS = Path("/sys/module/vdpa_sim_net_mq/parameters")
OTHER = bytes.fromhex("525400aabbcc")
PROMISC = "000001"


@contextlib.contextmanager
def mq_device(*names: str) -> Iterator[None]:
    """Devices with four queue pairs."""
    sh("modprobe vdpa_sim_net_mq pairs=4")
    try:
        with contextlib.ExitStack() as stack:
            for name in names or ("net0",):
                mac = ("mac", "52:54:00:11:22:33")
                stack.enter_context(vdpa_device(name, "vdpasim_net_mq", *mac))
            sh("dmesg -C")
            yield
    finally:
        sh("modprobe -r vdpa_sim_net_mq")


@contextlib.contextmanager
def parameter(name: str, value: str) -> Iterator[None]:
    file = PARAMETERS / name
    before = file.read_text()
    file.write_text(value)
    try:
        yield
    finally:
        file.write_text(before)


def commands(name: str = "net0") -> list[str]:
    """The commands that a device got since it was asked last, in hexadecimal digits.

    A bridge that starts in the middle of a set-up, when its front-end is slow, starts again.
    """
    return re.findall(rf"control {name} ([0-9a-f]+)", sh("dmesg -c"))


def pairs_command(pairs: int) -> str:
    return f"0400{pairs:02x}00"


class Pairs:
    """Queue pairs of one driver."""

    def __init__(self, count: int, *, size: int = 64) -> None:
        self.memory = Memory(4 * MIB)
        self.drivers = [NetDriver(self.memory, size=size) for _ in range(count)]
        self.rings = [ring for driver in self.drivers for ring in driver.rings]

    def arrive(self, frontend: Frontend, features: int = MQ, enabled: int = 8) -> None:
        """Set everything up; the first vrings are enabled."""
        frontend.negotiate(VERSION_1 | features, frontend.protocol or ALL)
        frontend.set_memory([self.memory])
        for index, ring in enumerate(self.rings):
            frontend.set_ring(index, ring)
            frontend.enable(index, index < enabled)
        frontend.set_status(0xF)

    def exchange(self, count: int, pairs: Sequence[int] | None = None) -> None:
        for number, driver in enumerate(self.drivers):
            if pairs is None or number in pairs:
                driver.exchange(count, window=20)

    def check(self) -> None:
        for driver in self.drivers:
            driver.check()


@contextlib.contextmanager
def bridged(count: int = 4, *more: str) -> Iterator[tuple[BridgeProcess, Frontend, Pairs]]:
    with (
        mq_device(),
        serving(("net", "vdpa:net0"), more=more) as bridge,
        Frontend(bridge.socket) as frontend,
    ):
        yield bridge, frontend, Pairs(count)


def facts() -> dict[str, str]:
    """What the bridge says of the control vring."""
    with control("net") as client:
        return dict(client.status("net")[0].control)


def check_several_queue_pairs() -> None:
    with bridged() as (_, frontend, pairs):
        frontend.negotiate(VERSION_1 | MQ)
        assert frontend.ask_u64("GET_QUEUE_NUM") == 4
        pairs.arrive(frontend)
        pairs.exchange(500)
        pairs.check()
        assert commands()[-2:] == [pairs_command(4), PROMISC]


def check_control_vring_that_is_negotiated_and_kept_back() -> None:
    """cloud-hypervisor's guest has a control vring that the device does not see."""
    with bridged(2) as (_, frontend, pairs):
        frontend.negotiate(VERSION_1 | MQ | CTRL_VQ, ALL & ~STATUS)
        assert frontend.ask_u64("GET_QUEUE_NUM") == 9
        pairs.arrive(frontend, MQ | CTRL_VQ)
        pairs.exchange(500)
        pairs.check()
        assert commands()[-2:] == [pairs_command(2), PROMISC]
        assert facts()["driver"] == "bridge"


def check_queue_pairs_follow_what_is_enabled() -> None:
    with bridged() as (_, frontend, pairs):
        pairs.arrive(frontend, enabled=2)
        assert commands()[-2:] == [pairs_command(1), PROMISC]
        pairs.exchange(20, [0])
        for index in (2, 3):
            frontend.enable(index)
        assert commands() == [pairs_command(2)]
        pairs.exchange(20, [0, 1])
        for index in (4, 5, 6, 7):
            frontend.enable(index)
        assert commands() == [pairs_command(3), pairs_command(4)]
        pairs.exchange(20)
        for index in (7, 6, 5, 4):
            frontend.enable(index, False)
        assert commands() == [pairs_command(3), pairs_command(2)]
        pairs.exchange(20, [0, 1])
        pairs.check()


def check_frames_for_others_come_too() -> None:
    """The front-end filters; a device that did would hide frames from it."""
    with bridged(1) as (_, frontend, pairs):
        pairs.arrive(frontend, 0, 2)
        assert set(commands()) == {PROMISC}
        (driver,) = pairs.drivers
        content = OTHER + frame(0)[6:]
        driver.send(content)
        driver.receive(1)
        assert driver.received == [content]


def check_queue_pairs_over_suspends() -> None:
    """The device is resumed and remembers, or is restarted and told again; nothing is lost."""
    with bridged() as (_, frontend, pairs):
        pairs.arrive(frontend)
        assert commands()[-2:] == [pairs_command(4), PROMISC]
        for _ in range(10):
            for driver in pairs.drivers:
                driver.send_numbered(5)
            suspend("net")
            for driver in pairs.drivers:
                driver.send_numbered(5)
            resume("net")
            for driver in pairs.drivers:
                driver.receive(driver.sent)
        assert commands() == []
        bases = [frontend.stop_ring(index) for index in range(8)]
        frontend.set_status(0)
        for index, ring in enumerate(pairs.rings):
            ring.new_eventfds()
            frontend.set_ring(index, ring, base=bases[index])
        frontend.set_status(0xF)
        pairs.exchange(20)
        pairs.check()


def check_queue_pairs_in_shadow() -> None:
    """The dirty log comes and goes: each time the device is told anew, before frames pass."""
    with bridged() as (_, frontend, pairs):
        frontend.protocol = ALL | LOG_SHMFD
        pairs.arrive(frontend)
        assert commands()[-2:] == [pairs_command(4), PROMISC]
        log = Log(pairs.memory)
        frontend.log_to(log.fd, log.size)
        for _ in range(5):
            frontend.log_writes(True)
            pairs.exchange(30)
            assert log.take()
            frontend.log_writes(False)
            pairs.exchange(30)
        pairs.check()
        assert commands() == [pairs_command(4), PROMISC] * 10


def check_queue_pairs_between_devices() -> None:
    with (
        mq_device("net1", "net2"),
        serving(("net", "vdpa:net1")) as bridge,
        Frontend(bridge.socket) as frontend,
    ):
        pairs = Pairs(4)
        pairs.arrive(frontend)
        for number in range(4):
            for driver in pairs.drivers:
                driver.send_numbered(9)
            switch("net", ["vdpa:net2", "vdpa:net1"][number % 2])
            for driver in pairs.drivers:
                driver.receive(driver.sent)
        pairs.check()
        seen = sh("dmesg -c")
        for name in ("net1", "net2"):
            assert re.findall(rf"control {name} (0400....)", seen)[-1] == pairs_command(4)


def check_address_that_is_configured() -> None:
    """By the device of Linux itself: it has the command for that, and no other."""
    with (
        net_device(),
        serving(("net", "vdpa:net0"), more=["--mac", "52:54:00:aa:bb:cc"]) as bridge,
        Frontend(bridge.socket) as frontend,
    ):
        pairs = Pairs(1)
        frontend.negotiate()
        assert frontend.config(0, 6) == OURS
        pairs.arrive(frontend, 0)
        assert frontend.config(0, 6) == OTHER
        assert "mac 52:54:00:aa:bb:cc" in sh("vdpa dev config show net0")
        counted = sh("vdpa dev vstats show net0 qidx 2")
        assert re.search(r"cvq requests ([1-9]) cvq successes \1 cvq errors 0", counted), counted
        (driver,) = pairs.drivers
        content = OTHER + frame(0)[6:]
        driver.send(content)
        driver.receive(1)
        assert driver.received == [content]
        assert facts() == {
            "driver": "bridge",
            "vring": "2",
            "lies": "apart from guest memory",
            "mac": "52:54:00:aa:bb:cc",
        }


def check_control_vring_is_apart_from_guest_memory() -> None:
    """Guest memory may lie at the same addresses, which one address space would not take."""
    with bridged() as (_, frontend, pairs):
        pairs.arrive(frontend)
        assert facts()["lies"] == "apart from guest memory"
        frontend.add_region(Memory(1 * MIB, guest=(1 << 45) - MIB, user=0x7D00_0000_0000))
        frontend.enable(7, False)
        assert commands()[-2:] == [pairs_command(4), PROMISC]
        frontend.enable(6, False)
        assert commands() == [pairs_command(3)]
        pairs.exchange(20, [0, 1, 2])


def check_control_vring_beside_guest_memory() -> None:
    """Without MQ this device has its control vring among the data vrings."""
    with bridged(1) as (_, frontend, pairs):
        pairs.arrive(frontend, 0, 2)
        assert facts() == {
            "driver": "bridge",
            "vring": "2",
            "lies": "beside guest memory",
            "rx": "promisc",
        }
        assert set(commands()) == {PROMISC}
        pairs.exchange(50)
        reaching = Memory(1 * MIB, guest=(1 << 45) - MIB, user=0x7D00_0000_0000)
        with contextlib.suppress(Refused):
            frontend.add_region(reaching)
            raise AssertionError("guest memory lies over the control vring")
        pairs.exchange(50)
        pairs.check()


def check_device_that_does_not_answer() -> None:
    """The start fails in bounded time and says why; the next front-end finds a device at work."""
    with mq_device(), serving(("net", "vdpa:net0")) as bridge:
        with parameter("mute", "1"), Frontend(bridge.socket) as frontend:
            began = time.monotonic()
            with contextlib.suppress(Refused, HungUp):
                Pairs(4).arrive(frontend)
                raise AssertionError("it was started")
            assert 4 < time.monotonic() - began < 15
            bridge.wait_for("did not answer the control command MQ VQ_PAIRS_SET within 5 s")
        with Frontend(bridge.socket) as frontend:
            pairs = Pairs(4)
            pairs.arrive(frontend)
            pairs.exchange(20)
            pairs.check()


def check_device_that_refuses_queue_pairs() -> None:
    with bridged() as (bridge, frontend, pairs):
        pairs.arrive(frontend, enabled=2)
        with parameter("pairs", "1"), contextlib.suppress(Refused):
            frontend.enable(2)
            raise AssertionError("the device refused, and the front-end does not know")
        assert "refused to use 2 queue pairs" in bridge.text()
        pairs.exchange(20, [0])
        frontend.enable(2)
        frontend.enable(3)
        pairs.exchange(20, [0, 1])
        pairs.check()
