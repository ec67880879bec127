//! Writing a disk as an image.

use std::fs::{File, Permissions};
use std::ops::ControlFlow;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;

use storage_block::Disk;

use crate::source::is_zero;
use crate::{Error, ErrorKind, Format, Result, qcow2, vmdk};

/// How the data in an image is packed.
///
/// ```
/// use image_formats::{Compression, ErrorKind, ExportOptions, Format, export};
/// use std::ops::ControlFlow;
/// use storage_block::MemoryDisk;
///
/// # let dir = tempfile::tempdir()?;
/// let disk = MemoryDisk::new(1 << 20)?.into_disk();
/// let options = ExportOptions::new(Format::Vmdk).compression(Compression::Zstd);
/// let refused = export(&disk, dir.path().join("x.vmdk"), &options, &mut |_| ControlFlow::Continue(()));
/// assert_eq!(refused.err().map(|e| e.kind()), Some(ErrorKind::InvalidOption), "VMDK knows zlib alone");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Compression {
    /// Not at all.
    None,
    /// Deflate (RFC 1951), which every reader of the format knows.
    Zlib,
    /// Zstandard (RFC 8878), which QEMU knows in qcow2 since version 5.1 and unpacks faster. It is packed by pure Rust
    /// that has one level, and becomes larger than with zlib: 53 MiB instead of 41 of 128 MiB of shared libraries.
    Zstd,
}

/// How a disk is to be written as an image.
///
/// ```
/// use image_formats::{Compression, ExportOptions, Format};
///
/// // Small, and what any QEMU reads.
/// let small = ExportOptions::new(Format::Qcow2).compression(Compression::Zlib);
/// // What EC2's VM import and vSphere take: streamOptimized.
/// let stream = ExportOptions::new(Format::Vmdk);
/// // What VMware's desktop products use as it is: monolithicSparse.
/// let sparse = ExportOptions::new(Format::Vmdk).compression(Compression::None);
/// # let _ = (small, stream, sparse);
/// ```
#[derive(Debug, Clone)]
pub struct ExportOptions {
    format: Format,
    compression: Option<Compression>,
    cluster_size: Option<u64>,
    replace: bool,
}

impl ExportOptions {
    /// An image of this format: raw and qcow2 without compression, VMDK with (streamOptimized).
    pub fn new(format: Format) -> Self {
        Self { format, compression: None, cluster_size: None, replace: false }
    }

    /// How the data is packed. qcow2 has all three ways; VMDK is monolithicSparse without and streamOptimized with
    /// zlib.
    pub fn compression(mut self, compression: Compression) -> Self {
        self.compression = Some(compression);
        self
    }

    /// How large the clusters of a qcow2 image are: a power of two from 512 bytes to 2 MiB; 64 KiB if not said.
    ///
    /// ```
    /// use image_formats::{ExportOptions, Format};
    ///
    /// let fewer_tables = ExportOptions::new(Format::Qcow2).cluster_size(2 << 20);
    /// # let _ = fewer_tables;
    /// ```
    pub fn cluster_size(mut self, bytes: u64) -> Self {
        self.cluster_size = Some(bytes);
        self
    }

    /// Puts the image in the place of a file that is there already, when it is complete; otherwise that is an error.
    pub fn replace(mut self, replace: bool) -> Self {
        self.replace = replace;
        self
    }

    fn writer(&self, file: File, size: u64, name: &Path) -> Result<Box<dyn Write>> {
        let invalid = |what: &str| Error::new(ErrorKind::InvalidOption, what);
        if self.format != Format::Qcow2 && self.cluster_size.is_some() {
            return Err(invalid("only a qcow2 image has clusters"));
        }
        if self.format != Format::Raw && size == 0 {
            return Err(invalid("a disk without bytes can only be exported as a raw image"));
        }
        Ok(match (self.format, self.compression) {
            (Format::Raw, None | Some(Compression::None)) => Box::new(Raw { file, size }),
            (Format::Raw, Some(_)) => return Err(invalid("a raw image cannot be compressed")),
            (Format::Qcow2, compression) => {
                let compression = compression.unwrap_or(Compression::None);
                let options = qcow2::Options::new(self.cluster_size.unwrap_or(64 << 10), compression)?;
                Box::new(qcow2::Writer::new(file, size, options)?)
            }
            (Format::Vmdk, None | Some(Compression::Zlib)) => {
                Box::new(vmdk::Writer::new(file, size, name, vmdk::Kind::StreamOptimized)?)
            }
            (Format::Vmdk, Some(Compression::None)) => {
                Box::new(vmdk::Writer::new(file, size, name, vmdk::Kind::MonolithicSparse)?)
            }
            (Format::Vmdk, Some(Compression::Zstd)) => {
                return Err(invalid("a VMDK image cannot be compressed with Zstandard"));
            }
        })
    }
}

