"""The product's VdpaDevice on the kernel's simulators: the contracts of Device by method."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import trio

from vhostbridge.backends.errors import BridgeError, PeerError, TargetError, Unsupported
from vhostbridge.backends.lifecycle import How, State
from vhostbridge.backends.vdpa.chardev import BackendFeature
from vhostbridge.backends.vdpa.device import VdpaDevice
from vhostbridge.backends.vdpa.opening import open_vdpa

from .blk import OUT, BlockDriver, Request, content
from .devices import block_device, net_device
from .memory import PAGE, Memory
from .net import NetDriver
from .vdpa_device import (
    VERSION_1,
    attempt,
    calls_of,
    expect,
    lend,
    on_block,
    opened,
    raises,
    region,
    regions,
    run,
    setup,
    started,
)
from .vring import SplitRing


def check_life() -> None:
    """The state after each operation, and that the device is free afterwards."""

    async def body(device: VdpaDevice) -> None:
        expect(device, State.RESET)
        driver = await started(device)
        expect(device, State.RUNNING)
        await device.suspend()
        await device.suspend()
        expect(device, State.SUSPENDED)
        await run(device, [driver.ring], base=None)
        expect(device, State.RUNNING)
        await device.reset()
        expect(device, State.RESET)
        await device.aclose()
        expect(device, State.CLOSED)
        await device.aclose()

    on_block(body)


def check_what_it_tells() -> None:
    async def body(device: VdpaDevice) -> None:
        info = device.info
        assert (info.device_id, info.features) == (2, 0x308007646)
        assert (info.vring_limit, info.queue_num, info.vring_size_max) == (1, 1, 256)
        assert (info.config_size, info.iova_first, info.iova_last) == (96, 0, 2**64 - 1)
        assert device.capabilities.suspend.how is How.NATIVE
        assert device.capabilities.resume.how is How.NATIVE

    on_block(body)


def check_suspended_device_does_nothing() -> None:
    """Kicks are kept; memory and configuration may change meanwhile without waking it."""

    async def body(device: VdpaDevice) -> None:
        driver = await started(device)
        driver.write_blocks("before", range(5))
        await device.suspend()
        driver.submit(Request(OUT, 8, content("while", 1)))
        with regions(driver.ring.memory, Memory(guest=0x1_0000_0000)) as table:
            await device.set_memory(table)
        await device.read_config(0, 8)
        await device.write_config(0, bytes(8), 0)
        assert driver.ring.used_index == 5
        assert await device.stop_vring(0) == 5
        await run(device, [driver.ring], base=None)
        assert [status for _, status, _ in driver.wait()] == [0]
        driver.check_blocks("while", [1])

    on_block(body)


def check_resume_is_the_kernels_and_writes_no_status() -> None:
    async def body(device: VdpaDevice) -> None:
        driver = await started(device)
        driver.write_blocks("a", range(3))
        calls = calls_of(device)
        calls.clear()
        await device.suspend()
        await run(device, [driver.ring], base=None)
        assert calls == [("suspend", ()), ("resume", ())]
        driver.check_blocks("a", range(3))

    on_block(body)


def check_without_resume_it_is_programmed_again() -> None:
    async def body(device: VdpaDevice) -> None:
        driver = await started(device)
        for turn in range(3):
            driver.write_blocks(turn, range(10))
            assert await device.stop_vring(0) == driver.ring.avail_index
            driver.submit(Request(OUT, 8 * 99, content(turn, 99)))
            await run(device, [driver.ring], base=None)
            driver.wait()
            driver.check_blocks(turn, [*range(10), 99])
        assert ("resume", ()) not in calls_of(device)

    on_block(body, BackendFeature.RESUME)


def check_without_suspend_requests_finish_and_it_is_reset() -> None:
    async def body(device: VdpaDevice) -> None:
        driver = await started(device)
        for turn in range(3):
            for block in range(60):
                driver.submit(Request(OUT, block * 8, content(turn, block)), kick=False)
            driver.ring.kick()
            base = await device.stop_vring(0)
            assert base == driver.ring.used_index
            await run(device, [driver.ring], base=None)
            while driver.pending:
                driver.wait()
            driver.check_blocks(turn, range(60))
        assert ("suspend", ()) not in calls_of(device)

    on_block(body, BackendFeature.SUSPEND | BackendFeature.RESUME)


def check_without_persistent_mappings() -> None:
    async def body(device: VdpaDevice) -> None:
        driver = await started(device)
        for turn in range(3):
            driver.write_blocks(turn, range(20))
            base = await device.stop_vring(0)
            await device.reset()
            await run(device, [driver.ring], base=base)
            driver.check_blocks(turn, range(20))

    on_block(body, BackendFeature.IOTLB_PERSIST)


def check_with_nothing_optional_at_all() -> None:
    """What most hardware and VDUSE look like."""

    async def body(device: VdpaDevice) -> None:
        assert device.capabilities.suspend.how is How.EMULATED
        driver = await started(device)
        for turn in range(3):
            driver.write_blocks(turn, range(20))
            await device.suspend()
            await run(device, [driver.ring], base=None)
            driver.check_blocks(turn, range(20))
        await device.set_enabled(0, False)
        await device.set_enabled(0, True)
        driver.check_blocks(2, range(20))

    on_block(body, ~BackendFeature.IOTLB_MSG_V2)


def check_other_base_restarts_the_device() -> None:
    """A base loaded into a suspended simulator would move one index only."""

    async def body(device: VdpaDevice) -> None:
        driver = await started(device)
        driver.write_blocks("old", range(30))
        await device.suspend()
        memory = driver.ring.memory
        memory.map[:] = bytes(memory.size)
        memory._next = 0
        again = BlockDriver(SplitRing(memory))
        again.ring.kick_fd, driver.ring.kick_fd = driver.ring.kick_fd, -1
        await run(device, [again.ring], base=0)
        again.check_blocks("old", range(30))
        assert await device.stop_vring(0) == 30

    on_block(body)


def check_enabling_while_running() -> None:
    async def body(device: VdpaDevice) -> None:
        driver = await started(device)
        await device.set_enabled(0, False)
        driver.submit(Request(OUT, 0, content("off", 0)))
        await device.read_config(0, 8)
        assert driver.ring.used_index == 0
        await device.set_enabled(0, True)
        driver.wait()
        driver.check_blocks("off", [0])

    on_block(body)


def check_call_and_kick_replaced_while_running() -> None:
    async def body(device: VdpaDevice) -> None:
        driver = await started(device)
        for turn in range(5):
            driver.ring.new_eventfds()
            for setter, fd in (
                (device.set_call, driver.ring.call_fd),
                (device.set_kick, driver.ring.kick_fd),
            ):
                await setter(0, lend(fd))
            driver.write_blocks(turn, range(4))
            driver.check_blocks(turn, range(4))

    on_block(body)


def check_every_vring_is_kicked_and_called_once() -> None:
    """A request offered while nobody listened is done; its interrupt is not lost either."""

    async def body(device: VdpaDevice) -> None:
        driver = BlockDriver(SplitRing(Memory()))
        driver.submit(Request(OUT, 8, content("early", 1)), kick=False)
        with regions(driver.ring.memory) as table:
            await device.set_memory(table)
        await run(device, [driver.ring])
        assert os.eventfd_read(driver.ring.call_fd) >= 1
        while driver.pending:
            driver.take()

    on_block(body)


def check_no_kick_is_refused() -> None:
    async def body(device: VdpaDevice) -> None:
        wanted = setup(SplitRing(Memory()))
        error = await attempt(device.run(VERSION_1, [replace(wanted, kick=None)]))
        raises(Unsupported, "vring 0 has no kick eventfd, and vhost-vdpa does not poll", error)

    on_block(body)


def check_vring_that_never_ran_has_no_base() -> None:
    async def body(device: VdpaDevice) -> None:
        await started(device)
        raises(BridgeError, "vring 5 was never started", await attempt(device.stop_vring(5)))

    on_block(body)


def check_configuration_is_padded_and_clipped() -> None:
    async def body(device: VdpaDevice) -> None:
        whole = await device.read_config(0, 256)
        assert whole[:8] == (0x40000).to_bytes(8, "little") and not any(whole[96:])
        assert await device.read_config(200, 10) == bytes(10)
        error = await attempt(device.write_config(90, bytes(10), 0))
        raises(Unsupported, "configuration bytes 90+10 lie beyond the device's 96", error)

    on_block(body)


def check_memory_that_cannot_be() -> None:
    """Each refusal leaves the memory that was in force."""

    async def body(device: VdpaDevice) -> None:
        driver = await started(device)
        memory, other = driver.ring.memory, Memory(guest=0x1_0000_0000)
        for wrong, kind, text in (
            (region(other, guest=0x1_0000_0800), PeerError, "is not aligned to 4096 bytes"),
            (region(other, guest=memory.guest + PAGE), PeerError, "overlaps the region before"),
            (region(other, size=other.size + PAGE), PeerError, "of its file, which has"),
        ):
            good = region(memory)
            raises(kind, text, await attempt(device.set_memory([good, wrong])))
            good.fd.close()
            wrong.fd.close()
            driver.write_blocks(text, range(3))
            driver.check_blocks(text, range(3))

    on_block(body)


def check_region_of_no_whole_pages() -> None:
    """libblkio shares its rings so: the rest of the last page is mapped too."""

    async def body(device: VdpaDevice) -> None:
        driver = BlockDriver(SplitRing(Memory(0x20_3B10)))
        with regions(driver.ring.memory) as table:
            await device.set_memory(table)
        await run(device, [driver.ring])
        driver.write_blocks("odd", range(40))
        driver.check_blocks("odd", range(40))

    on_block(body)


def check_memory_stays_over_reset() -> None:
    async def body(device: VdpaDevice) -> None:
        driver = await started(device)
        driver.write_blocks("kept", range(5))
        await device.reset()
        driver.ring.new_eventfds()
        await run(device, [driver.ring], base=driver.ring.avail_index)
        driver.check_blocks("kept", range(5))

    on_block(body)


def check_busy_device_names_its_holder() -> None:
    async def main() -> None:
        async with opened(node, BackendFeature(0)):
            try:
                async with open_vdpa("vdpa:it", Path(node)):
                    raise AssertionError("opened twice")
            except TargetError as error:
                text = str(error)
                assert f"{node} is busy: held by" in text and str(os.getpid()) in text, text

    with block_device() as node:
        trio.run(main)


def _on_net(without: BackendFeature) -> None:
    # Receive buffers that no frame has filled are not "in flight": stopping must not wait.
    async def main() -> None:
        async with opened(node, without) as device:
            driver = NetDriver(Memory())
            with regions(driver.memory) as table:
                await device.set_memory(table)
            assert device.info.queue_num == 1
            await run(device, driver.rings)
            for _ in range(4):
                driver.exchange(50)
                assert await device.stop_vring(1) == driver.sent
                assert await device.stop_vring(0) == driver.sent
                driver.send_numbered(20)
                await run(device, driver.rings, base=None)
                driver.receive(driver.sent)
            driver.check()

    with net_device() as node:
        trio.run(main)


def check_net_device_suspends_and_resumes() -> None:
    _on_net(BackendFeature(0))


def check_net_device_without_suspend() -> None:
    _on_net(~BackendFeature.IOTLB_MSG_V2)
