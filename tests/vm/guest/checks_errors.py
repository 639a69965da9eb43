"""What a person is told when a target can't be had: the exact text, and that the hint helps."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from .blk import BlockDriver
from .devices import block_device, net_device, serving, sh, spawn, wait_until
from .frontend import ALL, REPLY_ACK, Frontend, HungUp, Refused
from .memory import Memory
from .vring import SplitRing


def refusal(backend: str) -> tuple[int, str]:
    """Exit status and words of a bridge that can't start."""
    bridge = spawn(["serve", "--name", "x", "--listen", "/tmp/x.sock", "--backend", backend])
    status = bridge.wait()
    assert not os.path.exists("/tmp/x.sock"), "the socket was left there"
    return status, bridge.text()


def serves(backend: str) -> None:
    """A bridge to that back-end starts and runs."""
    with serving(("x", backend)) as bridge, Frontend(bridge.socket) as frontend:
        frontend.negotiate()


def check_no_device_at_all() -> None:
    assert refusal("vdpa:blk7") == (
        1,
        "vhost-bridge: no vDPA device blk7\n"
        "  hint: there is none: `vdpa dev add name NAME mgmtdev MGMTDEV` creates one\n",
    )


def check_no_such_device_names_those_that_are() -> None:
    with block_device("blk1") as node, block_device("blk2") as other:
        text = f"  hint: there are: blk1 ({node}), blk2 ({other})\n"
        for wanted in ("blk7", "/dev/vhost-vdpa-99"):
            assert refusal(f"vdpa:{wanted}") == (
                1,
                f"vhost-bridge: no vDPA device {wanted}\n{text}",
            )


def check_path_that_is_no_device() -> None:
    assert refusal("vdpa:/etc/passwd")[1].startswith(
        "vhost-bridge: /etc/passwd is no character device\n"
    )


def check_busy_device_names_process_and_command() -> None:
    with block_device() as node, serving(("first", "vdpa:blk0")) as first:
        status, text = refusal("vdpa:blk0")
        command = Path(f"/proc/{first.pid}/cmdline").read_text().replace("\0", " ").strip()
        assert status == 1
        assert text.startswith(f"vhost-bridge: {node} is busy: held by "), text
        assert str(first.pid) in text and command.split()[0] in text, (text, command)
        assert "hint: a vhost-vdpa device has one user at a time: stop that one first" in text


def check_no_permission() -> None:
    with block_device() as node:
        argv = ["serve", "--name", "x", "--listen", "/tmp/x.sock", "--backend", "vdpa:blk0"]
        nobody = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
        done = subprocess.run(
            [*nobody, "vhost-bridge", *argv], capture_output=True, text=True, check=False
        )
        name = Path(node).name
        assert (done.returncode, done.stderr) == (
            1,
            f"vhost-bridge: no permission to open {node}\n"
            f"  hint: run as root, or let this user in: chown or a udev rule for {name}\n",
        )


@contextlib.contextmanager
def taken_by_virtio(name: str) -> Iterator[None]:
    """The device bound to virtio_vdpa, as an administrator would bind it."""
    sh(
        f"modprobe -a virtio_net virtio_vdpa; cd /sys/bus/vdpa; "
        f"echo virtio_vdpa >devices/{name}/driver_override; "
        f"echo {name} >drivers/vhost_vdpa/unbind; echo {name} >drivers_probe"
    )
    try:
        yield
    finally:
        sh("modprobe -r virtio_vdpa")


def check_device_of_virtio_vdpa_says_how_to_rebind_it() -> None:
    """The commands of the hint are run, and then it works."""
    with net_device(), taken_by_virtio("net0"):
        interfaces = "/sys/bus/vdpa/devices/net0/virtio*/net"
        wait_until(lambda: sh(f"ls {interfaces} 2>/dev/null || true"))
        (interface,) = sh(f"ls {interfaces}").split()
        status, text = refusal("vdpa:net0")
        words, hint = text.split("\n  hint: ")
        assert (status, words) == (
            1,
            "vhost-bridge: net0 has no character device: the driver virtio_vdpa has it, as "
            f"{interface} of this host",
        )
        assert hint == (
            "modprobe vhost_vdpa; "
            "echo vhost_vdpa > /sys/bus/vdpa/devices/net0/driver_override; "
            "echo net0 > /sys/bus/vdpa/drivers/virtio_vdpa/unbind; "
            "echo net0 > /sys/bus/vdpa/drivers_probe\n"
        )
        sh(hint)
        serves("vdpa:net0")


def check_device_without_driver_says_how_to_bind_it() -> None:
    with net_device():
        sh("echo net0 > /sys/bus/vdpa/drivers/vhost_vdpa/unbind")
        text = refusal("vdpa:net0")[1]
        assert text.startswith("vhost-bridge: net0 has no character device: no driver has it\n")
        sh(text.split("if that is not enough: ")[1])
        serves("vdpa:net0")


def check_node_that_is_missing_says_how_to_make_it() -> None:
    with block_device() as node:
        Path(node).unlink()
        text = refusal("vdpa:blk0")[1]
        assert text.startswith(f"vhost-bridge: blk0: {node} is missing\n"), text
        sh(text[text.index("mknod") :].split(";")[0])
        serves("vdpa:blk0")
        Path(node).unlink()  # the kernel removes only nodes that it has made


