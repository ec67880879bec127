#!/bin/sh
# A guest that measures its network. What it is to do, and its address, are words of the kernel's command line.

export PATH=/bin
mount -t devtmpfs devtmpfs /dev
mount -t proc proc /proc
mount -t sysfs sysfs /sys
echo 1 >/proc/sys/kernel/printk
while read -r module; do
    insmod "/modules/$module"
done </modules/order
exec </dev/console >/dev/console 2>&1
stty -echo
/bin/busybox ifconfig lo 127.0.0.1 up
/bin/busybox ifconfig eth0 "$address" netmask 255.255.240.0 up
/bin/busybox route add default gw 172.31.0.1
/measure in-guest "$work"
exec /bin/busybox sleep 1000000
