"""The rig itself: what the other tests in the virtual machine rely on."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator

import pytest

from tests.rig.job import CommandFailed, CommandTimeout, VmLost
from tests.rig.kernel import MODULES
from tests.rig.vm import Vm


def test_modules_are_loaded(vm: Vm) -> None:
    """vhost-vdpa, VDUSE and the kernel's own simulators are there once the machine is up."""
    loaded = {line.split()[0] for line in vm.run("cat /proc/modules").stdout.splitlines()}
    assert {"vhost_vdpa", "vduse", *MODULES} - {"vdpa_sim_net_mq"} <= loaded


def test_management_devices_are_listed(vm: Vm) -> None:
    """Both simulators and VDUSE can be asked for devices."""
    shown = json.loads(vm.run(["vdpa", "-j", "mgmtdev", "show"]).stdout)
    assert set(shown["mgmtdev"]) == {"vdpasim_net", "vdpasim_blk", "vduse"}


def test_simulator_gets_a_vhost_vdpa_node(vm: Vm) -> None:
    """A device that is added binds to vhost-vdpa, and its node can be opened."""
    vm.run("vdpa dev add name rig0 mgmtdev vdpasim_blk")
    try:
        vm.run("exec 3<>/dev/$(basename /sys/bus/vdpa/devices/rig0/vhost-vdpa-*)")
    finally:
        vm.run("vdpa dev del rig0")


def test_status_and_both_outputs_come_back_exactly(vm: Vm) -> None:
    """Status, stdout and stderr are the command's, byte for byte."""
    done = vm.run(r"printf 'a\000\377\n'; printf 'ü\n\n' >&2; exit 7", check=False)
    assert (done.returncode, done.stdout_bytes, done.stderr) == (7, b"a\0\xff\n", "ü\n\n")


def test_long_output_is_whole(vm: Vm) -> None:
    """Output far over any buffer comes whole and in order."""
    done = vm.run(["seq", "200000"])
    assert done.stdout == "".join(f"{number}\n" for number in range(1, 200001))


def test_signal_is_a_negative_status(vm: Vm) -> None:
    """A command that a signal ended says which."""
    assert vm.run("kill -TERM $$", check=False).returncode == -signal.SIGTERM


def test_failure_quotes_both_outputs(vm: Vm) -> None:
    """With check, a failure raises, and its text has what the command said."""
    with pytest.raises(CommandFailed, match=r"(?s)ended with 3.*said out.*said err"):
        vm.run("echo said out; echo said err >&2; exit 3")


def test_program_that_is_missing_is_a_failed_command(vm: Vm) -> None:
    """A program that the guest doesn't have is status 127 with its name."""
    done = vm.run(["no-such-program"], check=False)
    assert done.returncode == 127
    assert "no-such-program" in done.stderr


def test_environment_and_memlock_reach_the_command(vm: Vm) -> None:
    """Variables are passed; the limit of locked memory is lifted only when asked for."""
    assert vm.run("echo $GIVEN; ulimit -l", env={"GIVEN": "it is"}).stdout == "it is\n8192\n"
    assert vm.run("ulimit -l", memlock=True).stdout == "unlimited\n"


def test_command_over_its_deadline_is_killed_and_the_machine_goes_on(vm: Vm) -> None:
    """The whole process group dies; what it had said is told; the next command runs."""
    with pytest.raises(CommandTimeout, match=r"(?s)deadline of 1 s.*before"):
        vm.run("echo before; sleep 1234 & sleep 1234", timeout=1)
    assert vm.run(["pgrep", "-f", "sleep 1234"], check=False).returncode == 1


def test_background_command_is_watched_and_signalled(vm: Vm) -> None:
    """A started command is seen to run, to write, and to end by the signal it is sent."""
    job = vm.start("trap 'echo caught; exit 5' TERM; echo waiting; while :; do sleep 0.1; done")
    assert "waiting\n" in job.wait_for_output("waiting").stdout
    assert job.poll() is None
    job.kill(signal.SIGTERM)
    done = job.wait(timeout=20)
    assert (done.returncode, done.stdout.split()) == (5, ["waiting", "caught"])


def test_files_go_in_and_out_byte_for_byte(vm: Vm) -> None:
    """A file from the host is the same in the guest, and one from the guest on the host."""
    data = os.urandom(3 << 20)
    (vm.share_host / "in").write_bytes(data)
    digest = vm.run(f"sha256sum {vm.share_guest}/in").stdout.split()[0]
    assert digest == hashlib.sha256(data).hexdigest()
    vm.run(f"cd {vm.share_guest} && cat in in >out")
    assert (vm.share_host / "out").read_bytes() == data + data


def test_file_changed_on_the_host_is_seen_at_once(vm: Vm) -> None:
    """Nothing of the share is cached in the guest."""
    for text in ("first", "second, longer", "3rd"):
        (vm.share_host / "changing").write_text(text)
        assert vm.run(f"cat {vm.share_guest}/changing").stdout == text


def test_trivial_command_is_quick(vm: Vm) -> None:
    """A command costs well under a second, so that tests may use many."""
    began = time.monotonic()
    for _ in range(10):
        vm.run(["true"])
    assert (time.monotonic() - began) / 10 < 0.5


def test_product_can_be_imported(vm: Vm) -> None:
    """The wheel and all that it depends on are there, the extension included."""
    vm.run(["python3", "-c", "import vhostbridge.native, trio, click, pyroute2"])


@pytest.fixture
def own_vm() -> Iterator[Vm]:
    """A virtual machine to lose; what it leaves for its user to read is removed."""
    with Vm(memory_mib=512, cpus=1) as machine:
        yield machine
    shutil.rmtree(machine.folder, ignore_errors=True)


def test_dead_guest_is_a_lost_machine_with_its_console(own_vm: Vm) -> None:
    """A kernel that panics ends the machine at once, and the error has the console's words."""
    with pytest.raises(VmLost, match="sysrq triggered crash") as lost:
        own_vm.run("echo c >/proc/sysrq-trigger", timeout=60)
    assert str(own_vm.console_log) in str(lost.value)
    assert own_vm.console_log.exists()


def test_silent_guest_is_a_lost_machine(own_vm: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest that doesn't answer is ended, and that is told apart from a failed command."""
    monkeypatch.setattr("tests.rig.vm.ANSWER_SECONDS", 1.0)
    os.kill(own_vm.qemu_pid, signal.SIGSTOP)
    with pytest.raises(VmLost, match="doesn't answer"):
        own_vm.run(["true"])
    with pytest.raises(ProcessLookupError):
        os.kill(own_vm.qemu_pid, 0)
    with pytest.raises(VmLost):
        own_vm.run(["true"])