def check_device_that_was_deleted() -> None:
    with block_device() as node:
        serves(f"vdpa:{node}")
    for target in ("blk0", node):
        assert refusal(f"vdpa:{target}")[1].startswith(f"vhost-bridge: no vDPA device {target}\n")


def check_device_can_be_deleted_once_the_bridge_has_ended() -> None:
    with block_device(), serving(("x", "vdpa:blk0")):
        pass


def check_kernel_without_vdpa() -> None:
    sh("modprobe -r vhost_vdpa vdpa_sim_net vdpa_sim_blk && modprobe -r vdpa_sim vduse vdpa")
    try:
        assert refusal("vdpa:blk0") == (
            1,
            "vhost-bridge: no vDPA device blk0: this kernel has no vDPA\n"
            "  hint: modprobe -a vdpa vhost_vdpa\n",
        )
    finally:
        sh("modprobe vhost_vdpa && modprobe -a vdpa_sim_net vdpa_sim_blk vduse")


# What a front-end may ask that the device can't


def check_vring_above_the_devices_maximum() -> None:
    with block_device(), serving(("x", "vdpa:blk0")) as bridge, Frontend(bridge.socket) as frontend:
        frontend.negotiate()
        try:
            frontend.tell_state("SET_VRING_NUM", 0, 512)
        except Refused:
            pass
        else:
            raise AssertionError("512 entries were accepted")
        bridge.wait_for(
            "refused SET_VRING_NUM: vring 0 wants 512 entries, vdpa:blk0 has 256 at most "
            "(lower the queue size of the front-end (queue-size=))"
        )
        driver = BlockDriver(SplitRing(Memory()))
        frontend.set_memory([driver.ring.memory])
        frontend.start([driver.ring])
        driver.write_blocks("then", range(3))


def check_vring_that_the_device_has_not() -> None:
    with block_device(), serving(("x", "vdpa:blk0")) as bridge, Frontend(bridge.socket) as frontend:
        frontend.negotiate()
        with contextlib.suppress(Refused):
            frontend.tell_state("SET_VRING_NUM", 1, 64)
            raise AssertionError("vring 1 was accepted")
        bridge.wait_for("vring 1 is beyond the 1 vrings of vdpa:blk0")


def check_guest_memory_that_is_not_shared() -> None:
    """A region comes without a descriptor: the answer names QEMU's option."""
    with block_device(), serving(("x", "vdpa:blk0")) as bridge:
        words = "give the guest shared memory: memory-backend-memfd,share=on"
        with Frontend(bridge.socket) as frontend:
            frontend.negotiate()
            memory = Memory()
            with contextlib.suppress(Refused):
                frontend.tell("ADD_MEM_REG", bytes(8) + _region(memory))
                raise AssertionError("memory without a descriptor was accepted")
            bridge.wait_for(f"came without a file descriptor ({words})")
        with Frontend(bridge.socket) as frontend:
            frontend.negotiate(protocol=ALL & ~REPLY_ACK)
            frontend.tell("SET_MEM_TABLE", b"\1" + bytes(7) + _region(memory))
            frontend.wait_hang_up()
            bridge.wait_for(f"SET_MEM_TABLE has 1 regions and 0 file descriptors ({words})")
        _recovers(bridge.socket)


def check_file_too_short_for_its_region() -> None:
    with block_device(), serving(("x", "vdpa:blk0")) as bridge:
        with Frontend(bridge.socket) as frontend:
            frontend.negotiate()
            memory = Memory()
            memory.size *= 2
            with contextlib.suppress(Refused):
                frontend.set_memory([memory])
                raise AssertionError("a region longer than its file was accepted")
            bridge.wait_for("needs 8388608 bytes of its file, which has 4194304")
        _recovers(bridge.socket)


def check_ring_outside_guest_memory() -> None:
    with block_device(), serving(("x", "vdpa:blk0")) as bridge:
        with Frontend(bridge.socket) as frontend:
            memory, other = Memory(), Memory(user=0x7000_0000_0000)
            frontend.negotiate()
            frontend.set_memory([memory])
            with contextlib.suppress(Refused):
                frontend.set_ring(0, SplitRing(other))
                raise AssertionError("a ring that is nowhere was accepted")
            bridge.wait_for(f"the descriptor area of vring 0 at user address {other.user:#x}")
        _recovers(bridge.socket)


def check_features_that_were_not_offered() -> None:
    with block_device(), serving(("x", "vdpa:blk0")) as bridge:
        with Frontend(bridge.socket) as frontend:
            offered = frontend.ask_u64("GET_FEATURES")
            assert not offered & 1 << 33, "ACCESS_PLATFORM is the bridge's own business"
            frontend.tell_u64("SET_FEATURES", offered | 1 << 34)
            frontend.wait_hang_up()
            bridge.wait_for("the front-end wants features that vdpa:blk0 was not offering")
        _recovers(bridge.socket)


def _region(memory: Memory) -> bytes:
    return b"".join(
        value.to_bytes(8, "little") for value in (memory.guest, memory.size, memory.user, 0)
    )


def _recovers(path: str) -> None:
    # The next front-end is served as if nothing had been.
    deadline = time.monotonic() + 10
    while True:
        with Frontend(path) as frontend:
            try:
                driver = BlockDriver(SplitRing(Memory()))
                frontend.negotiate()
                frontend.set_memory([driver.ring.memory])
                frontend.start([driver.ring])
                driver.write_blocks("next", range(3))
            except HungUp:
                if time.monotonic() > deadline:
                    raise
            else:
                return