/// How far an export has come.
///
/// ```
/// use image_formats::{ErrorKind, ExportOptions, Format, Progress, export};
/// use std::ops::ControlFlow;
/// use storage_block::MemoryDisk;
///
/// # let dir = tempfile::tempdir()?;
/// let path = dir.path().join("disk.raw");
/// let disk = MemoryDisk::from_vec(vec![7; 8 << 20])?.into_disk();
/// let mut half = |p: Progress| {
///     if p.done * 2 < p.total { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
/// };
/// let stopped = export(&disk, &path, &ExportOptions::new(Format::Raw), &mut half);
/// assert_eq!(stopped.err().map(|e| e.kind()), Some(ErrorKind::Cancelled));
/// assert!(!path.exists());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// Bytes of the disk behind us, holes with them.
    pub done: u64,
    /// Bytes of the disk.
    pub total: u64,
}

/// What an export has made.
///
/// ```
/// use image_formats::{ExportOptions, Format, export};
/// use std::ops::ControlFlow;
/// use storage_block::MemoryDisk;
///
/// # let dir = tempfile::tempdir()?;
/// let disk = MemoryDisk::new(1 << 30)?.into_disk();
/// disk.write_at(b"hello", 512 << 20)?;
/// let path = dir.path().join("disk.qcow2");
/// let stats =
///     export(&disk, path, &ExportOptions::new(Format::Qcow2), &mut |_| ControlFlow::Continue(()))?;
/// assert_eq!((stats.size, stats.data_bytes), (1 << 30, 64 << 10));
/// assert!(stats.file_bytes < 1 << 20);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ExportStats {
    /// The size of the disk.
    pub size: u64,
    /// Bytes of the disk that were not zero, in whole clusters.
    pub data_bytes: u64,
    /// Bytes that the image takes in its file system.
    pub file_bytes: u64,
}

