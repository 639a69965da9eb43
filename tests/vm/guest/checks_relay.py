"""A front-end that passes its control vring through: every command goes by way of the bridge."""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections.abc import Iterator

from .checks_control import (
    MIB,
    MQ,
    OTHER,
    PROMISC,
    Pairs,
    commands,
    facts,
    mq_device,
    pairs_command,
    parameter,
)
from .checks_migration import Log
from .checks_model import STATE, resume, save, suspend
from .checks_switch import switch
from .devices import net_device, serving, sh, vdpa_device
from .frontend import ALL, LOG_SHMFD, VERSION_1, Frontend
from .memory import PAGE, Memory
from .net import OURS, NetDriver
from .vring import Buffer, SplitRing

MAC, CTRL_VQ, CTRL_RX, CTRL_VLAN, CTRL_MAC_ADDR = 1 << 5, 1 << 17, 1 << 18, 1 << 19, 1 << 23
PLAIN = MAC | CTRL_VQ | CTRL_MAC_ADDR
EVERY = PLAIN | CTRL_RX | CTRL_VLAN | MQ
OK, ERR = 0, 1
ROUNDS = 500 if os.environ.get("VHOST_BRIDGE_SOAK") else 20


class Guest:
    """A driver of a network device with a control vring."""

    def __init__(self, pairs: int, index: int) -> None:
        self.pairs = Pairs(pairs)
        # Apart from the others' pages, so that a dirty log tells them apart.
        self.memory = Memory(1 * MIB, guest=0x8000_0000, user=0x7D00_0000_0000)
        self.index = index
        self.ring = SplitRing(self.memory, 64)
        self._at = self.memory.take(64 * 256, PAGE)
        self.replies = self.memory.take(64, PAGE)
        self._heads: dict[int, int] = {}
        self._count = 0

    @property
    def everything(self) -> list[tuple[int, SplitRing]]:
        return [*enumerate(self.pairs.rings), (self.index, self.ring)]

    def arrive(
        self, frontend: Frontend, features: int, bases: dict[int, int] | None = None
    ) -> None:
        frontend.negotiate(VERSION_1 | features, frontend.protocol or ALL)
        frontend.set_memory([self.pairs.memory, self.memory])
        for index, ring in self.everything:
            frontend.set_ring(index, ring, base=(bases or {}).get(index, 0))
        for index, _ in self.everything:
            frontend.enable(index)
        frontend.set_status(0xF)

    def submit(self, command: bytes) -> None:
        slot = self._count % 64
        self._count += 1
        at = self._at + 256 * slot
        self.memory.map[at : at + len(command)] = command
        self.memory.map[self.replies + slot] = 0xEE
        chain = [
            Buffer(self.memory, at, 2),
            Buffer(self.memory, at + 2, len(command) - 2),
            Buffer(self.memory, self.replies + slot, 1, writable=True),
        ]
        self._heads[self.ring.add(chain)] = slot

    def acks(self, count: int, timeout: float = 20.0) -> list[int]:
        """Those of the next commands; a lost interrupt is a failure."""
        found: list[int] = []
        while len(found) < count:
            for head, _ in self.ring.wait_used(timeout):
                found.append(self.memory.map[self.replies + self._heads.pop(head)])
        return found

    def tell(self, command: bytes) -> int:
        self.submit(command)
        return self.acks(1)[0]


@contextlib.contextmanager
def guest_on(backend: str, *more: str, pairs: int = 1) -> Iterator[tuple[Frontend, Guest]]:
    """A guest with the control vring of the device behind it."""
    with serving(("net", backend), more=more) as bridge, Frontend(bridge.socket) as frontend:
        guest = Guest(pairs, 8 if pairs > 1 else 2)
        guest.arrive(frontend, EVERY if pairs > 1 else PLAIN)
        yield frontend, guest


def device_mac(name: str) -> str:
    return sh(f"vdpa dev config show {name}").split("mac ")[1][:17]


def check_address_set_by_the_guest() -> None:
    with net_device(), guest_on("vdpa:net0") as (frontend, guest):
        assert frontend.config(0, 6) == OURS
        assert guest.tell(b"\1\1" + OTHER) == OK
        assert frontend.config(0, 6) == OTHER
        assert device_mac("net0") == OTHER.hex(":")
        assert "cvq successes 1 " in sh("vdpa dev vstats show net0 qidx 2")
        guest.pairs.exchange(50)
        assert guest.tell(b"\0\0\1") == ERR  # CTRL_RX was not negotiated
        assert "cvq requests 1 " in sh("vdpa dev vstats show net0 qidx 2")
        known = facts()
        assert (known["driver"], known["mac"]) == ("guest", OTHER.hex(":"))
        assert known["lies"] == "apart from guest memory"
        guest.pairs.check()


def check_address_goes_along_in_a_saved_state() -> None:
    with net_device("net1"), vdpa_device("net2", "vdpasim_net", "mac", "52:54:00:00:00:02"):
        with guest_on("vdpa:net1") as (frontend, guest):
            guest.pairs.exchange(30)
            assert guest.tell(b"\1\1" + OTHER) == OK
            suspend("net")
            save("net")
            bases = {index: frontend.stop_ring(index) for index, _ in guest.everything}
        assert device_mac("net2") == "52:54:00:00:00:02"
        more = ["--incoming", str(STATE)]
        with (
            serving(("net", "vdpa:net2"), more=more) as bridge,
            Frontend(bridge.socket) as frontend,
        ):
            for _, ring in guest.everything:
                ring.new_eventfds()
            guest.arrive(frontend, PLAIN, bases)
            assert device_mac("net2") == OTHER.hex(":")
            guest.pairs.exchange(30)
            guest.pairs.check()
            assert guest.tell(b"\1\1" + OURS) == OK
            assert device_mac("net2") == OURS.hex(":")


