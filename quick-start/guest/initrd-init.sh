#!/bin/sh
# The quick-start guest's initrd: loads the disk drivers, finds the root file system that the kernel's
# command line names, and hands over to it.

export PATH=/bin
mount -t devtmpfs devtmpfs /dev
mount -t proc proc /proc
mount -t sysfs sysfs /sys

give_up() {
    echo "initrd: $1; powering off" >/dev/console
    poweroff -f
}

# A GPT entry holds its partition's GUID 16 bytes in, the first three groups with their bytes reversed.
gpt_order() {
    echo "$1" | tr -d - | sed 's/^\(..\)\(..\)\(..\)\(..\)\(..\)\(..\)\(..\)\(..\)/\4\3\2\1\6\5\8\7/'
}

find_partition() {
    guid=$(gpt_order "$1")
    for disk in /sys/block/*; do
        node=/dev/${disk##*/}
        sector=$(cat "$disk/queue/logical_block_size")
        # The table: 128 entries of 128 bytes from the third sector on, one line each.
        number=$(dd if="$node" bs="$sector" skip=2 count=$((16384 / sector)) 2>/dev/null |
            xxd -p -c 128 | grep -n "^.\{32\}$guid" | cut -d : -f 1)
        [ "$number" ] || continue
        for node in "$node$number" "${node}p$number"; do
            [ -b "$node" ] && echo "$node" && return
        done
    done
}

find_root() {
    case $root in
    PARTUUID=*) find_partition "$(echo "${root#*=}" | tr A-F a-f)" ;;
    UUID=* | LABEL=*) findfs "$root" 2>/dev/null ;;
    *) [ -b "$root" ] && echo "$root" ;;
    esac
}

while read -r module; do
    insmod "/modules/$module" || give_up "cannot load $module"
done </modules/order

root= mode=ro
for word in $(cat /proc/cmdline); do
    case $word in
    root=*) root=${word#root=} ;;
    ro | rw) mode=$word ;;
    esac
done
[ "$root" ] || give_up "the command line names no root"

tries=0
until device=$(find_root) && [ "$device" ]; do
    tries=$((tries + 1))
    [ $tries -le 500 ] || give_up "no disk has $root"
    usleep 20000
done

mount -t ext4 -o "$mode" "$device" /root || give_up "cannot mount $device ($root)"
for dir in dev proc sys; do
    mount -o move /$dir /root/$dir
done
exec switch_root /root /sbin/init
