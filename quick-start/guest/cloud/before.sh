# Before the packages are installed into "$1": what a kernel's installation calls, so that the boot loader's
# entries name the kernels that are there, now and after an upgrade in the guest.
hook() {
    mkdir -p "$(dirname "$1")"
    { echo '#!/bin/sh'; echo 'set -e'; cat; } > "$1"
    chmod 755 "$1"
}

hook "$1/etc/kernel/postinst.d/zz-loader-entry" <<'END'
mkdir -p /boot/loader/entries
cat > "/boot/loader/entries/$1.conf" <<ENTRY
title   Debian GNU/Linux
version $1
linux   /boot/vmlinuz-$1
initrd  /boot/initrd.img-$1
options root=LABEL=root ro console=ttyS0
ENTRY
END

hook "$1/etc/kernel/postrm.d/zz-loader-entry" <<'END'
rm -f "/boot/loader/entries/$1.conf"
END
