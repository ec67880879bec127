//! The initial RAM disks: busybox, modules in load order, and a script as `/init`.

use anyhow::{Context as _, ensure};

use super::archive::Archive;
use super::sources::Sources;

/// An initrd's script, the drivers it loads and the commands it calls.
pub(crate) struct Recipe {
    init: &'static str,
    modules: &'static [&'static str],
    applets: &'static [&'static str],
    files: &'static [(&'static str, &'static str)],
}

/// Both ways in which a virtio disk may be attached, and the file systems on it.
const DISK_MODULES: [&str; 4] = ["virtio_mmio", "virtio_pci", "virtio_blk", "ext4"];

/// The initrd of the quick-start guest.
pub(crate) const QUICK_START: Recipe = Recipe {
    init: include_str!("../../guest/initrd-init.sh"),
    modules: &DISK_MODULES,
    applets: &[
        "cat",
        "cut",
        "dd",
        "echo",
        "findfs",
        "grep",
        "insmod",
        "mount",
        "poweroff",
        "sed",
        "sh",
        "switch_root",
        "tr",
        "usleep",
        "xxd",
    ],
    files: &[],
};

/// The initrd that is the conformance guest.
pub(crate) const CONFORMANCE: Recipe = Recipe {
    init: include_str!("../../guest/conformance-init.sh"),
    modules: &[
        "virtio_mmio",
        "virtio_pci",
        "virtio_blk",
        "virtio_net",
        "virtio_balloon",
        "virtio_console",
        "vmw_vsock_virtio_transport",
        "pvpanic_mmio",
        "button",
        "evdev",
    ],
    applets: &[
        "acpid",
        "cat",
        "dd",
        "echo",
        "head",
        "ifconfig",
        "insmod",
        "kill",
        "mount",
        "nproc",
        "poweroff",
        "printf",
        "readlink",
        "reboot",
        "run-parts",
        "sh",
        "stty",
        "tr",
        "truncate",
    ],
    files: &[("etc/acpi/PWRF/00000080", include_str!("../../guest/conformance-button.sh"))],
};

/// The initrd that reboots as soon as it is up.
pub(crate) const BOOT: Recipe =
    Recipe { init: "#!/bin/sh\nexec reboot -f\n", modules: &[], applets: &["reboot", "sh"], files: &[] };

/// The initrd of the lab.
pub(crate) const LAB: Recipe = Recipe {
    init: include_str!("../../guest/lab-init.sh"),
    modules: &[
        "virtio_pci",
        "virtio_blk",
        "virtio_net",
        "virtio_console",
        "ext4",
        "kvm_amd",
        "tun",
        "bridge",
        "vhost_net",
    ],
    applets: &[
        "cat", "chmod", "chroot", "echo", "insmod", "ip", "ln", "mkdir", "mount", "poweroff", "sh", "usleep",
    ],
    files: &[],
};

/// Builds an initrd.
pub(crate) fn build(recipe: &Recipe, sources: &Sources) -> anyhow::Result<Vec<u8>> {
    let mut archive = Archive::default();
    for dir in ["bin", "dev", "etc", "etc/acpi", "etc/acpi/PWRF", "modules", "proc", "root", "sys"] {
        archive.dir(dir)?;
    }
    archive.program("bin/busybox", &sources.busybox)?;
    for applet in recipe.applets {
        ensure!(sources.applets.contains(*applet), "this busybox has no {applet}, which the guests need");
        archive.symlink(&format!("bin/{applet}"), "busybox")?;
    }
    let mut order = String::new();
    for module in sources.modules.closure(recipe.modules).context("cannot collect the kernel modules")? {
        let name = module.file_name();
        archive.file(&format!("modules/{name}"), &module.content)?;
        order += &format!("{name}\n");
    }
    archive.file("modules/order", order.as_bytes())?;
    for (path, content) in recipe.files {
        archive.program(path, content.as_bytes())?;
    }
    archive.program("init", recipe.init.as_bytes())?;
    archive.finish()
}
