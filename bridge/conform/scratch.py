"""The part of a disk that ``--write`` may write to: kept in a file, and put back at the end."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from .bench import Bench
from .block import BLOCK, BlockDriver, BlockPlan, Check
from .outcome import Breach


class Scratch:
    """The disk's own content of the scratch area.

    It is in a file from before the first write until it is back on the disk and was read there.
    """

    def __init__(self, plan: BlockPlan) -> None:
        self._plan = plan
        self.file: Path | None = None

    @property
    def start(self) -> int:
        """First sector of the area."""
        return self._plan.scratch_blocks[0]

    async def keep(self, bench: Bench) -> None:
        """Copy the area from the disk into the file; from then on it may be written.

        Raises:
            Breach: it can't be read. Nothing was written.
        """
        await bench.start()
        blocks = await self._read(bench)
        fd, name = tempfile.mkstemp(prefix="vhost-bridge-conform-", suffix=".scratch")
        with os.fdopen(fd, "wb") as file:
            file.write(b"".join(blocks[sector] for sector in self._plan.scratch_blocks))
            file.flush()
            os.fsync(file.fileno())
        self.file = Path(name)
        await bench.reset()

    async def put_back(self, bench: Bench) -> None:
        """Write the area as it was, look that it is, and remove the file.

        Raises:
            Breach: the disk does not take it; the file stays.
        """
        if self.file is None:
            return
        kept = self.file.read_bytes()
        sectors = self._plan.scratch_blocks
        original = {s: kept[i * BLOCK : (i + 1) * BLOCK] for i, s in enumerate(sectors)}
        await bench.start()
        driver = _driver(bench)
        for sector in sectors:
            if not driver.write(sector, original[sector], _need_success(sector)):
                await _done(bench)
                driver.write(sector, original[sector], _need_success(sector))
        await _done(bench)
        driver.flush()
        await _done(bench)
        if await self._read(bench) != original:
            raise Breach("the scratch area does not hold what was written back")
        await bench.reset()
        self.file.unlink()
        self.file = None

    async def _read(self, bench: Bench) -> dict[int, bytes]:
        driver, blocks = _driver(bench), dict[int, bytes]()

        def keep(sector: int) -> Check:
            def check(status: int, data: bytes) -> None:
                _need_success(sector)(status, data)
                blocks[sector] = data

            return check

        for sector in self._plan.scratch_blocks:
            if not driver.read(sector, keep(sector)):
                await _done(bench)
                driver.read(sector, keep(sector))
        await _done(bench)
        return blocks


def _driver(bench: Bench) -> BlockDriver:
    assert isinstance(bench.driver, BlockDriver)
    return bench.driver


async def _done(bench: Bench) -> None:
    bench.kick()
    await bench.complete()


def _need_success(sector: int) -> Check:
    def check(status: int, data: bytes) -> None:
        if status:
            raise Breach(f"sector {sector} of the scratch area: status {status}")

    return check
