#!/bin/sh
# The conformance guest: answers commands on its console, one line each.

export PATH=/bin
mount -t devtmpfs devtmpfs /dev
mount -t proc proc /proc
mount -t sysfs sysfs /sys

# From here on the console carries the protocol and nothing else.
echo 1 >/proc/sys/kernel/printk
while read -r module; do
    insmod "/modules/$module"
done </modules/order
exec </dev/console >/dev/console 2>/dev/null
stty -echo

# Powers off when the power button is pressed.
acpid -f -c /etc/acpi -l /dev/null </dev/null >/dev/null &
button=$!
# A press before it listens would be lost.
listens() {
    for fd in /proc/$button/fd/*; do
        case $(readlink "$fd") in */input/event*) return 0 ;; esac
    done
    return 1
}
while [ -e /dev/input/event0 ] && [ -d /proc/$button ] && ! listens; do :; done

# A second console says how large its terminal is, and says again what else it is told.
second_console() {
    exec </dev/hvc0 >/dev/hvc0
    stty -echo
    while read -r line; do
        case $line in
        size) stty size || echo unknown ;;
        *) echo "said $line" ;;
        esac
    done
}
[ -c /dev/hvc0 ] && second_console &

# The n-th virtio disk, or nothing.
disk() {
    set -- "$1" /sys/block/vd*
    [ -e "$2" ] || return 1
    case $1 in '' | *[!0-9]*) return 1 ;; esac
    shift $(($1 + 1)) && [ "$1" ] && echo "${1##*/}"
}

# System RAM as the firmware told it, in MiB.
memory() {
    bytes=0
    while IFS=' -' read -r first last _ name; do
        case $name in 'System RAM') bytes=$((bytes + 0x$last - 0x$first + 1)) ;; esac
    done </proc/iomem
    echo $((bytes / 1048576))
}

# All disk requests go around the guest's cache.
read_sector() {
    dd if="/dev/$1" of=/sector bs=512 skip="$2" count=1 iflag=direct && [ -s /sector ] &&
        echo "data $(tr '\0' '\n' </sector | head -n 1)"
}

write_sector() {
    printf %s "$3" >/sector && truncate -s 512 /sector &&
        dd if=/sector of="/dev/$1" bs=512 seek="$2" count=1 oflag=direct conv=notrunc && echo wrote
}

flush() {
    dd if=/dev/null of="/dev/$1" conv=notrunc,fsync && echo flushed
}

spin() {
    kill "$button"
    echo spinning
    while :; do :; done
}

# What a disk command does with the disk it names.
disks() {
    name=$(disk "$2") || return 1
    case $1 in
    size) echo "size $(($(cat "/sys/block/$name/size") * 512))" ;;
    serial) echo "serial $(cat "/sys/block/$name/serial")" ;;
    read) read_sector "$name" "$3" ;;
    write) write_sector "$name" "$3" "$4" ;;
    flush) flush "$name" ;;
    esac
}

# What a network command does with the port it names.
nets() {
    case $2 in '' | *[!0-9]*) return 1 ;; esac
    at=/sys/class/net/eth$2
    [ -e "$at" ] || return 1
    case $1 in
    mac) echo "mac $(cat "$at/address")" ;;
    mtu) echo "mtu $(cat "$at/mtu")" ;;
    up) ifconfig "eth$2" "$3" netmask 255.255.255.0 up && echo up ;;
    esac
}

answer() {
    case $1 in
    ping) echo "pong $2" ;;
    cpus) echo "cpus $(nproc)" ;;
    memory) echo "memory $(memory)" ;;
    remember) memorized=$2; echo remembered ;;
    recall) echo "recalled $memorized" ;;
    dmi) echo "dmi $(cat "/sys/class/dmi/id/$2")" ;;
    disks) set -- /sys/block/vd*; [ -e "$1" ] || shift; echo "disks $#" ;;
    size | serial | read | write | flush) disks "$@" || echo error ;;
    nets) set -- /sys/class/net/eth*; [ -e "$1" ] || shift; echo "nets $#" ;;
    mac | mtu | up) nets "$@" || echo error ;;
    poweroff) poweroff -f ;;
    reboot) reboot -f ;;
    crash) echo unsupported ;;
    panic) [ -e /sys/bus/platform/devices/QEMU0001:00/driver ] && echo c >/proc/sysrq-trigger; echo unsupported ;;
    show) read -r shown <"/sys/$2" && echo "show $shown" || echo error ;;
    vsock) vsock "$2" "$3" & ;;
    # So many MiB of memory are used, and free again.
    fill) dd if=/dev/zero of=/filled bs=1M count="$2" && echo filled || echo error ;;
    drain) rm /filled && echo drained || echo error ;;
    spin) spin ;;
    *) echo unknown ;;
    esac
}

echo GUEST READY
while read -r line; do
    # Words only: no pattern in a line may turn into file names.
    set -f
    set -- $line
    set +f
    [ $# -eq 0 ] || answer "$@"
done
poweroff -f
