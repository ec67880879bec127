//! Minimal guests: busybox and a distribution's kernel on a root disk, made without root.

use std::fs;
use std::path::Path;

use ami_core::{Architecture, Digest};

use crate::build::{Made, digest_of_texts};
use crate::disk::{self, Content};
use crate::error::Context as _;
use crate::progress::Reporter;
use crate::sources::Sources;
use crate::{Result, initrd, rootfs};

/// What such a guest is made of beside the packages.
pub(crate) fn texts() -> Vec<&'static str> {
    let own = [
        include_str!("archive.rs"),
        include_str!("disk.rs"),
        include_str!("distribution.rs"),
        include_str!("initrd.rs"),
        include_str!("minimal.rs"),
        include_str!("modules.rs"),
        include_str!("rootfs.rs"),
        initrd::INIT,
    ];
    own.into_iter().chain(rootfs::texts()).collect()
}

/// The digest of all of this crate's texts that decide what [`Initrd`](crate::Initrd) and [`RootDisk`](crate::RootDisk) make of
/// [`Sources`]: whoever keeps what they have made compares it.
///
/// ```
/// let kept = quick_start::made_by();
/// assert_eq!(quick_start::made_by(), kept); // and of another version of this crate it may be another
/// ```
pub fn made_by() -> Digest {
    digest_of_texts(texts())
}

/// The files that are made, in this order.
pub(crate) const FILES: &[&str] = &["vmlinuz", "initrd.img", disk::NAME];

/// Makes them in the directory `dir`.
pub(crate) fn make(
    dir: &Path,
    sources: &Sources,
    architecture: Architecture,
    reporter: &mut Reporter<'_>,
) -> Result<Made> {
    reporter.step("making the initrd", 60)?;
    let initrd = initrd::of_minimal(architecture).build(sources)?;
    for (name, content) in [("vmlinuz", sources.vmlinuz()), ("initrd.img", &initrd)] {
        fs::write(dir.join(name), content).context(|| format!("cannot write {name}"))?;
    }
    reporter.step("making the root disk", 100)?;
    let tree = dir.join("tree");
    rootfs::build(&tree, sources, &initrd, reporter)?;
    disk::build(&dir.join(disk::NAME), &disk::MINIMAL, Content::Tree(&tree), reporter)?;
    Ok(Made { operating_system: sources.operating_system().clone(), packages: sources.packages().to_vec() })
}
