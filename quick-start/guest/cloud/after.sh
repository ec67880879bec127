# When the packages are installed in "$1": what belongs to a machine and not to its image, and where the root is.
echo 'LABEL=root / ext4 defaults,discard,errors=remount-ro 0 1' > "$1/etc/fstab"
echo localhost > "$1/etc/hostname"
printf '127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n' > "$1/etc/hosts"
: > "$1/etc/machine-id"
rm -f "$1"/etc/ssh/ssh_host_*_key* "$1/etc/resolv.conf" "$1/var/lib/dbus/machine-id"
