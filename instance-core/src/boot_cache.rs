//! The kernels and initial RAM disks of a region's images, ready to load.
//!
//! An image boots what its own root volume holds, as in EC2. Finding that and unpacking a compressed
//! kernel takes longer than the launch itself, so it is done when the image is registered. The
//! results are files named by their SHA-256: two images with one kernel share it. A symbolic link to what a kernel
//! unpacks to is named by the digest of the packed one, which an instance that starts again finds on its volume.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use ami_core::{Architecture, Digest};
use boot_image::{BootEntry, Kernel};
use serde::{Deserialize, Serialize};
use storage_block::Disk;

use crate::garbage::remove_any;
use crate::machine::{Boot, BootFile};
use crate::{Error, ErrorKind, Result};

/// How many files are kept open.
const MAX_OPEN: usize = 64;

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
    /// Those that were opened for launches, which share them.
    opened: Mutex<HashMap<Digest, BootFile>>,
}

impl BootCache {
    /// Opens the cache, made when it is not there; what a crash left half written goes.
    pub(crate) fn open(dir: PathBuf) -> Result<Self> {
        fs::create_dir_all(&dir).map_err(|e| Error::io(e, format!("cannot make {}", dir.display())))?;
        Ok(Self { dir, opened: Mutex::default() })
    }

    /// Finds what `disk` boots and keeps it.
    pub(crate) fn keep_from_disk(&self, disk: &Disk) -> Result<BootPlan> {
        let found = Found::on_disk(disk)?;
        self.keep(&found)
    }

    /// Keeps what was found.
    pub(crate) fn keep(&self, found: &Found) -> Result<BootPlan> {
        let kernel = self.keep_bytes(&found.kernel)?;
        if let Some(packed) = found.packed {
            self.link(packed, kernel)?;
        }
        Ok(BootPlan {
            architecture: found.architecture,
            kernel,
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
        let initrd = plan.initrd.map(|digest| self.file(digest)).transpose()?;
        Ok(Boot::new(self.file(plan.kernel)?, initrd, plan.command_line.clone()))
    }

    /// The file with this digest, which is opened once for all launches.
    fn file(&self, digest: Digest) -> Result<BootFile> {
        let mut files = self.opened();
        if let Some(file) = files.get(&digest) {
            return Ok(file.clone());
        }
        let path = self.path(digest);
        let opened = File::open(&path).and_then(BootFile::new);
        let file =
            opened.map_err(|e| Error::io(e, format!("cannot open the boot file {}", path.display())))?;
        // Each is a descriptor.
        if files.len() >= MAX_OPEN {
            files.clear();
        }
        files.insert(digest, file.clone());
        Ok(file)
    }

    // Nothing that is done under the lock panics half way.
    fn opened(&self) -> MutexGuard<'_, HashMap<Digest, BootFile>> {
        self.opened.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Finds what `disk` boots and opens it: in the cache if an image has the same, else as files without names. No
    /// record names it, and a guest that changes what it boots at each reboot must leave nothing behind.
    pub(crate) fn boot_from_disk(&self, disk: &Disk) -> Result<Boot> {
        let refused = |e| refused(e, "the disk");
        let entry = BootEntry::find(disk).map_err(refused)?;
        let kernel =
            self.open_kernel(&entry.kernel, || entry.unpack_kernel().map(|k| k.image).map_err(refused))?;
        let initrd = entry.initrd.as_deref().map(|bytes| self.open_bytes(bytes)).transpose()?;
        Ok(Boot::new(kernel, initrd, entry.command_line))
    }

    /// Opens what a kernel unpacks to, and unpacks it only if no image has the same.
    fn open_kernel<'k>(
        &self,
        packed: &'k [u8],
        unpack: impl FnOnce() -> Result<Cow<'k, [u8]>>,
    ) -> Result<BootFile> {
        let path = self.link_path(Digest::of(packed));
        match File::open(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => self.open_bytes(&unpack()?),
            opened => opened
                .and_then(BootFile::new)
                .map_err(|e| Error::io(e, format!("cannot open the boot file {}", path.display()))),
        }
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
        let keep: HashSet<Digest> = plans.flat_map(BootPlan::files).collect();
        let kept: HashSet<PathBuf> = keep.iter().map(|digest| self.path(*digest)).collect();
        let failed = |e| Error::io(e, format!("cannot clear {}", self.dir.display()));
        for entry in fs::read_dir(&self.dir).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            // A link stays with what it leads to.
            let is_link_to_kept = || fs::read_link(&path).is_ok_and(|to| kept.contains(&self.dir.join(to)));
            if !kept.contains(&path) && !is_link_to_kept() {
                remove_any(&path).map_err(failed)?;
            }
        }
        // What was opened before its file went goes too.
        self.opened().retain(|digest, _| keep.contains(digest));
        Ok(())
    }

    fn path(&self, digest: Digest) -> PathBuf {
        self.dir.join(digest.to_hex())
    }

    fn link_path(&self, packed: Digest) -> PathBuf {
        self.dir.join(format!("{}.unpacked", packed.to_hex()))
    }

