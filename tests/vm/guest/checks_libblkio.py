"""libblkio, the bridge and the kernel's vdpa_sim_blk: a front-end that is not ours."""

from __future__ import annotations

from . import libblkio
from .devices import block_device, serving
from .libblkio import USER, VDPA
from .vduse import vduse_block

MIB = 1 << 20


def check_random_writes_and_reads() -> None:
    with block_device(), serving(("blk", "vdpa:blk0")) as bridge:
        result = libblkio.run(
            USER, bridge.socket, "write-read", size=16 * MIB, depth=16, seed=7, flush_every=50
        )
        assert result["writes"] > 0 and result["verified"] > 0, result


def check_what_the_bridge_wrote_is_on_the_device() -> None:
    """Filled through the bridge, verified by libblkio on /dev/vhost-vdpa-N itself; and back."""
    options = {"size": 8 * MIB, "depth": 16, "seed": 8}
    with block_device() as node:
        with serving(("blk", "vdpa:blk0")) as bridge:
            libblkio.run(USER, bridge.socket, "fill", generation=5, **options)
        libblkio.run(VDPA, node, "verify", generation=5, **options)
        libblkio.run(VDPA, node, "fill", generation=6, **options)
        with serving(("blk", "vdpa:blk0")) as bridge:
            libblkio.run(USER, bridge.socket, "verify", generation=6, **options)


def check_shadow_vrings() -> None:
    """Filled and verified through them; what they wrote is on the device itself."""
    options = {"size": 8 * MIB, "depth": 16, "seed": 10}
    with block_device() as node:
        with serving(("blk", "vdpa:blk0"), more=["--shadow"]) as bridge:
            libblkio.run(USER, bridge.socket, "fill", generation=2, **options)
            libblkio.run(USER, bridge.socket, "verify", generation=2, **options)
            libblkio.run(USER, bridge.socket, "write-read", size=16 * MIB, per_request=32, depth=4)
        with serving(("blk", "vdpa:blk0"), more=["--shadow"]) as bridge:
            libblkio.run(USER, bridge.socket, "fill", generation=3, **options)
        libblkio.run(VDPA, node, "verify", generation=3, **options)


def check_large_requests() -> None:
    with block_device(), serving(("blk", "vdpa:blk0")) as bridge:
        options = {"size": 16 * MIB, "per_request": 32, "depth": 4}
        libblkio.run(USER, bridge.socket, "write-read", **options)


def check_capacity_and_limits() -> None:
    with block_device() as node, serving(("blk", "vdpa:blk0")) as bridge:
        bridged = libblkio.run(USER, bridge.socket, "info")
    with block_device() as node:
        direct = libblkio.run(VDPA, node, "info")
    assert bridged["capacity"] == direct["capacity"] == 128 * MIB, (bridged, direct)


def check_shadow_vrings_over_vduse() -> None:
    """A device without RESUME."""
    with (
        vduse_block() as device,
        serving(("vd", "vdpa:vd0"), more=["--shadow"]) as bridge,
    ):
        options = {"size": 8 * MIB, "depth": 16, "seed": 11}
        libblkio.run(USER, bridge.socket, "fill", generation=4, **options)
        libblkio.run("file", str(device.file), "verify", generation=4, **options)


def check_file_behind_vduse() -> None:
    with vduse_block() as device, serving(("vd", "vdpa:vd0")) as bridge:
        options = {"size": 8 * MIB, "depth": 16, "seed": 9}
        libblkio.run(USER, bridge.socket, "fill", generation=3, **options)
        libblkio.run("file", str(device.file), "verify", generation=3, **options)
        libblkio.run(USER, bridge.socket, "write-read", **options)
