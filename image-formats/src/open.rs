//! Opening an image as a disk.

use std::path::Path;

use storage_block::{Disk, RawFile};

use crate::source::Source;
use crate::{Error, ErrorKind, Format, Result, qcow2, vmdk};

/// The largest disk that is opened unless the caller says otherwise; what a store takes.
const MAX_SIZE: u64 = 64 << 40;

/// Opens an image as a disk that can only be read.
///
/// What `open` does with [`OpenOptions`] as they are: the disk may have 64 TiB, and no file is opened but the one
/// named.
///
/// ```
/// use image_formats::{ExportOptions, Format, export, open};
/// use storage_block::{MemoryDisk, Store};
/// # use std::ops::ControlFlow;
///
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("debian.qcow2");
/// # let disk = MemoryDisk::from_vec(vec![7; 1 << 20])?.into_disk();
/// # export(&disk, &path, &ExportOptions::new(Format::Qcow2), &mut |_| ControlFlow::Continue(()))?;
/// let image = open(&path, Format::Qcow2)?;
/// assert!(image.read_only());
/// let store = Store::open(dir.path().join("store"))?;
/// let (snapshot, _) = store.import(&image, &mut |_| ())?;
/// # assert_eq!(snapshot.size(), 1 << 20);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
///
/// As [`OpenOptions::open`].
pub fn open(path: impl AsRef<Path>, format: Format) -> Result<Disk> {
    OpenOptions::new().open(path, format)
}

/// What an image may be and do.
///
/// ```
/// use image_formats::{ErrorKind, Format, OpenOptions};
///
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("disk.raw");
/// # std::fs::File::create(&path)?.set_len(1 << 30)?;
/// let small = OpenOptions::new().max_size(512 << 20);
/// assert_eq!(small.open(&path, Format::Raw).err().map(|e| e.kind()), Some(ErrorKind::TooLarge));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct OpenOptions {
    pub(crate) max_size: u64,
    pub(crate) extents_beside: bool,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self::new()
    }
}

impl OpenOptions {
    /// A disk of at most 64 TiB, in one file.
    pub fn new() -> Self {
        Self { max_size: MAX_SIZE, extents_beside: false }
    }

    /// Refuses disks of more bytes.
    ///
    /// It also bounds the time that reading the whole disk can take: an image of a few kilobytes can unpack to a disk
    /// of any size.
    pub fn max_size(mut self, bytes: u64) -> Self {
        self.max_size = bytes;
        self
    }

    /// Lets a VMDK image have its extents in other files, which must lie in its own directory.
    ///
    /// Whoever made the image says which files of that directory these are, so it should hold nothing else. A
    /// name with a directory in it and a symbolic link are refused all the same.
    ///
    /// ```
    /// use image_formats::{ErrorKind, Format, OpenOptions};
    ///
    /// # let dir = tempfile::tempdir()?;
    /// let path = dir.path().join("disk.vmdk");
    /// std::fs::write(&path, "# Disk DescriptorFile\nversion=1\nCID=1234abcd\nparentCID=ffffffff\n\
    ///     createType=\"monolithicFlat\"\nRW 2048 FLAT \"disk-flat.vmdk\" 0\n")?;
    /// std::fs::File::create(dir.path().join("disk-flat.vmdk"))?.set_len(1 << 20)?;
    /// let alone = OpenOptions::new().open(&path, Format::Vmdk);
    /// assert_eq!(alone.err().map(|e| e.kind()), Some(ErrorKind::OtherFile));
    /// let both = OpenOptions::new().extents_beside(true).open(&path, Format::Vmdk)?;
    /// assert_eq!(both.size(), 1 << 20);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn extents_beside(mut self, allowed: bool) -> Self {
        self.extents_beside = allowed;
        self
    }

    /// Opens an image as a disk that can only be read, and that knows its holes.
    ///
    /// What describes the image is checked here; tables that say where data lies are checked as they are
    /// read, and what they get wrong is then [`Corrupt`](storage_block::ErrorKind::Corrupt). The size of
    /// a disk is rounded up to whole sectors, with zeroes, but for that of a raw image, which has to be of whole sectors.
    ///
    /// # Errors
    ///
    /// [`Corrupt`](ErrorKind::Corrupt), [`Unsupported`](ErrorKind::Unsupported),
    /// [`OtherFile`](ErrorKind::OtherFile), [`Encrypted`](ErrorKind::Encrypted),
    /// [`TooLarge`](ErrorKind::TooLarge), [`NotFound`](ErrorKind::NotFound), or what the system said.
    pub fn open(&self, path: impl AsRef<Path>, format: Format) -> Result<Disk> {
        let path = path.as_ref();
        let opened = Source::open(path).and_then(|source| self.open_source(source, format, path.parent()));
        opened.map_err(|e| e.about(path.display()))
    }

    /// Opens what lies in a file; `directory` is where its extents may be.
    pub(crate) fn open_source(
        &self,
        source: Source,
        format: Format,
        directory: Option<&Path>,
    ) -> Result<Disk> {
        match format {
            Format::Raw => {
                self.check_size(source.len())?;
                let name = source.name().to_owned();
                let raw = RawFile::from_file(source.into_file(), true);
                raw.map(|raw| raw.named(name).into_disk())
                    .map_err(|e| Error::disk(e, "cannot be a raw image"))
            }
            Format::Qcow2 => qcow2::open(source, self),
            Format::Vmdk => vmdk::open(source, self, directory.filter(|_| self.extents_beside)),
        }
    }

    pub(crate) fn check_size(&self, size: u64) -> Result<()> {
        if size > self.max_size {
            let context = format!("the disk has {size} bytes; at most {} are taken", self.max_size);
            return Err(Error::new(ErrorKind::TooLarge, context));
        }
        Ok(())
    }
}
