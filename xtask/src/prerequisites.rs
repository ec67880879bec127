//! What must be installed on the host: looked for, and, where this runs as root on a Debian-like
//! system, installed. Elsewhere the one line to run is the error.

use std::process::Command;

use anyhow::{Context as _, bail};

use crate::process;

/// A program a task calls, and the Debian package it comes in.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tool {
    program: &'static str,
    package: &'static str,
}

pub(crate) const DPKG_DEB: Tool = Tool { program: "dpkg-deb", package: "dpkg" };
pub(crate) const APT_GET: Tool = Tool { program: "apt-get", package: "apt" };
pub(crate) const FAKEROOT: Tool = Tool { program: "fakeroot", package: "fakeroot" };
pub(crate) const MKE2FS: Tool = Tool { program: "mke2fs", package: "e2fsprogs" };
pub(crate) const MMDEBSTRAP: Tool = Tool { program: "mmdebstrap", package: "mmdebstrap" };
pub(crate) const CURL: Tool = Tool { program: "curl", package: "curl" };
pub(crate) const SSH: Tool = Tool { program: "ssh", package: "openssh-client" };
pub(crate) const PASST: Tool = Tool { program: "passt", package: "passt" };
pub(crate) const SETPRIV: Tool = Tool { program: "setpriv", package: "util-linux" };
pub(crate) const IP: Tool = Tool { program: "ip", package: "iproute2" };
pub(crate) const LDD: Tool = Tool { program: "ldd", package: "libc-bin" };
pub(crate) const NBDINFO: Tool = Tool { program: "nbdinfo", package: "libnbd-bin" };
pub(crate) const NBDCOPY: Tool = Tool { program: "nbdcopy", package: "libnbd-bin" };
pub(crate) const NBDKIT: Tool = Tool { program: "nbdkit", package: "nbdkit" };
pub(crate) const FIO: Tool = Tool { program: "fio", package: "fio" };
pub(crate) const BZIP2: Tool = Tool { program: "bzip2", package: "bzip2" };
pub(crate) const LZOP: Tool = Tool { program: "lzop", package: "lzop" };
pub(crate) const LZ4: Tool = Tool { program: "lz4", package: "lz4" };
pub(crate) const XZ: Tool = Tool { program: "xz", package: "xz-utils" };
pub(crate) const ZSTD: Tool = Tool { program: "zstd", package: "zstd" };
pub(crate) const QEMU_IMG: Tool = Tool { program: "qemu-img", package: "qemu-utils" };
pub(crate) const QEMU_IO: Tool = Tool { program: "qemu-io", package: "qemu-utils" };
pub(crate) const QEMU_NBD: Tool = Tool { program: "qemu-nbd", package: "qemu-utils" };
pub(crate) const QEMU_X86_64: Tool = Tool { program: "qemu-system-x86_64", package: "qemu-system-x86" };

/// Makes sure that `tools` are there. A command calls this once, with all that it needs, before it does
/// anything else: who may not install packages gets one line to run and not several.
pub(crate) fn require(tools: &[Tool]) -> anyhow::Result<()> {
    let mut packages: Vec<&str> = tools.iter().filter(|t| !is_there(t)).map(|t| t.package).collect();
    packages.sort_unstable();
    packages.dedup();
    if packages.is_empty() {
        return Ok(());
    }
    let wanted = packages.join(" ");
    if !is_there(&APT_GET) {
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
    Ok(())
}

/// Fetches apt's package lists anew; needs root.
pub(crate) fn update_package_lists() -> anyhow::Result<()> {
    if !is_root() {
        bail!("apt's package lists are missing or stale; please run: sudo apt-get update");
    }
    eprintln!("  updating apt's package lists");
    process::output(process::command("apt-get").args(["-q", "update"])).map(drop)
}

/// Whether this process may install packages.
pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

fn install(packages: &[&str]) -> anyhow::Result<()> {
    let mut apt: Command = process::command("apt-get");
    apt.args(["-q", "-y", "--no-install-recommends", "install"]).args(packages);
    apt.env("DEBIAN_FRONTEND", "noninteractive");
    process::output(&mut apt).with_context(|| format!("cannot install {}", packages.join(" "))).map(drop)
}

fn is_there(tool: &Tool) -> bool {
    process::find(tool.program).is_some()
}
