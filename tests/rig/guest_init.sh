# Run by the kernel as process 1 of the virtual machine, from the share: /rig.
# A command that fails ends process 1, and so the machine, with its words on the console.
set -e
export PATH=/run/product/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/usr/libexec
export HOME=/root LC_ALL=C.UTF-8 TERM=linux PYTHON_COLORS=0
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/shm /dev/pts /opt/vb
mount -t devpts -o mode=0620,ptmxmode=0666 pts /dev/pts
for folder in /dev/shm /run /tmp; do
    mount -t tmpfs -o mode=1777 tmpfs $folder
done
mount -t debugfs debug /sys/kernel/debug
mount -t tracefs trace /sys/kernel/tracing
modprobe virtio_blk
mount -t ext4 -o ro,noload /dev/vda /opt/vb
ip link set lo up
hostname rig
# vhost_vdpa first, so that devices bind to it.
modprobe vhost_vdpa
modprobe -a vdpa_sim_net vdpa_sim_blk vduse
# Imports from the share are slow: a copy in memory.
if [ -d /rig/.boot/product ]; then
    cp -a /rig/.boot/product /run/product
    export PYTHONPATH=/run/product:/opt/vb
else
    export PYTHONPATH=/opt/vb
fi
exec python3 -I -S /rig/.boot/guest_agent.py
