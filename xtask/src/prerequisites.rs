//! What must be installed on the host: looked for, and, where this runs as root on a Debian-like
//! system, installed. Elsewhere the one line to run is the error.

use std::process::Command;

use anyhow::{Context as _, bail};
use quick_start::Prerequisite;

use crate::process;

/// A program a task calls, and the Debian package it comes in.
pub(crate) type Tool = Prerequisite;

const APT_GET: Tool = Tool::new("apt-get", "apt");
pub(crate) const FAKEROOT: Tool = Tool::new("fakeroot", "fakeroot");
pub(crate) const MKE2FS: Tool = Tool::new("mke2fs", "e2fsprogs");
pub(crate) const CURL: Tool = Tool::new("curl", "curl");
pub(crate) const SSH: Tool = Tool::new("ssh", "openssh-client");
pub(crate) const PASST: Tool = Tool::new("passt", "passt");
pub(crate) const SETPRIV: Tool = Tool::new("setpriv", "util-linux");
pub(crate) const IP: Tool = Tool::new("ip", "iproute2");
pub(crate) const LDD: Tool = Tool::new("ldd", "libc-bin");
pub(crate) const LOSETUP: Tool = Tool::new("losetup", "mount");
pub(crate) const NBDINFO: Tool = Tool::new("nbdinfo", "libnbd-bin");
pub(crate) const NBDCOPY: Tool = Tool::new("nbdcopy", "libnbd-bin");
pub(crate) const NBDKIT: Tool = Tool::new("nbdkit", "nbdkit");
pub(crate) const FIO: Tool = Tool::new("fio", "fio");
pub(crate) const BZIP2: Tool = Tool::new("bzip2", "bzip2");
pub(crate) const LZOP: Tool = Tool::new("lzop", "lzop");
pub(crate) const LZ4: Tool = Tool::new("lz4", "lz4");
pub(crate) const XZ: Tool = Tool::new("xz", "xz-utils");
pub(crate) const ZSTD: Tool = Tool::new("zstd", "zstd");
pub(crate) const QEMU_IMG: Tool = Tool::new("qemu-img", "qemu-utils");
pub(crate) const QEMU_IO: Tool = Tool::new("qemu-io", "qemu-utils");
pub(crate) const QEMU_NBD: Tool = Tool::new("qemu-nbd", "qemu-utils");
pub(crate) const QEMU_X86_64: Tool = Tool::new("qemu-system-x86_64", "qemu-system-x86");

/// Makes sure that `tools` are there. A command calls this once, with all that it needs, before it does
/// anything else: who may not install packages gets one line to run and not several.
pub(crate) fn require(tools: &[Tool]) -> anyhow::Result<()> {
    let packages = missing(tools);
    if packages.is_empty() {
        return Ok(());
    }
    let wanted = packages.join(" ");
    if !APT_GET.is_there() {
        bail!("missing: {wanted} (Debian's package names), and there is no apt-get to install them with");
    }
    if !is_root() {
        bail!(
            "please install what is missing:\n\n    sudo apt-get update && sudo apt-get install -y {wanted}\n"
        );
    }
    eprintln!("  installing {wanted}");
    if install(&packages).is_err() {
        // The package lists are missing or name versions that are gone.
        update_package_lists()?;
        install(&packages)?;
    }
    // Where a package of another release stood in the way, as a backport of `qemu-utils` does in that of QEMU, apt has
    // removed it.
    match missing(tools) {
        removed if removed.is_empty() => Ok(()),
        removed => install(&removed),
    }
}

/// The packages of those that are not there.
fn missing(tools: &[Tool]) -> Vec<&'static str> {
    let mut packages: Vec<&str> = tools.iter().filter(|t| !t.is_there()).map(Tool::package).collect();
    packages.sort_unstable();
    packages.dedup();
    packages
}

/// Fetches apt's package lists anew; needs root.
fn update_package_lists() -> anyhow::Result<()> {
    if !is_root() {
        bail!("apt's package lists are missing or stale; please run: sudo apt-get update");
    }
    eprintln!("  updating apt's package lists");
    process::output(process::command("apt-get").args(["-q", "update"])).map(drop)
}

/// Whether this process may install packages.
fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

fn install(packages: &[&str]) -> anyhow::Result<()> {
    let mut apt: Command = process::command("apt-get");
    apt.args(["-q", "-y", "--no-install-recommends", "install"]).args(packages);
    apt.env("DEBIAN_FRONTEND", "noninteractive");
    process::output(&mut apt).with_context(|| format!("cannot install {}", packages.join(" "))).map(drop)
}
