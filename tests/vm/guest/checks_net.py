"""A net front-end, the bridge and the kernel's vdpa_sim_net, which echoes broadcasts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from .devices import BridgeProcess, net_device, serving
from .frontend import ALL, REPLY_ACK, STATUS, Frontend
from .memory import Memory
from .net import OURS, RX, TX, NetDriver


@contextlib.contextmanager
def bridged() -> Iterator[BridgeProcess]:
    with net_device(), serving(("net", "vdpa:net0")) as bridge:
        yield bridge


@contextlib.contextmanager
def running(protocol: int = ALL, *, size: int = 256) -> Iterator[tuple[Frontend, NetDriver]]:
    with bridged() as bridge, Frontend(bridge.socket) as frontend:
        driver = NetDriver(Memory(), size=size)
        frontend.negotiate(protocol=protocol)
        frontend.set_memory([driver.memory])
        frontend.start(driver.rings)
        yield frontend, driver


def check_frames_come_back_whole_and_in_order() -> None:
    with running() as (_, driver):
        driver.exchange(10000)
        driver.check()


def check_small_rings() -> None:
    with running(size=4) as (_, driver):
        driver.exchange(200, window=4)
        driver.check()


def check_without_status_and_acknowledgements() -> None:
    with running(ALL & ~(STATUS | REPLY_ACK)) as (_, driver):
        driver.exchange(300)
        driver.check()


def check_vrings_that_ran_elsewhere_begin_at_their_available_index() -> None:
    """cloud-hypervisor says so after a migration, although receive buffers wait before it."""
    driver = NetDriver(Memory())
    with bridged() as bridge:
        for _ in range(3):
            with Frontend(bridge.socket) as frontend:
                frontend.negotiate(protocol=ALL & ~STATUS)
                frontend.set_memory([driver.memory])
                frontend.start(driver.rings, [ring.avail_index for ring in driver.rings])
                driver.exchange(300)
    driver.check()


def check_vrings_enabled_before_features_and_memory() -> None:
    """QEMU's net front-end does that."""
    with bridged() as bridge, Frontend(bridge.socket) as frontend:
        driver = NetDriver(Memory())
        frontend.negotiate()
        frontend.enable(RX)
        frontend.enable(TX)
        frontend.tell_u64("SET_FEATURES", frontend.features)
        frontend.set_memory([driver.memory])
        for index, ring in enumerate(driver.rings):
            frontend.set_ring(index, ring)
        frontend.set_status(0xF)
        driver.exchange(300)
        driver.check()


def check_mac_and_queue_pairs_reach_the_front_end() -> None:
    with bridged() as bridge, Frontend(bridge.socket) as frontend:
        frontend.negotiate()
        assert frontend.config(0, 6) == OURS
        assert frontend.ask_u64("GET_QUEUE_NUM") == 1


def check_bases_are_what_was_processed() -> None:
    with running() as (frontend, driver):
        driver.exchange(333)
        assert frontend.stop_ring(TX) == 333
        assert frontend.stop_ring(RX) == 333
        assert driver.rx.avail_index == 333 + 256
        assert (driver.rx.used_index, driver.tx.used_index) == (333, 333)


def check_both_vrings_go_on_where_they_stopped() -> None:
    with running() as (frontend, driver):
        for _ in range(5):
            driver.exchange(50)
            bases = [frontend.stop_ring(index) for index in (RX, TX)]
            assert bases == [driver.sent, driver.sent]
            frontend.set_status(0)
            for ring in driver.rings:
                ring.new_eventfds()
            frontend.start(driver.rings, bases)
        driver.exchange(50)
        driver.check()


def check_one_vring_alone_is_stopped_and_started() -> None:
    with running() as (frontend, driver):
        driver.exchange(40)
        base = frontend.stop_ring(TX)
        assert base == 40
        driver.send_numbered(10)
        assert frontend.ask_u64("GET_FEATURES")
        assert driver.tx.used_index == 40
        assert len(driver.received) == 40 and not driver.rx.take_used()
        frontend.set_ring(TX, driver.tx, base=base)
        driver.receive(50)
        driver.exchange(40)
        driver.check()


def check_receive_vring_alone_is_stopped_and_started() -> None:
    with running() as (frontend, driver):
        driver.exchange(40)
        base = frontend.stop_ring(RX)
        assert base == 40
        driver.rx.new_eventfds()
        frontend.set_ring(RX, driver.rx, base=base)
        driver.exchange(40)
        driver.check()


def check_index_wraps_at_65536() -> None:
    with bridged() as bridge, Frontend(bridge.socket) as frontend:
        driver = NetDriver(Memory(), start=0xFFF0)
        frontend.negotiate()
        frontend.set_memory([driver.memory])
        frontend.start(driver.rings, [0xFFF0, 0xFFF0])
        driver.exchange(100)
        driver.check()
        assert frontend.stop_ring(TX) == (0xFFF0 + 100) & 0xFFFF


def check_disabled_vring_takes_nothing_until_enabled() -> None:
    with running() as (frontend, driver):
        driver.exchange(20)
        frontend.enable(TX, False)
        driver.send_numbered(20)
        assert frontend.ask_u64("GET_FEATURES")
        assert driver.tx.used_index == 20
        frontend.enable(TX)
        driver.receive(40)
        driver.exchange(20)
        driver.check()


def check_new_eventfds_while_running() -> None:
    with running() as (frontend, driver):
        for _ in range(10):
            driver.exchange(20)
            for index, ring in enumerate(driver.rings):
                ring.new_eventfds()
                frontend.tell("SET_VRING_CALL", index.to_bytes(8, "little"), [ring.call_fd])
                frontend.tell("SET_VRING_KICK", index.to_bytes(8, "little"), [ring.kick_fd])
        driver.check()


def check_reset_device_and_start_again() -> None:
    with running() as (frontend, driver):
        driver.exchange(20)
        driver.check()
        frontend.tell("RESET_DEVICE")
        again = NetDriver(Memory(guest=0x9000_0000))
        frontend.set_memory([again.memory])
        frontend.start(again.rings)
        again.exchange(20)
        again.check()


def check_front_end_that_leaves_and_comes_again() -> None:
    with bridged() as bridge:
        for _ in range(5):
            with Frontend(bridge.socket) as frontend:
                driver = NetDriver(Memory())
                frontend.negotiate()
                frontend.set_memory([driver.memory])
                frontend.start(driver.rings)
                driver.exchange(30)
                driver.check()
