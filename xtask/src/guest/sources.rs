//! What the guests are made of: Debian's cloud kernel with its modules, and Debian's static busybox.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, ensure};

use super::modules::Modules;
use crate::deb::{Package, Unpacked};
use crate::progress::step;

/// The unpacked packages, and what is used of them.
pub(crate) struct Sources {
    /// The kernel's version, such as `6.1.0-56-cloud-amd64`.
    pub(crate) kernel_version: String,
    pub(crate) vmlinuz: Vec<u8>,
    pub(crate) modules: Modules,
    pub(crate) busybox: Vec<u8>,
    /// The packages, for the record.
    pub(crate) packages: Vec<Package>,
}

impl Sources {
    /// Fetches what `cache` doesn't hold yet.
    pub(crate) fn fetch(cache: &Path) -> anyhow::Result<Self> {
        let kernel = step("fetching Debian's cloud kernel", || kernel(cache))?;
        let busybox = step("fetching Debian's static busybox", || {
            let package = Package::candidate("busybox-static")?;
            ensure!(package.architecture == "amd64", "apt offers busybox for {}", package.architecture);
            package.unpack(cache)
        })?;
        let version = kernel.package.name.trim_start_matches("linux-image-").to_owned();
        let modules = kernel.root.join("lib/modules").join(&version);
        Ok(Self {
            vmlinuz: read(&kernel.root.join("boot").join(format!("vmlinuz-{version}")))?,
            modules: Modules::index(&modules)?,
            busybox: read(&busybox.root.join("bin/busybox"))?,
            packages: vec![kernel.package, busybox.package],
            kernel_version: version,
        })
    }
}

fn kernel(cache: &Path) -> anyhow::Result<Unpacked> {
    let current = Package::candidate("linux-image-cloud-amd64").context(
        "the guests are made of Debian's cloud kernel; this host's apt archives must have it (Debian 12)",
    )?;
    Package::candidate(current.dependency("linux-image-")?)?.unpack(cache)
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}