    /// Has a packed kernel lead to what it unpacks to. A crash may lose that, which costs no more than to unpack it again.
    fn link(&self, packed: Digest, unpacked: Digest) -> Result<()> {
        let path = self.link_path(packed);
        match std::os::unix::fs::symlink(unpacked.to_hex(), &path) {
            Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => {
                Err(Error::io(e, format!("cannot make the link {}", path.display())))
            }
            _ => Ok(()),
        }
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
    /// The digest of what a disk has and this was unpacked from, if it was.
    packed: Option<Digest>,
    pub(crate) initrd: Option<Vec<u8>>,
    pub(crate) command_line: String,
}

impl Found {
    /// What a disk boots.
    pub(crate) fn on_disk(disk: &Disk) -> Result<Self> {
        let refused = |e| refused(e, "the disk");
        let entry = BootEntry::find(disk).map_err(refused)?;
        let kernel = entry.unpack_kernel().map_err(refused)?;
        let (packed, kernel) = (packed_digest(&entry.kernel, &kernel), kernel.into_owned());
        Ok(Self::new(kernel, packed, entry.initrd, entry.command_line))
    }

    /// A kernel as distributions ship it, unpacked.
    pub(crate) fn with_kernel(kernel: &[u8], initrd: Option<Vec<u8>>, command_line: String) -> Result<Self> {
        let kernel = boot_image::unpack_kernel(kernel).map_err(|e| refused(e, "the kernel"))?;
        Ok(Self::new(kernel, None, initrd, command_line))
    }

    fn new(
        kernel: Kernel<'_>,
        packed: Option<Digest>,
        initrd: Option<Vec<u8>>,
        command_line: String,
    ) -> Self {
        let Kernel { architecture, image, .. } = kernel;
        Self { architecture, kernel: image.into_owned(), packed, initrd, command_line }
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

/// The digest of a kernel file, if it had to be unpacked.
fn packed_digest(bytes: &[u8], kernel: &Kernel<'_>) -> Option<Digest> {
    matches!(kernel.image, Cow::Owned(_)).then(|| Digest::of(bytes))
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
    use std::cell::Cell;
    use std::sync::Arc;

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
                let opened = cache.open_bytes(&found.kernel).unwrap();
                assert_eq!(opened.read().unwrap(), tiny_elf());
            }
        });
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "what only a guest has is not kept");

        // What an image has is not written again.
        let kept = cache.keep(&found).unwrap();
        let opened = cache.open_bytes(&found.kernel).unwrap();
        assert_eq!(opened.read().unwrap(), tiny_elf());
        assert_eq!(inode(&opened), inode(&cache.boot(&kept).unwrap().kernel));
    }

    #[test]
    fn a_file_is_opened_once_and_let_go_with_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let cache = BootCache::open(dir.path().to_owned()).unwrap();
        let plan = cache.keep(&Found::with_kernel(&tiny_elf(), None, String::new()).unwrap()).unwrap();
        let open = || cache.boot(&plan).unwrap().kernel;
        assert!(Arc::ptr_eq(open().file(), open().file()));
        cache.remove_unreferenced([&plan].into_iter()).unwrap();
        assert_eq!(cache.opened().len(), 1);
        cache.remove_unreferenced(std::iter::empty()).unwrap();
        assert_eq!(cache.opened().len(), 0);
    }

    fn inode(file: &BootFile) -> u64 {
        use std::os::unix::fs::MetadataExt as _;
        file.file().metadata().unwrap().ino()
    }

    /// An instance that starts finds its image's kernel packed, each time.
    #[test]
    fn a_kernel_is_unpacked_once() {
        let dir = tempfile::tempdir().unwrap();
        let cache = BootCache::open(dir.path().to_owned()).unwrap();
        let (packed, unpacks) = (b"packed", Cell::new(0));
        let open = |packed| {
            let unpack = || {
                unpacks.set(unpacks.get() + 1);
                Ok(Cow::Owned(tiny_elf()))
            };
            let opened = cache.open_kernel(packed, unpack).unwrap();
            assert_eq!(opened.read().unwrap(), tiny_elf());
            inode(&opened)
        };
        open(packed);
        assert_eq!(unpacks.get(), 1, "no image has it");
        let kernel = boot_image::unpack_kernel(&tiny_elf()).unwrap().into_owned();
        let found = Found::new(kernel, Some(Digest::of(packed)), None, String::new());
        let kept = [cache.keep(&found).unwrap(), cache.keep(&found).unwrap()];
        assert_eq!(open(packed), inode(&cache.boot(&kept[0]).unwrap().kernel));
        assert_eq!(unpacks.get(), 1);
        open(b"another");
        assert_eq!(unpacks.get(), 2);
        cache.remove_unreferenced(kept.iter()).unwrap();
        open(packed);
        assert_eq!(unpacks.get(), 2, "it is kept with what it leads to");
        cache.remove_unreferenced(std::iter::empty()).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "and goes with it");
        open(packed);
        assert_eq!(unpacks.get(), 3);
    }

    /// What the link is named by is what an image's disk has.
    #[test]
    fn only_what_was_packed_has_another_digest() {
        let elf = tiny_elf();
        let as_it_is = boot_image::unpack_kernel(&elf).unwrap();
        assert_eq!(packed_digest(&elf, &as_it_is), None);
        assert_eq!(packed_digest(b"packed", &as_it_is.into_owned()), Some(Digest::of(b"packed")));
    }
}
