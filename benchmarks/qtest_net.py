"""In the virtual machine: frames through QEMU's virtio-net without an operating system in it.

What a guest's driver would do is done here: accesses to registers over QEMU's "qtest" socket, and
the rest in the guest's memory, which is shared. The machine's processor stands still, or, with
KVM (``guest_pace``), exchanges the frames itself: then kicks go from it to an eventfd, past QEMU.
Behind is vdpa_sim_net, which gives back every frame that is sent. ``benchmarks.svq`` runs it.
"""

from __future__ import annotations

import itertools
import json
import mmap
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

SIZE = 64 << 20
RING = 256
BASE = 16 << 20
FRAME = bytes(12) + b"\xff" * 6 + bytes.fromhex("525400112233") + b"\x88\xb5" + bytes(range(46))
# virtio-mmio (virtio 1.3, section 4.2.2)
MMIO, STEP, COUNT = 0xFEB00000, 0x200, 24
DEVICE_ID, DRIVER_FEATURES, FEATURES_SELECT = 0x08, 0x20, 0x24
QUEUE, QUEUE_SIZE, READY, NOTIFY, STATUS = 0x30, 0x38, 0x44, 0x50, 0x70
AREAS = (0x80, 0x90, 0xA0)
NET = 1
# Firmware: where an x86 processor begins, 16 bytes before the end, it clears interrupts and halts.
HALT = bytes(0xFFF0) + b"\xfa\xf4\xeb\xfc" + bytes(12)
# What exchange.S is told, and tells.
GO, DEPTH, ROUNDS, POSTED, DEVICE = range(0x1000, 0x1014, 4)


class Qemu:
    """QEMU with one network device; ``netdev`` is its back-end, as QEMU's options have it.

    With ``program``, which is in place of the firmware, the processor runs, with KVM.
    """

    def __init__(
        self,
        name: str,
        netdev: list[str],
        *,
        incoming: bool = False,
        program: Path | None = None,
    ) -> None:
        self.memory_file = Path(f"/dev/shm/{name}")
        firmware = program or self.memory_file.with_suffix(".rom")
        if program is None:
            firmware.write_bytes(HALT)
        accelerator = "tcg" if program is None else "kvm"
        self._socket, test = socket.socketpair()
        self._monitor_socket, monitor = socket.socketpair()
        argv = [
            *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none"),
            *("-machine", "microvm,memory-backend=mem", "-accel", accelerator),
            *("-m", str(SIZE >> 20)),
            *(
                "-object",
                f"memory-backend-file,id=mem,size={SIZE},share=on,mem-path={self.memory_file}",
            ),
            *("-bios", str(firmware), "-global", "virtio-mmio.force-legacy=false"),
            *("-chardev", f"socket,id=test,fd={test.fileno()}", "-qtest", "chardev:test"),
            *("-qtest-log", "none"),
            *("-chardev", f"socket,id=monitor,fd={monitor.fileno()}"),
            *("-mon", "chardev=monitor,mode=control", *netdev),
            *("-device", "virtio-net-device,netdev=net,mrg_rxbuf=off"),
            *(("-incoming", "defer") if incoming else ()),
        ]
        with test, monitor:
            self.process = subprocess.Popen(argv, pass_fds=[test.fileno(), monitor.fileno()])
        self._lines = self._socket.makefile("rb")
        self._monitor = self._monitor_socket.makefile("rw")
        self._monitor.readline()
        self.execute("qmp_capabilities")
        with self.memory_file.open("r+b") as file:
            self.memory = mmap.mmap(file.fileno(), SIZE)
        self._device = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.memory_file.unlink()

    def execute(self, command: str, **arguments: object) -> Any:
        """A monitor command's result."""
        self._monitor.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._monitor.flush()
        while line := self._monitor.readline():
            answer = json.loads(line)
            if "error" in answer:
                raise RuntimeError(answer["error"])
            if "return" in answer:
                return answer["return"]
        raise RuntimeError("QEMU ended")

    def _ask(self, command: str) -> str:
        self._socket.sendall(command.encode() + b"\n")
        while (line := self._lines.readline().decode()).startswith("IRQ"):
            continue
        if not line.startswith("OK"):
            raise RuntimeError(f"{command}: {line or 'QEMU ended'}")
        return line[2:].strip()

    def read(self, register: int, device: int | None = None) -> int:
        """A register of the device."""
        place = MMIO + STEP * (self._device if device is None else device)
        return int(self._ask(f"readl {place + register:#x}"), 16)

    def write(self, register: int, value: int) -> None:
        """Change a register of the device."""
        self._ask(f"writel {self.registers + register:#x} {value:#x}")

    def write_memory(self, address: int, word: int) -> None:
        """Write 16 bits to the guest's memory so that a migration notices."""
        self._ask(f"writew {address:#x} {word:#x}")

    def find(self) -> None:
        """Find which of the machine's virtio devices is the network device."""
        self._device = next(n for n in range(COUNT) if self.read(DEVICE_ID, n) == NET)

    @property
    def registers(self) -> int:
        """Where those of the device begin."""
        return MMIO + STEP * self._device


