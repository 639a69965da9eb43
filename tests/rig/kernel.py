"""The vDPA simulators, built out of tree: Debian's kernels have vhost-vdpa but leave these out."""

from __future__ import annotations

from pathlib import Path

from .report import RigError

MODULES = ("vringh", "vdpa_sim", "vdpa_sim_net", "vdpa_sim_blk", "vdpa_sim_net_mq")
#: Makes the last one of the network device's simulator.
PATCH = Path(__file__).with_name("vdpa_sim_net_mq.patch")

# $1: the kernel's release; $2: the patch; the rest: the modules. The source, a big archive, is
# removed after. Where a device has more than three vrings, the last one is the control vring.
BUILD = """\
set -e
release=$1; patch=$2; shift 2
archive=$(ls /usr/src/linux-source-*.tar.xz)
build=/usr/src/vdpa-sim
mkdir -p $build
tar -xJf $archive -C $build --no-anchored --wildcards \\
    --transform 's,.*/,,' 'drivers/vdpa/vdpa_sim/*.[ch]' drivers/vhost/vringh.c
cp $build/vdpa_sim_net.c $build/vdpa_sim_net_mq.c
patch -d $build -p1 <$patch
last='vdpa_to_sim(vdpa)->dev_attr.nvqs - 1'
sed -i "s/if (idx == 2)/if (idx >= 2 \\&\\& idx == $last)/" $build/vdpa_sim.c
grep -q "$last" $build/vdpa_sim.c
echo obj-m := $(printf '%s.o ' "$@") >$build/Kbuild
make -C /lib/modules/$release/build M=$build modules
install -D -m 644 -t /lib/modules/$release/extra $build/*.ko
depmod $release
rm -rf $build $archive
"""


def kernel_release(root: Path) -> str:
    """Return the release of the tree's kernel, as `uname -r` says it."""
    images = sorted((root / "boot").glob("vmlinuz-*"))
    if len(images) != 1:
        raise RigError(f"{root}/boot holds {len(images)} kernels, one is wanted: remove the tree")
    return images[0].name.removeprefix("vmlinuz-")


def build_command(root: Path) -> list[str]:
    """Return the command that, run in the tree, adds the simulators to its kernel's modules."""
    return ["sh", "-c", BUILD, "sh", kernel_release(root), str(PATCH), *MODULES]
