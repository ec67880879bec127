//! The initial RAM disks: busybox, modules in load order, and a script as `/init`.

use std::fs;

use anyhow::{Context as _, ensure};

use super::archive::Archive;
use super::sources::Sources;
use crate::{bare_guest, process};

/// An initrd's script, the drivers it loads and the commands it calls.
pub(crate) struct Recipe {
    init: &'static str,
    modules: &'static [&'static str],
    applets: &'static [&'static str],
    files: &'static [(&'static str, &'static str)],
    /// Programs that busybox does not have: their names, and their sources in C.
    programs: &'static [(&'static str, &'static str)],
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
    programs: &[],
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
    programs: &[("vsock", include_str!("../../guest/vsock.c"))],
};

/// The initrd that reboots as soon as it is up.
pub(crate) const BOOT: Recipe = Recipe {
    init: "#!/bin/sh\nexec reboot -f\n",
    modules: &[],
    applets: &["reboot", "sh"],
    files: &[],
    programs: &[],
};

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
    programs: &[],
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
    for (name, source) in recipe.programs {
        archive.program(&format!("bin/{name}"), &compile(source)?)?;
    }
    archive.program("init", recipe.init.as_bytes())?;
    archive.finish()
}

/// Compiles a program with the host's C compiler, which is there wherever Rust links programs, as code that every x86
/// guest's kernel runs.
fn compile(source: &str) -> anyhow::Result<Vec<u8>> {
    let dir = tempfile::tempdir().context("cannot make a directory to compile in")?;
    let (text, program) = (dir.path().join("program.c"), dir.path().join("program"));
    fs::write(&text, source).context("cannot write a guest's program")?;
    process::output(process::command("cc").args(bare_guest::FLAGS).arg(&text).arg("-o").arg(&program))
        .context("cannot compile a guest's program")?;
    fs::read(&program).context("cannot read a guest's program")
}
