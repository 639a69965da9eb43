"""The guides' commands, run as they are written."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.docs.blocks import section
from tests.peers.process import eventually
from tests.rig.layer import libvirt_layer, open_vswitch_layer
from tests.rig.report import REPOSITORY

from .reader import Reader


@pytest.fixture
def reader() -> Iterator[Reader]:
    with Reader() as person:
        yield person


def test_qemu_and_virtiofsd(reader: Reader) -> None:
    """A guest with a disk, a network card and a shared folder, each behind a bridge; virtiofsd is
    replaced while the guest has a file open."""
    reader.place.path("/srv/vm1.img").write_bytes(os.urandom(32 << 20))
    reader.place.path("/srv/shared").mkdir()
    reader.place.path("/srv/shared/hello").write_text("Hello from the host\n")
    *before, qemu = reader.commands("docs/guides/qemu.md#disk")
    card = reader.commands("docs/guides/qemu.md#network-card")
    folder = reader.commands("docs/guides/virtiofsd.md#a-folder-in-a-guest")
    for command in (*before, *card):
        if command.where == "host":
            reader.do(command)
    reader.jobs.clear()  # another shell
    for command in folder:
        if command.where == "host":
            reader.do(command)
    options = [command.text for command in (*card, *folder) if command.where == "options"]
    guest = reader.boot(qemu, " ".join(options))
    reader.follow("docs/guides/qemu.md#what-to-check")
    for command in folder:
        if command.where == "guest":
            reader.do(command)
    guest.begin("exec 3</mnt/hello; sleep 3; cat <&3")
    reader.follow("docs/guides/virtiofsd.md#replace-virtiofsd-under-the-guest")
    assert guest.end() == "Hello from the host"


def test_dpdk(reader: Reader) -> None:
    reader.follow("docs/guides/dpdk.md#virtio-user-to-a-back-end")
    log = reader.place.path("/srv/user.log")
    eventually(lambda: log.exists() and "RX-packets: " in log.read_text(), "counters")
    eventually(lambda: re.search(r"RX-packets: [1-9]", log.read_text()) is not None, "frames")
    reader.follow("docs/guides/dpdk.md#what-to-check")


def test_open_vswitch() -> None:
    """A guest and the switch's own port, on a bridge of OVS with DPDK."""
    with Reader(open_vswitch_layer()) as reader:
        reader.start_open_vswitch()
        card = reader.commands("docs/guides/qemu.md#network-card")
        for command in reader.commands("docs/guides/dpdk.md#open-vswitch"):
            if command.where == "guest" and reader.guest is None:
                (options,) = (c for c in card if c.where == "options")
                reader.boot(replace(options, text=f"qemu-system-x86_64 {options.text}"))
            reader.do(command)
        counted = "'statistics:rx_packets>=3' 'statistics:tx_packets>=3'"
        reader.run(f"ovs-vsctl --timeout=30 wait-until Interface vhost1 {counted}")


def test_libvirt() -> None:
    """The guide's domain, checked by libvirt's schema and started by libvirt."""
    with Reader(libvirt_layer()) as reader:
        reader.place.path("/srv/vm1.img").write_bytes(bytes(32 << 20))
        reader.place.path("/srv/shared").mkdir()
        (domain,) = section(REPOSITORY, "docs/guides/libvirt.md#the-domain")
        reader.write("vm1.xml", domain.text)
        reader.start_libvirt()
        reader.follow("docs/guides/libvirt.md#bridges-and-domain")
        reader.follow("docs/guides/libvirt.md#what-to-check")
        reader.follow("docs/guides/libvirt.md#the-end-of-it")
