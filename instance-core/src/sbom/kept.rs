//! Bills that are kept, each by the digest of the content that it is of.
//!
//! A file is as good as what is read from the image again: it is not synchronised, and one that is not whole is none. That
//! nothing can be read is kept, too: everybody who sees an image may ask, and a hostile one is long to read.

use std::fs;
use std::io::{self, Write};
use std::panic::{AssertUnwindSafe, UnwindSafe, catch_unwind};
use std::path::Path;

use ami_core::{Digest, Image};
use serde::{Deserialize, Serialize};
use storage_block::Snapshot;

use super::{InstalledPackage, installed};
use crate::error::chain;
use crate::region::Inner;
use crate::{Error, ErrorKind, Result};

/// The longest texts of a bill altogether, which JSON makes six times as long at most. A large Debian system's have some 400 KiB.
/// What is longer is no bill: it would be read anew for each who asks, or be long to read where it is kept.
const MAX_TEXT: usize = 4 << 20;

/// How bills are written: one of another version is none.
const VERSION: u32 = 1;

/// A bill as it is written, behind the digest of this.
#[derive(Serialize, Deserialize)]
struct Kept {
    version: u32,
    #[serde(flatten)]
    bill: Bill,
}

/// What reading a content has come to.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Bill {
    /// Name, version and architecture of each.
    Packages(Vec<(String, String, String)>),
    /// Nothing, for what the content has, and why.
    Unreadable(String),
}

impl Bill {
    /// Reads it.
    ///
    /// # Errors
    ///
    /// What the host met, which says nothing of the content.
    fn of(content: &Snapshot) -> Result<Self> {
        Self::new(AssertUnwindSafe(|| installed(&content.disk())))
    }

    fn new(read: impl FnOnce() -> Result<Vec<InstalledPackage>> + UnwindSafe) -> Result<Self> {
        // What is read is hostile, and what reads it is other people's: it is not worth an image, nor its caller's thread.
        let read = catch_unwind(read).unwrap_or_else(|_| {
            Err(Error::new(ErrorKind::Unsupported, "reading what is installed on the image has panicked"))
        });
        match read {
            Ok(packages) if length(&packages) > MAX_TEXT => {
                let what = "what is installed on the image takes more than 4 MiB to say";
                Ok(Self::Unreadable(what.to_owned()))
            }
            Ok(packages) => {
                let text = |p: InstalledPackage| (p.name, p.version, p.architecture);
                Ok(Self::Packages(packages.into_iter().map(text).collect()))
            }
            Err(e) if e.kind() == ErrorKind::Unsupported => Ok(Self::Unreadable(chain(&e))),
            Err(e) => Err(e),
        }
    }

    fn packages(self) -> Result<Vec<InstalledPackage>> {
        let package = |(name, version, architecture)| InstalledPackage { name, version, architecture };
        match self {
            Self::Packages(packages) => Ok(packages.into_iter().map(package).collect()),
            Self::Unreadable(why) => Err(Error::new(ErrorKind::Unsupported, why)),
        }
    }
}

fn length(packages: &[InstalledPackage]) -> usize {
    packages.iter().map(|p| p.name.len() + p.version.len() + p.architecture.len()).sum()
}

impl Inner {
    /// Reads what is installed on the root volume of an image that is about to be registered, and keeps it. What comes in the
    /// way of that is no reason not to register it. Whoever calls keeps the content from being collected.
    pub(crate) fn keep_software(&self, content: &Snapshot) {
        let path = self.paths.software_bill(&content.digest());
        if content.encrypted() || read(&path).is_some() {
            return;
        }
        // Of what was stored, not of the disk that it came from, which may have been written to meanwhile.
        match Bill::of(content) {
            Ok(bill) => drop(keep(&path, bill)),
            Err(e) => tracing::debug!(content = %content.digest(), error = chain(&e), "no bill of software"),
        }
    }

