#!/bin/sh
# The lab: mounts the disk it was given as a root file system, runs /lab/run in it, and reports.
#
# Five serial ports lead to the host: the command's standard output and standard error, "status" for
# what the lab itself has to say, "files" for an archive of what is brought back, and "pulse", whose bytes
# are sent back. The status port says "up" first; then "exit N" when the command has ended, or
# "failed WHY" when it could not be run.

export PATH=/bin
mount -t devtmpfs devtmpfs /dev
mount -t proc proc /proc
mount -t sysfs sysfs /sys

fail() {
    echo "failed $1" >"${status:-/dev/console}"
    poweroff -f
}

while read -r module; do
    # What fails shows below, where it can be told; the reason is on the console.
    insmod "/modules/$module"
done </modules/order

# The device of the port with this name. The host announces ports one by one.
port() {
    while :; do
        for dir in /sys/class/virtio-ports/*; do
            if [ "$(cat "$dir/name" 2>/dev/null)" = "$1" ]; then
                echo "/dev/${dir##*/}"
                return
            fi
        done
        usleep 10000
    done
}

status=$(port status)
output=$(port output)
errors=$(port errors)
files=$(port files)
pulse=$(port pulse)
# A port is opened once.
cat <>"$pulse" >&0 &
echo up >"$status"

[ -c /dev/kvm ] || fail "its kernel offers no /dev/kvm: QEMU does not emulate AMD's virtualisation"
mount -t ext4 -o noatime /dev/vda /root || fail "cannot mount the disk"
for dir in dev proc sys; do
    mkdir -p /root/$dir
    mount -o move /$dir /root/$dir
done
mkdir -p /root/dev/pts /root/dev/shm /root/run /root/bin
mount -t devpts devpts /root/dev/pts
mount -t tmpfs tmpfs /root/dev/shm
mount -t tmpfs tmpfs /root/run
ln -s /proc/self/fd /root/dev/fd
ln -s /proc/self/fd/0 /root/dev/stdin
ln -s /proc/self/fd/1 /root/dev/stdout
ln -s /proc/self/fd/2 /root/dev/stderr
ip link set lo up
# Where there is a network, QEMU has these addresses for it.
if [ -d /root/sys/class/net/eth0 ]; then
    ip addr add 10.0.2.15/24 dev eth0
    ip link set eth0 up
    ip route add default via 10.0.2.2
fi

# The commands of a small system, where the disk doesn't bring its own.
cat /bin/busybox >/root/bin/busybox && chmod 755 /root/bin/busybox
chroot /root /bin/busybox --install -s 2>/dev/null

chroot /root /bin/busybox sh /lab/run >"/root$output" 2>"/root$errors" </root/dev/null
code=$?

# What is missing the host finds missing in the archive.
chroot /root /bin/busybox sh /lab/bring-back >"/root$files" 2>/dev/null
echo "exit $code" >"/root$status"
poweroff -f