TOLD = [
    b"\2\0\7\0",
    b"\0\1\1",
    b"\0\0\1",
    b"\4\0\2\0",
    b"\2\0\5\0",
    b"\1\0" + b"\1\0\0\0" + OTHER + b"\0\0\0\0",
    b"\2\1\7\0",
    b"\1\1" + OTHER,
]
AGAIN = [
    "0101" + OTHER.hex(),
    "0100" + "01000000" + OTHER.hex() + "00000000",
    pairs_command(2),
    PROMISC,
    "000101",
    "02000500",
]


def check_everything_is_told_again_at_a_switch() -> None:
    """In QEMU's order, each once, before the data vrings run."""
    with mq_device("net1", "net2"), guest_on("vdpa:net1", pairs=4) as (_, guest):
        assert [guest.tell(command) for command in TOLD] == [OK] * len(TOLD)
        assert commands("net1") == [command.hex() for command in TOLD]
        guest.pairs.exchange(20, [0, 1])
        for number in range(4):
            for driver in guest.pairs.drivers[:2]:
                driver.send_numbered(9)
            there = ["net2", "net1"][number % 2]
            switch("net", f"vdpa:{there}")
            assert commands(there) == AGAIN
            for driver in guest.pairs.drivers[:2]:
                driver.receive(driver.sent)
        guest.pairs.check()
        assert guest.tell(b"\0\0\0") == OK


def check_commands_suspended_at_any_moment() -> None:
    """The device gets each once, in their order."""
    chance = random.Random(61)
    sent = [b"\1\1" + b"\2\0" + n.to_bytes(4, "big") for n in range(1, 4 * ROUNDS)]
    with mq_device(), parameter("slow", "2"), guest_on("vdpa:net0", pairs=4) as (_, guest):
        assert guest.tell(b"\4\0\4\0") == OK
        assert commands() == [pairs_command(4)]
        answers: list[int] = []

        def drive() -> None:
            for at in range(0, len(sent), 3):
                for command in sent[at : at + 3]:
                    guest.submit(command)
                answers.extend(guest.acks(len(sent[at : at + 3])))

        thread = threading.Thread(target=drive)
        thread.start()
        rounds = 0
        while thread.is_alive():
            time.sleep(chance.uniform(0, 0.02))
            guest.pairs.drivers[3].send_numbered(3)
            suspend("net")
            resume("net")
            guest.pairs.drivers[3].receive(guest.pairs.drivers[3].sent)
            rounds += 1
        thread.join()
        assert answers == [OK] * len(sent) and rounds > 5
        assert commands() == [command.hex() for command in sent]
        guest.pairs.check()


def check_control_vring_in_shadow() -> None:
    """The dirty log comes and goes between commands; acks are in it."""
    with mq_device(), serving(("net", "vdpa:net0")) as bridge, Frontend(bridge.socket) as frontend:
        guest = Guest(2, 8)
        frontend.protocol = ALL | LOG_SHMFD
        guest.arrive(frontend, EVERY)
        log = Log(guest.memory)
        frontend.log_to(log.fd, log.size)
        for number in range(1, 6):
            pairs = 1 + number % 2
            frontend.log_writes(True)
            assert guest.tell(b"\4\0" + bytes((pairs, 0))) == OK
            guest.pairs.exchange(10, range(pairs))
            frontend.log_writes(False)
            marked = int.from_bytes(log.map[:], "little")
            log.map[:] = bytes(log.size)
            assert marked >> ((guest.memory.guest + guest.replies) // PAGE) & 1
            assert guest.tell(b"\1\1" + b"\2" + bytes((0, 0, 0, 0, number))) == OK
        assert device_mac("net0") == "02:00:00:00:00:05"
        guest.pairs.check()


def check_device_that_stops_answering_is_replaced() -> None:
    """The command that it did not do is done by the one that takes its place, after what was
    told before. Shadow vrings know what receive buffers it had."""
    with mq_device(), guest_on("vdpa:net0", "--shadow", pairs=2) as (_, guest):
        assert guest.tell(b"\1\1" + OTHER) == OK
        commands()
        with parameter("mute", "1"):
            guest.submit(b"\0\0\1")
            time.sleep(6)
        assert guest.acks(1, 30) == [OK]
        told = commands()
        assert told[-2:] == ["0101" + OTHER.hex(), PROMISC]
        guest.pairs.exchange(20, [0])


def check_driver_that_begins_anew() -> None:
    """After a reset of the guest nothing of its last driver is left."""
    with mq_device(), guest_on("vdpa:net0", pairs=2) as (frontend, guest):
        assert guest.tell(b"\4\0\2\0") == OK
        for index, _ in guest.everything:
            frontend.stop_ring(index)
        frontend.set_status(0)
        commands()
        again = Guest(2, 8)
        again.arrive(frontend, EVERY)
        assert again.tell(b"\0\0\1") == OK
        assert commands() == [PROMISC]
        again.pairs.exchange(10, [0])


def check_frames_with_a_driver_that_never_uses_its_control_vring() -> None:
    with net_device(), guest_on("vdpa:net0") as (_, guest):
        driver: NetDriver = guest.pairs.drivers[0]
        driver.exchange(500)
        driver.check()
