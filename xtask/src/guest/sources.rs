//! What the guests are made of: the distribution's kernel for virtual machines with its modules, and its
//! static busybox.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};

use super::distribution::Distribution;
use super::modules::Modules;
use crate::deb::{Apt, Package, Unpacked};
use crate::process;
use crate::progress::step;

/// The packages that depend on the current kernel: Debian's and Ubuntu's.
const KERNELS: [&str; 2] = ["linux-image-cloud-amd64", "linux-image-virtual"];

/// The unpacked packages, and what is used of them.
pub(crate) struct Sources {
    pub(crate) distribution: Distribution,
    /// The kernel's version, such as `6.1.0-56-cloud-amd64`.
    pub(crate) kernel_version: String,
    pub(crate) vmlinuz: Vec<u8>,
    pub(crate) modules: Modules,
    pub(crate) busybox: Vec<u8>,
    /// The commands that this busybox has.
    pub(crate) applets: BTreeSet<String>,
    /// The packages, for the record.
    pub(crate) packages: Vec<Package>,
}

impl Sources {
    /// Fetches what `cache` doesn't hold yet: the host's distribution, for 64-bit x86.
    pub(crate) fn fetch(cache: &Path) -> anyhow::Result<Self> {
        let sources = Self::fetch_from(cache, &Apt::Host, &KERNELS, Distribution::of_host()?).context(
            "the guests are made of the kernel for virtual machines of Debian 12 or 13, or of Ubuntu",
        )?;
        let wrong = sources.packages.iter().find(|package| package.architecture != "amd64");
        ensure!(wrong.is_none(), "apt offers packages for another architecture: {wrong:?}");
        Ok(sources)
    }

    /// Fetches from `apt` the first of these kernels that is there, and busybox.
    pub(crate) fn fetch_from(
        cache: &Path,
        apt: &Apt,
        kernels: &[&str],
        distribution: Distribution,
    ) -> anyhow::Result<Self> {
        let kernel = step("fetching the kernel", || kernel(cache, apt, kernels))?;
        let busybox =
            step("fetching busybox", || Package::candidate(apt, &["busybox-static"])?.unpack(cache))?;
        let program = find(std::slice::from_ref(&busybox), "bin/busybox")?;
        Ok(Self {
            distribution,
            vmlinuz: read(&find(&kernel.parts, &format!("boot/vmlinuz-{}", kernel.version))?)?,
            modules: Modules::index(&find(&kernel.parts, &format!("lib/modules/{}", kernel.version))?)?,
            busybox: read(&program)?,
            applets: applets(&program)?,
            kernel_version: kernel.version,
            packages: kernel.parts.into_iter().chain([busybox]).map(|part| part.package).collect(),
        })
    }
}

/// A kernel's packages: the image, and its modules where they are apart.
struct Kernel {
    version: String,
    parts: Vec<Unpacked>,
}

fn kernel(cache: &Path, apt: &Apt, kernels: &[&str]) -> anyhow::Result<Kernel> {
    let current = Package::candidate(apt, kernels)?;
    let image = Package::candidate(apt, &[current.dependency("linux-image-")?])?;
    let version = image.name.trim_start_matches("linux-image-").to_owned();
    // Ubuntu's image depends on its modules, Debian's has them in it.
    let modules = image.dependency("linux-modules-").ok().map(|name| Package::candidate(apt, &[name]));
    let packages = std::iter::once(Ok(image)).chain(modules);
    let parts = packages.map(|package| package?.unpack(cache)).collect::<anyhow::Result<_>>()?;
    Ok(Kernel { version, parts })
}

/// The file or directory `path` in one of `packages`: in the root directory or, where the distribution
/// has moved all into it, in `/usr`.
fn find(packages: &[Unpacked], path: &str) -> anyhow::Result<PathBuf> {
    let places =
        packages.iter().flat_map(|unpacked| ["", "usr"].map(|dir| unpacked.root.join(dir).join(path)));
    let name = || packages.iter().map(|unpacked| &*unpacked.package.name).collect::<Vec<_>>().join(" and ");
    places.into_iter().find(|path| path.exists()).with_context(|| format!("there is no {path} in {}", name()))
}

fn applets(busybox: &Path) -> anyhow::Result<BTreeSet<String>> {
    let program = busybox.to_str().with_context(|| format!("{} is not UTF-8", busybox.display()))?;
    let list = process::output(process::command(program).arg("--list"))?;
    Ok(list.lines().map(str::to_owned).collect())
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}