    /// What is installed on an image.
    pub(super) fn software_of(&self, image: &Image) -> Result<Vec<InstalledPackage>> {
        let content = image.ami().manifest().root_device().and_then(|root| root.content());
        let content = content.ok_or_else(|| {
            let what = format!("the root volume of {} has no content", image.id());
            Error::new(ErrorKind::Unsupported, what)
        })?;
        let path = self.paths.software_bill(content);
        if let Some(bill) = read(&path) {
            return bill.packages();
        }
        // What is open stays, whatever becomes of the image: nobody waits while it is read.
        let making = self.begin_making();
        let content = self.content(content).inspect_err(|e| self.look_for_damage(image.id(), e))?;
        drop(making);
        let bill = Bill::of(&content)?;
        if content.encrypted() {
            return bill.packages();
        }
        // Once it is kept for an image that is there, it does not go with one that has gone meanwhile.
        let _making = self.begin_making();
        match self.image(image.id()) {
            Ok(_) => keep(&path, bill).packages(),
            Err(_) => bill.packages(),
        }
    }
}

/// A bill that is kept and whole.
fn read(path: &Path) -> Option<Bill> {
    let file = fs::read(path).ok()?;
    let (digest, json) = file.split_at_checked(32)?;
    if Digest::of(json).as_bytes() != digest {
        return None;
    }
    let kept: Kept = serde_json::from_slice(json).ok()?;
    (kept.version == VERSION).then_some(kept.bill)
}

/// Keeps a bill if that can be, and gives it back.
fn keep(path: &Path, bill: Bill) -> Bill {
    let kept = Kept { version: VERSION, bill };
    if let Err(e) = write(path, &kept) {
        tracing::debug!(path = %path.display(), error = %e, "cannot keep a bill of software");
    }
    kept.bill
}

fn write(path: &Path, kept: &Kept) -> io::Result<()> {
    let json = serde_json::to_vec(kept)?;
    let Some(dir) = path.parent() else { return Ok(()) };
    fs::create_dir_all(dir)?;
    let mut file = tempfile::NamedTempFile::new_in(dir)?;
    file.write_all(Digest::of(&json).as_bytes())?;
    file.write_all(&json)?;
    file.persist(path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use ami_core::{Ami, X86_64};
    use storage_block::MemoryDisk;

    use super::*;
    use crate::testing::{FakeHypervisor, tiny_elf};
    use crate::{DirectBoot, ImageSource, Region};

    #[test]
    fn a_bill_is_kept_before_its_image_is_there_and_goes_with_one_that_does_not_come() {
        let dir = tempfile::tempdir().unwrap();
        let region = Region::open(dir.path(), FakeHypervisor::new()).unwrap();
        let kept = || fs::read_dir(dir.path().join("software")).map_or(0, Iterator::count);
        let disk = MemoryDisk::from_vec(vec![7; 1 << 20]).unwrap().into_disk();
        let register = |name: &str, end: Result<()>| {
            let source = ImageSource::new(&disk).boot(DirectBoot::new(tiny_elf(), None, ""));
            let (inner, builder) = (&region.inner, Ami::<X86_64>::builder(name));
            let mut at_commit = 0;
            let also = |_: &mut _, _| {
                at_commit = kept();
                end
            };
            let made = inner.making(|| inner.import(*region.account(), builder, source, also));
            (made.is_ok(), at_commit, kept())
        };
        let failed = Err(Error::new(ErrorKind::Internal, "the store is gone"));
        assert_eq!(register("not", failed), (false, 1, 0));
        assert_eq!(register("web", Ok(())), (true, 1, 1));
    }

    #[test]
    fn a_reader_that_panics_has_read_nothing() {
        let bill = Bill::new(|| panic!("a reader of other people's")).unwrap();
        let refused = bill.packages().unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Unsupported);
        assert!(refused.to_string().contains("has panicked"), "{refused}");
    }

    /// It is read again, and nothing is said of the content.
    #[test]
    fn what_the_host_met_is_not_kept() {
        let met = Bill::new(|| Err(Error::new(ErrorKind::Internal, "the disk is gone"))).err().unwrap();
        assert_eq!(met.kind(), ErrorKind::Internal);
    }
}
