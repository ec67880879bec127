//! Bills that are kept, each by the digest of the content that it is of.
//!
//! A file is as good as what is read from the image again: it is not synchronised, and one that is not whole is none.

use std::fs;
use std::io::{self, Write};
use std::path::Path;
use std::sync::PoisonError;

use ami_core::{Digest, Image};
use serde::{Deserialize, Serialize};
use storage_block::Snapshot;

use super::{InstalledPackage, installed};
use crate::error::chain;
use crate::region::Inner;
use crate::{Error, ErrorKind, Result};

/// The longest bill that is kept. A large Debian system's has some 500 KiB.
const MAX_KEPT: usize = 16 << 20;

/// A bill as it is written, behind the digest of this.
#[derive(Serialize, Deserialize)]
struct Bill {
    /// Name, version and architecture of each.
    packages: Vec<(String, String, String)>,
}

impl Inner {
    /// Reads what is installed on the root volume of an image that is being registered, and keeps it. What comes in the way
    /// of that is no reason not to register it. Whoever calls keeps the content from being collected.
    pub(crate) fn keep_software(&self, content: &Snapshot) {
        let path = self.paths.software_bill(&content.digest());
        if content.encrypted() || path.exists() {
            return;
        }
        // Of what was stored, not of the disk that it came from, which may have been written to meanwhile.
        match installed(&content.disk()) {
            Ok(packages) => keep(&path, &packages),
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
        if let Some(packages) = read(&path) {
            return Ok(packages);
        }
        // Neither the content goes meanwhile, nor, once it is kept for an image that is there, the bill.
        let _making = self.making_images.read().unwrap_or_else(PoisonError::into_inner);
        let content = self.content(content).inspect_err(|e| self.look_for_damage(image.id(), e))?;
        let packages = installed(&content.disk())?;
        if !content.encrypted() && self.image(image.id()).is_ok() {
            keep(&path, &packages);
        }
        Ok(packages)
    }
}

/// A bill that is kept and whole.
fn read(path: &Path) -> Option<Vec<InstalledPackage>> {
    let file = fs::read(path).ok()?;
    let (digest, json) = file.split_at_checked(32)?;
    if Digest::of(json).as_bytes() != digest {
        return None;
    }
    let bill: Bill = serde_json::from_slice(json).ok()?;
    let package = |(name, version, architecture)| InstalledPackage { name, version, architecture };
    Some(bill.packages.into_iter().map(package).collect())
}

fn keep(path: &Path, packages: &[InstalledPackage]) {
    if let Err(e) = write(path, packages) {
        tracing::debug!(path = %path.display(), error = %e, "cannot keep a bill of software");
    }
}

fn write(path: &Path, packages: &[InstalledPackage]) -> io::Result<()> {
    let text = |package: &InstalledPackage| {
        (package.name.clone(), package.version.clone(), package.architecture.clone())
    };
    let json = serde_json::to_vec(&Bill { packages: packages.iter().map(text).collect() })?;
    let Some(dir) = path.parent().filter(|_| json.len() <= MAX_KEPT) else { return Ok(()) };
    fs::create_dir_all(dir)?;
    let mut file = tempfile::NamedTempFile::new_in(dir)?;
    file.write_all(Digest::of(&json).as_bytes())?;
    file.write_all(&json)?;
    file.persist(path)?;
    Ok(())
}
