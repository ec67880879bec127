//! The conformance guest with kernels of other releases and architectures, which the tests in the lab boot too.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use rustix::fs::{FlockOperation, flock};

use super::distribution::Distribution;
use super::sources::Sources;
use super::{Manifest, disk, initrd, recipes};
use crate::deb::Apt;
use crate::prerequisites::{self, APT_GET, DPKG_DEB, FAKEROOT, MKE2FS, Tool};
use crate::progress::step;
use crate::workspace;

/// What building them calls.
pub(crate) const TOOLS: [Tool; 4] = [APT_GET, DPKG_DEB, FAKEROOT, MKE2FS];

/// A kernel that is booted besides the host's distribution's.
#[derive(Debug)]
pub(crate) struct Other {
    /// The directory of its artifacts.
    pub(crate) name: &'static str,
    version: &'static str,
    suite: &'static str,
    architecture: &'static str,
    kernel: &'static str,
}

/// All of them.
pub(crate) const ALL: [Other; 4] = [
    Other { name: "i386", version: "12", suite: "bookworm", architecture: "i386", kernel: "linux-image-686" },
    Other {
        name: "debian-13",
        version: "13",
        suite: "trixie",
        architecture: "amd64",
        kernel: "linux-image-cloud-amd64",
    },
    Other {
        name: "full",
        version: "12",
        suite: "bookworm",
        architecture: "amd64",
        kernel: "linux-image-amd64",
    },
    Other {
        name: "debian-13-full",
        version: "13",
        suite: "trixie",
        architecture: "amd64",
        kernel: "linux-image-amd64",
    },
];

const NAMES: [&str; 4] = ["vmlinuz", "conformance.img", "disk.raw", "manifest.json"];

impl Other {
    /// Where its `vmlinuz` and `conformance.img` are, and the `disk.raw` that has them as its system would, made if they are not there or the current packages
    /// are asked for.
    pub(crate) fn ensure(&self, update: bool) -> anyhow::Result<PathBuf> {
        let guest_dir = workspace::guest_dir();
        let dir = guest_dir.join(self.name);
        if !update && is_current(&dir) {
            return Ok(dir);
        }
        prerequisites::require(&TOOLS)?;
        fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let lock =
            File::create(guest_dir.join(format!(".lock-{}", self.name))).context("cannot make a lock")?;
        flock(&lock, FlockOperation::LockExclusive).context("cannot lock the guest directory")?;
        if !update && is_current(&dir) {
            return Ok(dir); // Another process made it meanwhile.
        }
        let cache = guest_dir.join("packages");
        let account = cache.join(format!("apt-{}-{}", self.suite, self.architecture));
        let apt = Apt::of_debian(&account, self.suite, self.architecture)?;
        let distribution = Distribution { id: "debian".to_owned(), version: self.version.to_owned() };
        let sources = Sources::fetch_from(&cache, &apt, &[self.kernel], distribution)
            .with_context(|| format!("cannot fetch {} of Debian {}", self.kernel, self.version))?;
        let work = tempfile::tempdir_in(&guest_dir).context("cannot make a working directory")?;
        step(&format!("building the guest {}", self.name), || make(work.path(), &sources))?;
        for name in NAMES {
            fs::rename(work.path().join(name), dir.join(name))
                .with_context(|| format!("cannot put {name} in place"))?;
        }
        Ok(dir)
    }
}

fn make(dir: &Path, sources: &Sources) -> anyhow::Result<()> {
    let manifest = Manifest {
        recipes: recipes(),
        distribution: sources.distribution.clone(),
        packages: sources.packages.clone(),
    };
    let initrd = initrd::build(&initrd::CONFORMANCE, sources)?;
    let tree = dir.join("tree");
    root(&tree, sources, &initrd).context("cannot make the root file system")?;
    disk::build(&dir.join("disk.raw"), &disk::OTHER, disk::Content::Tree(&tree))?;
    let manifest = serde_json::to_vec_pretty(&manifest)?;
    for (name, content) in
        [("vmlinuz", &sources.vmlinuz), ("conformance.img", &initrd), ("manifest.json", &manifest)]
    {
        fs::write(dir.join(name), content).with_context(|| format!("cannot write {name}"))?;
    }
    Ok(())
}

/// What of a root file system boots, as Debian's packages leave it where there is no boot loader: files with the kernel's
/// version in their names, and links to the newest ones.
fn root(tree: &Path, sources: &Sources, initrd: &[u8]) -> anyhow::Result<()> {
    let version = &sources.kernel_version;
    fs::create_dir_all(tree.join("boot"))?;
    for (name, content) in [("vmlinuz", &sources.vmlinuz[..]), ("initrd.img", initrd)] {
        let versioned = format!("boot/{name}-{version}");
        fs::write(tree.join(&versioned), content)?;
        symlink(&versioned, tree.join(name))?;
    }
    Ok(())
}

fn is_current(dir: &Path) -> bool {
    let manifest = fs::read(dir.join("manifest.json")).unwrap_or_default();
    let made_by = serde_json::from_slice(&manifest).map(|manifest: Manifest| manifest.recipes);
    NAMES.iter().all(|name| dir.join(name).is_file()) && made_by.is_ok_and(|made_by| made_by == recipes())
}
