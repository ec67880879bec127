//! The kernels and initial RAM disks of a region's images, ready to load.
//!
//! An image boots what its own root volume holds, as in EC2. Finding that and unpacking a compressed
//! kernel takes longer than the launch itself, so it is done when the image is registered. The
//! results are files named by their SHA-256: two images with one kernel share it.

use std::collections::HashSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use ami_core::{Architecture, Digest};
use boot_image::{BootEntry, Kernel};
use serde::{Deserialize, Serialize};
use storage_block::Disk;

use crate::garbage::remove_any;
use crate::machine::{Boot, BootFile};
use crate::{Error, ErrorKind, Result};

/// What is to be loaded, by digests of files in the cache.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct BootPlan {
    pub(crate) architecture: Architecture,
    pub(crate) kernel: Digest,
    pub(crate) initrd: Option<Digest>,
    pub(crate) command_line: String,
}

impl BootPlan {
    fn files(&self) -> impl Iterator<Item = Digest> {
        [Some(self.kernel), self.initrd].into_iter().flatten()
    }
}

/// The directory of those files.
#[derive(Debug)]
pub(crate) struct BootCache {
    dir: PathBuf,
}

impl BootCache {
    /// Opens the cache, made when it is not there; what a crash left half written goes.
    pub(crate) fn open(dir: PathBuf) -> Result<Self> {
        fs::create_dir_all(&dir).map_err(|e| Error::io(e, format!("cannot make {}", dir.display())))?;
        Ok(Self { dir })
    }

    /// Finds what `disk` boots and keeps it.
    pub(crate) fn keep_from_disk(&self, disk: &Disk) -> Result<BootPlan> {
        let found = Found::on_disk(disk)?;
        self.keep(&found)
    }

    /// Keeps what was found.
    pub(crate) fn keep(&self, found: &Found) -> Result<BootPlan> {
        Ok(BootPlan {
            architecture: found.architecture,
            kernel: self.keep_bytes(&found.kernel)?,
            initrd: found.initrd.as_deref().map(|bytes| self.keep_bytes(bytes)).transpose()?,
            command_line: found.command_line.clone(),
        })
    }

    /// Keeps what a plan names of another region's, which is open.
    pub(crate) fn copy_of(&self, plan: BootPlan, boot: &Boot) -> Result<BootPlan> {
        for (file, digest) in
            [Some(&boot.kernel), boot.initrd.as_ref()].into_iter().flatten().zip(plan.files())
        {
            let bytes = file.read().map_err(|e| Error::io(e, "cannot read a boot file"))?;
            if self.keep_bytes(&bytes)? != digest {
                let what = format!("the boot file {digest} of the other region is damaged");
                return Err(Error::new(ErrorKind::Corrupt, what));
            }
        }
        Ok(plan)
    }

    /// Opens what a plan names.
    pub(crate) fn boot(&self, plan: &BootPlan) -> Result<Boot> {
        let open = |digest: Digest| {
            let path = self.path(digest);
            let opened = File::open(&path).and_then(BootFile::new);
            opened.map_err(|e| Error::io(e, format!("cannot open the boot file {}", path.display())))
        };
        let initrd = plan.initrd.map(open).transpose()?;
        Ok(Boot::new(open(plan.kernel)?, initrd, plan.command_line.clone()))
    }

    /// Finds what `disk` boots and opens it.
    pub(crate) fn boot_from_disk(&self, disk: &Disk) -> Result<Boot> {
        self.boot_found(&Found::on_disk(disk)?)
    }

    /// Opens what was found: in the cache if an image has the same, else as files without names. No
    /// record names it, and a guest that changes what it boots at each reboot must leave nothing behind.
    fn boot_found(&self, found: &Found) -> Result<Boot> {
        let kernel = self.open_bytes(&found.kernel)?;
        let initrd = found.initrd.as_deref().map(|bytes| self.open_bytes(bytes)).transpose()?;
        Ok(Boot::new(kernel, initrd, found.command_line.clone()))
    }

    fn open_bytes(&self, bytes: &[u8]) -> Result<BootFile> {
        let open = || match File::open(self.path(Digest::of(bytes))) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                let file = tempfile::tempfile_in(&self.dir)?;
                boot_image::write_sparse(&file, bytes)?;
                BootFile::new(file)
            }
            opened => BootFile::new(opened?),
        };
        open().map_err(|e| Error::io(e, format!("cannot open a boot file in {}", self.dir.display())))
    }

    /// Removes every file that no plan names.
    pub(crate) fn remove_unreferenced<'a>(&self, plans: impl Iterator<Item = &'a BootPlan>) -> Result<()> {
        let keep: HashSet<PathBuf> = plans.flat_map(BootPlan::files).map(|d| self.path(d)).collect();
        let failed = |e| Error::io(e, format!("cannot clear {}", self.dir.display()));
        for entry in fs::read_dir(&self.dir).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            if !keep.contains(&path) {
                remove_any(&path).map_err(failed)?;
            }
        }
        Ok(())
    }

    fn path(&self, digest: Digest) -> PathBuf {
        self.dir.join(digest.to_hex())
    }

    fn keep_bytes(&self, bytes: &[u8]) -> Result<Digest> {
        let digest = Digest::of(bytes);
        let path = self.path(digest);
        if !path.exists() {
            write_durably(&self.dir, &path, bytes)
                .map_err(|e| Error::io(e, format!("cannot keep the boot file {}", path.display())))?;
        }
        Ok(digest)
    }
}