class Driver:
    """Sends frames and takes them back; ring 0 receives, ring 1 sends."""

    def __init__(self, qemu: Qemu) -> None:
        self._qemu = qemu
        self._memory = qemu.memory
        self._posted = 0

    def start(self) -> None:
        """Set the device up and start it."""
        qemu = self._qemu
        qemu.find()
        for status in (0, 1, 3):
            qemu.write(STATUS, status)
        for word, bits in ((0, 0), (1, 1)):  # VERSION_1 and no more
            qemu.write(FEATURES_SELECT, word)
            qemu.write(DRIVER_FEATURES, bits)
        qemu.write(STATUS, 11)
        for ring in (0, 1):
            self._fill(ring)
            qemu.write(QUEUE, ring)
            qemu.write(QUEUE_SIZE, RING)
            for area, register in enumerate(AREAS):
                qemu.write(register, self._area(ring, area))
                qemu.write(register + 4, 0)
            qemu.write(READY, 1)
        qemu.write(STATUS, 15)
        self._give(0, RING)
        time.sleep(1)  # what is sent before the device has room to receive is lost

    # Descriptors, available ring and used ring lie a page each.
    def _area(self, ring: int, area: int) -> int:
        return BASE + ring * 0x4000 + area * 0x1000

    def _fill(self, ring: int) -> None:
        buffers = BASE + (ring + 1) * 0x100000
        for n in range(RING):
            at, size = buffers + n * 2048, len(FRAME) if ring else 2048
            entry = struct.pack("<QIHH", at, size, 0 if ring else 2, 0)
            place = self._area(ring, 0) + n * 16
            self._memory[place : place + 16] = entry
            if ring:
                self._memory[at : at + size] = FRAME
        order = struct.pack(f"<{RING}H", *range(RING))
        place = self._area(ring, 1)
        self._memory[place : place + 4 + len(order)] = bytes((1, 0, 0, 0)) + order

    def _give(self, ring: int, index: int) -> None:
        self._qemu.write_memory(self._area(ring, 1) + 2, index & 0xFFFF)
        self._qemu.write(NOTIFY, ring)

    def exchange(self, count: int) -> None:
        """Send frames, half a ring at most, and wait until all of them have come back."""
        before, self._posted = self._posted, (self._posted + count) & 0xFFFF
        # All places to receive are given, so that there is room whichever ring is looked at first.
        self._give(0, before + RING)
        self._give(1, self._posted)
        memory, done = self._memory, self._posted.to_bytes(2, "little")
        places = [self._area(ring, 2) + 2 for ring in (0, 1)]
        deadline = time.monotonic() + 20
        while any(memory[place : place + 2] != done for place in places):
            if time.monotonic() > deadline:
                raise RuntimeError("frames are missing")
            os.sched_yield()

    @property
    def posted(self) -> int:
        """How many frames were sent, modulo 65536."""
        return self._posted

    @posted.setter
    def posted(self, count: int) -> None:
        self._posted = count & 0xFFFF

    def check(self) -> None:
        """The frame that came last is what was sent."""
        at = BASE + 0x100000 + (self._posted - 1) % RING * 2048 + 12
        assert self._memory[at : at + len(FRAME) - 12] == FRAME[12:]


def processor_seconds(pid: int) -> float:
    """User and system time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def pace(netdev: list[str], pids: list[int], depth: int, seconds: float) -> dict[str, Any]:
    """Frames a second, and processor time a frame of QEMU and of the processes ``pids``.

    ``took`` is how many seconds each exchange of ``depth`` frames took.
    """
    with Qemu("pace", netdev) as qemu:
        driver = Driver(qemu)
        driver.start()
        for _ in range(5):
            driver.exchange(depth)
        watched = [qemu.process.pid, *pids]
        before = sum(map(processor_seconds, watched))
        times = [time.monotonic()]
        while times[-1] < times[0] + seconds:
            driver.exchange(depth)
            times.append(time.monotonic())
        used = sum(map(processor_seconds, watched)) - before
        driver.check()
        qemu.execute("quit")
        qemu.process.wait(20)
    took = [round(end - start, 6) for start, end in itertools.pairwise(times)]
    frames = len(took) * depth
    return {"pace": frames / sum(took), "processor": used / frames, "took": took}


def guest_pace(netdev: list[str], depth: int, seconds: float, program: str) -> float:
    """Frames a second that a guest exchanges by itself, ``depth`` at once."""

    def word(at: int, value: int | None = None) -> int:
        if value is not None:
            struct.pack_into("<I", qemu.memory, at, value)
        return int(struct.unpack_from("<I", qemu.memory, at)[0])

    with Qemu("pace", netdev, program=Path(program)) as qemu:
        driver = Driver(qemu)
        driver.start()
        driver.exchange(depth)
        for at, value in ((DEPTH, depth), (POSTED, driver.posted), (DEVICE, qemu.registers)):
            word(at, value)
        word(GO, 1)
        time.sleep(0.5)
        began, before = time.monotonic(), word(ROUNDS)
        time.sleep(seconds)
        rounds, took = word(ROUNDS) - before, time.monotonic() - began
        word(GO, 0)
        time.sleep(0.5)
        driver.posted = word(POSTED)
        driver.check()
        qemu.execute("quit")
        qemu.process.wait(20)
    return rounds * depth / took


def downtime(source: list[str], destination: list[str]) -> float:
    """Milliseconds that QEMU reports for a migration of the device in use."""
    with Qemu("source", source) as here, Qemu("destination", destination, incoming=True) as there:
        driver = Driver(here)
        driver.start()
        driver.exchange(128)
        there.execute("migrate-incoming", uri="unix:/run/migration.sock")
        here.execute("migrate", uri="unix:/run/migration.sock")
        while (told := here.execute("query-migrate"))["status"] not in ("completed", "failed"):
            time.sleep(0.02)
        if told["status"] != "completed":
            raise RuntimeError(told)
        return float(told["downtime"])


def main() -> None:
    what, *arguments = map(json.loads, sys.argv[1:])
    parts: dict[str, Callable[..., Any]] = {
        "pace": pace,
        "guest_pace": guest_pace,
        "downtime": downtime,
    }
    print(json.dumps(parts[what](*arguments)))


if __name__ == "__main__":
    main()
