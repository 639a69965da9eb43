"""The test rig: a Debian root tree with every peer, and a virtual machine with vhost-vdpa.

``root``     one cached tree; peers (QEMU, virtiofsd, DPDK, libblkio) run from it on the host
``kernel``   the vDPA simulators, which Debian's kernel leaves out, built for that tree
``image``    disk images for the virtual machine, made from the tree
``product``  the wheel under test
``vm``       the virtual machine, which takes commands for as long as a test session lasts

``python -m tests.rig`` prepares and drives them by hand.
"""
