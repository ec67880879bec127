//! The conformance guest with kernels of other releases and architectures, which the tests in the lab boot too.

use std::env;
use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use ami_core::{Architecture, Digest};
use anyhow::Context as _;
use quick_start::{Package, PackageSource, RootDisk, Sources};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use super::{MANIFEST, initrds, install, packages};
use crate::progress::{step, told};
use crate::{prerequisites, workspace};

/// A kernel that is booted besides the host's distribution's.
#[derive(Debug)]
pub(crate) struct Other {
    /// The directory of its artifacts.
    pub(crate) name: &'static str,
    source: PackageSource,
}

/// All of them.
pub(super) const ALL: [Other; 4] = [
    Other { name: "i386", source: bookworm(Architecture::X86, "linux-image-686") },
    Other { name: "debian-13", source: trixie("linux-image-cloud-amd64") },
    Other { name: "full", source: bookworm(Architecture::X86_64, "linux-image-amd64") },
    Other { name: "debian-13-full", source: trixie("linux-image-amd64") },
];

const fn bookworm(architecture: Architecture, kernel: &'static str) -> PackageSource {
    PackageSource::of_debian("12", "bookworm", architecture, kernel)
}

const fn trixie(kernel: &'static str) -> PackageSource {
    PackageSource::of_debian("13", "trixie", Architecture::X86_64, kernel)
}

const NAMES: [&str; 4] = ["vmlinuz", "conformance.img", "disk.raw", MANIFEST];

/// What one was made of.
#[derive(Serialize, Deserialize)]
struct Manifest {
    recipes: Digest,
    packages: Vec<Package>,
}

/// All that this host can make, and where each is. Under CI that is all of them.
pub(crate) fn ensure_all() -> anyhow::Result<Vec<(&'static str, PathBuf)>> {
    let mut made = Vec::new();
    for other in &ALL {
        match other.ensure(false) {
            Ok(dir) => made.push((other.name, dir)),
            // A host of another distribution may not know Debian's keys.
            Err(error) if env::var_os("CI").is_none() => {
                eprintln!("SKIPPED: the guest {} cannot be made: {error:#}", other.name);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(made)
}

impl Other {
    /// Where its `vmlinuz` and `conformance.img` are, and the `disk.raw` that has them as its system would, made if they are
    /// not there or the current packages are asked for.
    pub(crate) fn ensure(&self, update: bool) -> anyhow::Result<PathBuf> {
        let guest_dir = workspace::guest_dir();
        let dir = guest_dir.join(self.name);
        if !update && is_current(&dir) {
            return Ok(dir);
        }
        prerequisites::require(&[self.source.prerequisites(), RootDisk::PREREQUISITES].concat())?;
        fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let lock =
            File::create(guest_dir.join(format!(".lock-{}", self.name))).context("cannot make a lock")?;
        flock(&lock, FlockOperation::LockExclusive).context("cannot lock the guest directory")?;
        if !update && is_current(&dir) {
            return Ok(dir); // Another process made it meanwhile.
        }
        let sources = told(|progress| Sources::fetch(&self.source, &packages(&guest_dir), progress))?;
        let work = tempfile::tempdir_in(&guest_dir).context("cannot make a working directory")?;
        step(&format!("building the guest {}", self.name), || make(work.path(), &sources))?;
        install(NAMES, work.path(), &dir)?;
        Ok(dir)
    }
}

fn make(dir: &Path, sources: &Sources) -> anyhow::Result<()> {
    let manifest = Manifest { recipes: initrds::recipes(), packages: sources.packages().to_vec() };
    let (vmlinuz, initrd) = (sources.vmlinuz(), initrds::conformance(sources)?);
    let tree = dir.join("tree");
    root(&tree, sources, &initrd).context("cannot make the root file system")?;
    RootDisk::new("conformance", 128 << 20).build(&dir.join("disk.raw"), &tree, &mut |_| ())?;
    let manifest = serde_json::to_vec_pretty(&manifest)?;
    for (name, content) in [("vmlinuz", vmlinuz), ("conformance.img", &initrd), (MANIFEST, &manifest)] {
        fs::write(dir.join(name), content).with_context(|| format!("cannot write {name}"))?;
    }
    Ok(())
}

/// What of a root file system boots, as Debian's packages leave it where there is no boot loader: files with the kernel's
/// version in their names, and links to the newest ones.
fn root(tree: &Path, sources: &Sources, initrd: &[u8]) -> anyhow::Result<()> {
    let version = sources.kernel_version();
    fs::create_dir_all(tree.join("boot"))?;
    for (name, content) in [("vmlinuz", sources.vmlinuz()), ("initrd.img", initrd)] {
        let versioned = format!("boot/{name}-{version}");
        fs::write(tree.join(&versioned), content)?;
        symlink(&versioned, tree.join(name))?;
    }
    Ok(())
}

fn is_current(dir: &Path) -> bool {
    let manifest = fs::read(dir.join(MANIFEST)).unwrap_or_default();
    let made_by = serde_json::from_slice(&manifest).map(|manifest: Manifest| manifest.recipes);
    let all_there = NAMES.iter().all(|name| dir.join(name).is_file());
    all_there && made_by.is_ok_and(|made_by| made_by == initrds::recipes())
}