/// Writes a file so that it is there whole, or not at all, after a crash.
fn write_durably(dir: &Path, path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let file = tempfile::NamedTempFile::new_in(dir)?;
    boot_image::write_sparse(file.as_file(), bytes)?;
    file.as_file().sync_data()?;
    file.persist(path)?;
    File::open(dir)?.sync_all()
}

/// A kernel that can be loaded, and what goes with it, not kept yet.
pub(crate) struct Found {
    pub(crate) architecture: Architecture,
    pub(crate) kernel: Vec<u8>,
    pub(crate) initrd: Option<Vec<u8>>,
    pub(crate) command_line: String,
}

impl Found {
    /// What a disk boots.
    pub(crate) fn on_disk(disk: &Disk) -> Result<Self> {
        let refused = |e| refused(e, "the disk");
        let entry = BootEntry::find(disk).map_err(refused)?;
        let kernel = entry.unpack_kernel().map_err(refused)?.into_owned();
        Ok(Self::new(kernel, entry.initrd, entry.command_line))
    }

    /// A kernel as distributions ship it, unpacked.
    pub(crate) fn with_kernel(kernel: &[u8], initrd: Option<Vec<u8>>, command_line: String) -> Result<Self> {
        let kernel = boot_image::unpack_kernel(kernel).map_err(|e| refused(e, "the kernel"))?;
        Ok(Self::new(kernel, initrd, command_line))
    }

    fn new(kernel: Kernel<'_>, initrd: Option<Vec<u8>>, command_line: String) -> Self {
        Self { architecture: kernel.architecture, kernel: kernel.image.into_owned(), initrd, command_line }
    }

    /// Refuses a kernel of another architecture than the image's.
    pub(crate) fn check_architecture(&self, image: Architecture) -> Result<()> {
        if self.architecture == image {
            return Ok(());
        }
        let kernel = self.architecture;
        let what =
            format!("the image is for {image}, but its kernel is for {kernel}; register it as {kernel}");
        Err(Error::new(ErrorKind::ArchitectureMismatch, what))
    }
}

/// Why `what` cannot be booted, with what can be done about it.
fn refused(e: boot_image::Error, what: &str) -> Error {
    use boot_image::ErrorKind as Boot;
    let (kind, advice) = match e.kind() {
        Boot::NoPartition | Boot::NoFileSystem => (
            ErrorKind::NotBootable,
            "give it an ext4 file system with a kernel in /boot, or register it with a kernel beside it",
        ),
        Boot::NoKernel => (ErrorKind::NotBootable, "give it one, or register it with a kernel beside it"),
        Boot::WrongArchitecture => (ErrorKind::ArchitectureMismatch, "take one for i386, x86_64 or arm64"),
        Boot::Corrupt => (ErrorKind::NotBootable, "it is damaged; make the image again"),
        Boot::Io => (ErrorKind::Internal, "it cannot be read"),
        _ => (ErrorKind::NotBootable, "take one that this library reads"),
    };
    Error::new(kind, format!("{what} cannot be booted: {advice}")).with_source(e)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::tiny_elf;

    /// An instance that starts boots what no record names, while others are cleared away.
    #[test]
    fn what_is_being_opened_is_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        let cache = BootCache::open(dir.path().to_owned()).unwrap();
        let found = Found::with_kernel(&tiny_elf(), None, String::new()).unwrap();
        std::thread::scope(|scope| {
            let clearing = scope.spawn(|| {
                for _ in 0..300 {
                    cache.remove_unreferenced(std::iter::empty()).unwrap();
                }
            });
            while !clearing.is_finished() {
                let boot = cache.boot_found(&found).unwrap();
                assert_eq!(boot.kernel.read().unwrap(), tiny_elf());
            }
        });
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "what only a guest has is not kept");

        // What an image has is not written again.
        let kept = cache.keep(&found).unwrap();
        let boot = cache.boot_found(&found).unwrap();
        assert_eq!(boot.kernel.read().unwrap(), tiny_elf());
        let (inode, named) = (|file: &File| file.metadata().unwrap(), cache.boot(&kept).unwrap());
        use std::os::unix::fs::MetadataExt as _;
        assert_eq!(inode(boot.kernel.file()).ino(), inode(named.kernel.file()).ino());
    }
}