/// Writes a disk, which should not change meanwhile, as an image.
///
/// Holes are not read and zeroes not written. The image is written under another name in the same directory and gets
/// its own when it is complete and durable; after an error nothing is left of it. `progress` is called about once for
/// every megabyte; when it breaks, the export stops.
///
/// ```
/// use image_formats::{Compression, ExportOptions, Format, export, open};
/// use std::ops::ControlFlow;
/// use storage_block::MemoryDisk;
///
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("disk.qcow2");
/// let disk = MemoryDisk::from_vec(vec![7; 1 << 20])?.into_disk();
/// let options = ExportOptions::new(Format::Qcow2).compression(Compression::Zstd);
/// let stats = export(&disk, &path, &options, &mut |progress| {
///     println!("{} of {}", progress.done, progress.total);
///     ControlFlow::Continue(())
/// })?;
/// assert_eq!(stats.data_bytes, 1 << 20);
/// assert_eq!(open(&path, Format::Qcow2)?.size(), disk.size());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
///
/// [`InvalidOption`](ErrorKind::InvalidOption), [`AlreadyExists`](ErrorKind::AlreadyExists),
/// [`Cancelled`](ErrorKind::Cancelled), [`NoSpace`](ErrorKind::NoSpace), [`TooLarge`](ErrorKind::TooLarge) for a VMDK
/// image with more than 2 TiB of data, what the disk says to being read, or what the system said.
pub fn export(
    disk: &Disk,
    path: impl AsRef<Path>,
    options: &ExportOptions,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<ExportStats> {
    let path = path.as_ref();
    write(disk, path, options, progress).map_err(|e| e.about(path.display()))
}

/// What writes a format. Units of data come in ascending order, each once.
pub(crate) trait Write {
    /// How many bytes `put` takes.
    fn unit(&self) -> u64;

    /// Writes a unit that is not all zeroes. The last of the disk is filled up with zeroes.
    fn put(&mut self, offset: u64, bytes: &[u8]) -> Result<()>;

    /// Writes what is left.
    fn finish(&mut self) -> Result<()>;
}

fn write(
    disk: &Disk,
    path: &Path,
    options: &ExportOptions,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<ExportStats> {
    let Some(name) = path.file_name() else {
        return Err(Error::new(ErrorKind::InvalidOption, "the path names no file"));
    };
    if !options.replace && path.symlink_metadata().is_ok() {
        return Err(Error::new(ErrorKind::AlreadyExists, "is there already"));
    }
    let directory = path.parent().filter(|path| !path.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // As for any new file, the process's mask says who may read it.
    let temporary = tempfile::Builder::new()
        .prefix(".export-")
        .permissions(Permissions::from_mode(0o666))
        .tempfile_in(directory)
        .map_err(|e| Error::io(e, "cannot be created"))?;
    let file = temporary.as_file().try_clone().map_err(|e| Error::io(e, "cannot be created"))?;
    // Asked once: it may grow meanwhile.
    let size = disk.size();
    let mut writer = options.writer(file, size, Path::new(name))?;
    let data_bytes = copy(disk, size, &mut *writer, progress)?;
    writer.finish()?;

    let unfinished = |e| Error::io(e, "cannot be made durable");
    temporary.as_file().sync_all().map_err(unfinished)?;
    let file_bytes = temporary.as_file().metadata().map_err(unfinished)?.blocks() * 512;
    let persisted = if options.replace { temporary.persist(path) } else { temporary.persist_noclobber(path) };
    persisted.map_err(|e| Error::io(e.error, "cannot be given its name"))?;
    File::open(directory).and_then(|directory| directory.sync_all()).map_err(unfinished)?;
    Ok(ExportStats { size, data_bytes, file_bytes })
}

/// Gives the writer all of the first `total` bytes that is not zero; says how much that was.
fn copy(
    disk: &Disk,
    total: u64,
    writer: &mut dyn Write,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<u64> {
    let unit = writer.unit();
    let step = unit.max(1 << 20);
    let mut report = |done| match progress(Progress { done, total }) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(Error::new(ErrorKind::Cancelled, "the export was cancelled")),
    };
    let unreadable = |e| Error::disk(e, "the disk cannot be read");
    let mut buf = vec![0; step as usize];
    let (mut done, mut data) = (0, 0);
    while let Some(found) = disk.next_data(done).map_err(unreadable)?.filter(|found| found.start < total) {
        // Ranges may meet within a unit: whole units are read, and none twice.
        let mut at = (found.start / unit * unit).max(done);
        let end = found.end.next_multiple_of(unit).min(total);
        while at < end {
            let len = (end - at).min(step) as usize;
            disk.read_at(&mut buf[..len], at).map_err(unreadable)?;
            let padded = len.next_multiple_of(unit as usize);
            buf[len..padded].fill(0);
            for (part, offset) in buf[..padded].chunks_exact(unit as usize).zip((at..).step_by(unit as usize))
            {
                if !is_zero(part) {
                    writer.put(offset, part)?;
                    data += unit;
                }
            }
            at += len as u64;
            report(at)?;
        }
        done = end;
    }
    report(total)?;
    Ok(data)
}

/// A raw image.
struct Raw {
    file: File,
    size: u64,
}

impl Write for Raw {
    fn unit(&self) -> u64 {
        64 << 10
    }

    fn put(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        let len = (self.size - offset).min(bytes.len() as u64) as usize;
        self.file.write_all_at(&bytes[..len], offset).map_err(|e| Error::io(e, "cannot be written"))
    }

    fn finish(&mut self) -> Result<()> {
        self.file.set_len(self.size).map_err(|e| Error::io(e, "cannot be written"))
    }
}
