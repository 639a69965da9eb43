"""``make demo``: an unmodified vhost-user client drives a kernel vDPA device through the bridge.

Boots the test virtual machine, creates a ``vdpa_sim_blk`` device, serves it, lets libblkio write
and read back checksummed pseudo-random data through the vhost-user socket, and says what went
where and how fast. Then it suspends, saves and resumes the device under a client's load, and moves
one from vhost-vdpa to vhost-user and back. The last line says whether the data matched; the exit
status too.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
import textwrap
import time
from typing import Any

from tests.peers.build import build_peer
from tests.rig.job import CommandFailed, Job
from tests.rig.product import build_wheel
from tests.rig.vm import Vm
from tests.vm.checks import GuestChecks

SOCKET = "/run/demo.sock"
SIZE = 16 << 20
MIB = 1 << 20

PICTURE = """
  blkio_verify (libblkio)                 unmodified vhost-user front-end
     |  {socket}                  control messages only
     v
  vhost-bridge serve                      pid {pid}
     |  ioctls and IOTLB updates on {node}
     v
  vdpa_sim_blk "{name}"                   Linux {kernel}, 128 MiB RAM disk
     ^
     '--- requests and data: kick/call eventfds and shared memory, client <-> kernel
"""


def client(vm: Vm, binary: str, mode: str, *options: str) -> dict[str, Any]:
    """Run one mode of the client through the bridge; its line of JSON."""
    argv = [binary, "virtio-blk-vhost-user", SOCKET, mode, *options]
    done = vm.run(argv, timeout=300)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def processor_seconds(vm: Vm, pid: int) -> float:
    """User and system time that a process in the guest has used."""
    fields = vm.run(["cat", f"/proc/{pid}/stat"]).stdout.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def serve(vm: Vm) -> tuple[Job, int]:
    """Start the bridge in the guest; the job and its pid there."""
    uri = "vdpa:demo0"
    job = vm.start(
        ["vhost-bridge", "serve", "--name", "demo", "--listen", SOCKET, "--backend", uri],
        memlock=True,
    )
    job.wait_for_output("serving", 60)
    assert job.pid is not None
    return job, job.pid


def verified_io(vm: Vm, binary: str, pid: int) -> None:
    """Write, read back and measure, telling what happens."""
    amount = ("--size", str(SIZE), "--seed", "2026")
    print(f"writing {SIZE // MIB} MiB of checksummed blocks, then reading every one back ...")
    began = time.monotonic()
    client(vm, binary, "fill", *amount, "--per-request", "16", "--depth", "16")
    filled = client(vm, binary, "verify", *amount, "--per-request", "16")
    seconds = time.monotonic() - began
    print(f"  {filled['verified']} blocks verified, {2 * SIZE / MIB / seconds:.0f} MiB/s in all")
    print("random writes and verified reads, 16 requests at a time ...")
    before = processor_seconds(vm, pid)
    mixed = client(
        vm, binary, "write-read", *amount, "--generation", "2", "--depth", "16", "--seconds", "5"
    )
    used = processor_seconds(vm, pid) - before
    print(
        f"  {mixed['reads'] + mixed['writes']} requests, {mixed['iops']:.0f} per second, "
        f"mean latency {mixed['mean_ns'] / 1e6:.1f} ms, {mixed['verified']} blocks verified"
    )
    print(f"  the bridge used {used:.2f} s of processor time meanwhile, all of it for set-up")


def suspended_io(vm: Vm, binary: str) -> None:
    """Suspend, look, save and resume under verified load."""
    print("random writes and verified reads again, suspending the device meanwhile ...")
    amount = ("--size", str(SIZE), "--seed", "2027", "--depth", "16", "--seconds", "9")
    load = vm.start([binary, "virtio-blk-vhost-user", SOCKET, "write-read", *amount])
    load.wait_for_output("running", 60)
    for command in (
        "vhost-bridge suspend demo",
        "vhost-bridge status demo",
        "vhost-bridge save demo /tmp/demo.state",
        "vhost-bridge state show /tmp/demo.state",
        "vhost-bridge resume demo",
    ):
        print(f"  $ {command}")
        print(textwrap.indent(vm.run(command.split()).stdout.rstrip(), "    "))
    result = json.loads(load.wait(60).stdout.splitlines()[-1])
    print(f"  {result['verified']} blocks verified; the client saw a pause and nothing else")


CROSSINGS = {
    "state_crosses_from_vdpa_to_vhost_user": "vhost-vdpa (VDUSE) to vhost-user",
    "state_crosses_from_vhost_user_to_vdpa": "vhost-user to vhost-vdpa (VDUSE)",
}


def crossing(vm: Vm) -> None:
    """Save on one transport and load on the other, with requests waiting."""
    checks = GuestChecks(vm, {"checks_model": list(CROSSINGS)})
    print("a driver with 20 requests waiting moves, both devices having the same disk ...")
    for check, what in CROSSINGS.items():
        checks.require("checks_model", check)
        print(f"  {what}: all 20 done once, 40 blocks verified")


def main() -> int:
    binary = build_peer("blkio_verify")
    with Vm(wheel=build_wheel()) as vm:
        shutil.copy2(binary, vm.share_host / "blkio_verify")
        vm.run("vdpa dev add name demo0 mgmtdev vdpasim_blk")
        job, pid = serve(vm)
        node = vm.run("ls /sys/bus/vdpa/devices/demo0 | grep vhost-vdpa").stdout.strip()
        kernel = vm.run("uname -r").stdout.strip()
        picture = {"socket": SOCKET, "pid": pid, "node": f"/dev/{node}", "name": "demo0"}
        print(PICTURE.format(kernel=kernel, **picture))
        try:
            verified_io(vm, f"{vm.share_guest}/blkio_verify", pid)
            suspended_io(vm, f"{vm.share_guest}/blkio_verify")
            crossing(vm)
        except (CommandFailed, AssertionError) as error:
            print(error)
            print(job.output().stderr)
            print("DATA MISMATCH or failed I/O: see above")
            return 1
        job.kill(signal.SIGTERM)
        job.wait(30)
        print("the bridge's log:")
        print("".join(f"  {line}\n" for line in job.output().stderr.splitlines()), end="")
    print("data matched: every block read back through the bridge is the one written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
