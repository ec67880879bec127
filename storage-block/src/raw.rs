//! A disk that is a file or a block device, byte for byte.

mod device;

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use crate::buffer::write_all_at;
use crate::format::BLOCK;
use crate::{BlockBackend, Capabilities, Disk, Error, ErrorKind, Extent, IoBuf, Result, SECTOR};

/// Where the file system knows no holes, it costs more, and that shows only when it is asked.
const OF_A_FILE: Capabilities = Capabilities {
    discard_frees: true,
    cheap_zeroes: true,
    knows_holes: true,
    in_files: true,
    ..Capabilities::LEAST
};

/// A raw image: byte `n` of the disk is byte `n` of the file.
///
/// ```
/// use storage_block::RawFile;
///
/// # let dir = tempfile::tempdir()?;
/// let path = dir.path().join("disk.raw");
/// let disk = RawFile::create(&path, 1 << 20)?.into_disk();
/// disk.write_at(b"hello", 512)?;
/// disk.flush()?;
/// assert!(RawFile::open(&path, true)?.into_disk().read_only());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct RawFile {
    file: File,
    /// What errors call it.
    name: String,
    size: u64,
    read_only: bool,
    capabilities: Capabilities,
    /// A synchronisation has failed.
    failed: AtomicBool,
}

impl RawFile {
    /// Opens an image or a block device.
    ///
    /// # Errors
    ///
    /// [`NotFound`](ErrorKind::NotFound), what the system said to opening it, or what
    /// [`from_file`](Self::from_file) finds wrong.
    pub fn open(path: impl AsRef<Path>, read_only: bool) -> Result<Self> {
        let path = path.as_ref();
        let opened = OpenOptions::new().read(true).write(!read_only).open(path);
        let file = opened.map_err(|e| Error::io(e, format!("cannot open {}", path.display())))?;
        Self::from_file(file, read_only)
            .map(|raw| raw.named(path.display()))
            .map_err(|e| Error::with_source(e.kind(), format!("{} is no disk", path.display()), e))
    }

    /// Takes an open file, whose size is fixed from here on.
    ///
    /// ```
    /// use storage_block::RawFile;
    ///
    /// let file = tempfile::tempfile()?; // without a name: it goes with the disk
    /// file.set_len(1 << 20)?;
    /// let disk = RawFile::from_file(file, false)?.into_disk();
    /// assert_eq!(disk.size(), 1 << 20);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidSize`](ErrorKind::InvalidSize) if its size is not a multiple of [`SECTOR`];
    /// [`Io`](ErrorKind::Io) if it is neither a file nor a block device.
    pub fn from_file(mut file: File, read_only: bool) -> Result<Self> {
        let metadata = file.metadata().map_err(|e| Error::io(e, "cannot look at the image"))?;
        let (size, capabilities) = if metadata.is_file() {
            (metadata.len(), of_a_file(&file, metadata.len(), read_only))
        } else if metadata.file_type().is_block_device() {
            let size = file.seek(SeekFrom::End(0));
            let size = size.map_err(|e| Error::io(e, "cannot learn the device's size"))?;
            (size, device::capabilities(&file, metadata.rdev()))
        } else {
            return Err(Error::new(ErrorKind::Io, "the image is neither a file nor a block device"));
        };
        if size % SECTOR != 0 {
            return Err(Error::invalid_size(size, "is not a multiple of 512 bytes"));
        }
        let (name, failed) = ("the image".to_owned(), AtomicBool::new(false));
        Ok(Self { file, name, size, read_only, capabilities, failed })
    }

    /// Has errors call it by this name, which is that of its file unless it came [without](Self::from_file).
    ///
    /// ```
    /// use storage_block::RawFile;
    ///
    /// let file = tempfile::tempfile()?;
    /// file.set_len(1 << 20)?;
    /// let disk = RawFile::from_file(file.try_clone()?, true)?.named("the upload").into_disk();
    /// file.set_len(0)?;
    /// let cut = disk.read_at(&mut [0; 512], 4096).map_err(|e| e.to_string());
    /// assert_eq!(cut, Err("cannot read 512 bytes at 4096 of the upload".to_owned()));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn named(mut self, name: impl fmt::Display) -> Self {
        self.name = name.to_string();
        self
    }

    /// Makes a new, sparse image that reads as zeroes.
    ///
    /// # Errors
    ///
    /// [`InvalidSize`](ErrorKind::InvalidSize) if `size` is not a multiple of [`SECTOR`];
    /// [`AlreadyExists`](ErrorKind::AlreadyExists).
    pub fn create(path: impl AsRef<Path>, size: u64) -> Result<Self> {
        let path = path.as_ref();
        if size % SECTOR != 0 {
            return Err(Error::invalid_size(size, "is not a multiple of 512 bytes"));
        }
        let context = || format!("cannot create {}", path.display());
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(path);
        let file = file.map_err(|e| Error::io(e, context()))?;
        file.set_len(size).map_err(|e| Error::io(e, context()))?;
        let (capabilities, failed) = (of_a_file(&file, size, false), AtomicBool::new(false));
        Ok(Self { file, name: path.display().to_string(), size, read_only: false, capabilities, failed })
    }

    /// A handle to it.
    pub fn into_disk(self) -> Disk {
        Disk::from_backend(self)
    }

    /// What comes of a synchronisation that ended so.
    fn synced(&self, result: std::io::Result<()>) -> Result<()> {
        result.map_err(|e| {
            self.failed.store(true, Ordering::Release);
            Error::io(e, format!("cannot flush {}", self.name))
        })
    }

    fn zero(&self, offset: u64, len: u64) -> Result<()> {
        zero_range(&self.file, offset, len)
            .map_err(|e| Error::io(e, format!("cannot zero {len} bytes at {offset} of {}", self.name)))
    }
}

impl BlockBackend for RawFile {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let read = self.file.read_exact_at(buf, offset);
        read.map_err(|e| {
            Error::io(e, format!("cannot read {} bytes at {offset} of {}", buf.len(), self.name))
        })
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        let written = self.file.write_all_at(buf, offset);
        written.map_err(|e| {
            Error::io(e, format!("cannot write {} bytes at {offset} of {}", buf.len(), self.name))
        })
    }

    fn write_vectored_at(&self, mut bufs: &mut [IoBuf<'_>], offset: u64) -> Result<()> {
        let written = write_all_at(self.file.as_fd(), &mut bufs, offset);
        written.map_err(|e| Error::io(e, format!("cannot write at {offset} of {}", self.name)))
    }

    fn flush(&self) -> Result<()> {
        if self.read_only {
            return Ok(());
        }
        // The kernel says once that it could not write something, and forgets it.
        if self.failed.load(Ordering::Acquire) {
            return Err(Error::new(ErrorKind::Io, format!("an earlier flush of {} has failed", self.name)));
        }
        self.synced(self.file.sync_data())
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.zero(offset, len)
    }

    fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    fn extent(&self, offset: u64, len: u64) -> Extent<'_> {
        Extent::File { file: self.file.as_fd(), offset, len }
    }

    fn next_data(&self, offset: u64) -> Result<Option<Range<u64>>> {
        let found = next_data(&self.file, offset, self.size);
        found.map_err(|e| Error::io(e, format!("cannot look for holes in {}", self.name)))
    }
}

/// What a file is good at: in some file systems zeroes are written like any other bytes. Beyond the end of the file there is
/// nothing that asking could change.
fn of_a_file(file: &File, size: u64, read_only: bool) -> Capabilities {
    let frees = read_only || !cannot(punch(file, size.next_multiple_of(BLOCK), BLOCK));
    Capabilities { discard_frees: frees, cheap_zeroes: frees, ..OF_A_FILE }
}

/// Whether it is not that it failed, but that it is not to be had here.
fn cannot(result: rustix::io::Result<()>) -> bool {
    matches!(result, Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV))
}

/// Makes a range of a file read as zeroes, giving its space back where the file system can.
pub(crate) fn zero_range(file: &File, offset: u64, len: u64) -> std::io::Result<()> {
    match punch(file, offset, len) {
        result if cannot(result) => write_zeroes(file, offset, len),
        // A device does it to whole blocks of its own alone.
        Err(Errno::INVAL) => zero_blocks(file, offset, len),
        result => Ok(result?),
    }
}

/// The same where whole blocks alone can be given back: what is not one, at either end, is written. No device's are larger
/// than a page but for a few, where all of it may have to be written.
fn zero_blocks(file: &File, offset: u64, len: u64) -> std::io::Result<()> {
    let end = offset + len;
    let (first, last) = (offset.next_multiple_of(BLOCK), end / BLOCK * BLOCK);
    if first >= last {
        return write_zeroes(file, offset, len);
    }
    write_zeroes(file, offset, first - offset)?;
    write_zeroes(file, last, end - last)?;
    match punch(file, first, last - first) {
        Err(Errno::INVAL) => write_zeroes(file, first, last - first),
        result if cannot(result) => write_zeroes(file, first, last - first),
        result => Ok(result?),
    }
}

fn punch(file: &File, offset: u64, len: u64) -> rustix::io::Result<()> {
    rustix::fs::fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, len)
}

/// Writes zeroes, allocating the range.
pub(crate) fn write_zeroes(file: &impl FileExt, mut offset: u64, mut len: u64) -> std::io::Result<()> {
    static ZEROES: [u8; 64 << 10] = [0; 64 << 10];
    while len > 0 {
        let part = len.min(ZEROES.len() as u64);
        file.write_all_at(&ZEROES[..part as usize], offset)?;
        offset += part;
        len -= part;
    }
    Ok(())
}

fn next_data(file: &File, offset: u64, size: u64) -> std::io::Result<Option<Range<u64>>> {
    let start = match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(offset)) {
        Ok(start) => start,
        // It ends before that, which is as it should be where all the rest is a hole.
        Err(Errno::NXIO) if file.metadata()?.len() >= size => return Ok(None),
        Err(Errno::NXIO) => {
            let what = "it has been cut since it was opened";
            return Err(std::io::Error::new(std::io::ErrorKind::UnexpectedEof, what));
        }
        // Not every file system and no block device knows its holes.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok((offset < size).then_some(offset..size)),
        Err(error) => return Err(error.into()),
    };
    let end = match rustix::fs::seek(file, rustix::fs::SeekFrom::Hole(start)) {
        Ok(end) => end,
        Err(Errno::NXIO) => size,
        Err(error) => return Err(error.into()),
    };
    Ok((start < size).then_some(start..end.min(size)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is missing of a file is no hole, for whoever imports it.
    #[test]
    fn a_file_that_is_cut_is_not_taken_for_holes() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4 << 20).unwrap();
        let disk = RawFile::from_file(file.try_clone().unwrap(), true).unwrap().into_disk();
        assert_eq!(disk.next_data(0).unwrap(), None);
        file.set_len(1 << 20).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let imported = crate::Store::open(dir.path()).unwrap().import(&disk, &mut |_| ());
        assert_eq!(imported.map(drop).map_err(|e| e.kind()), Err(ErrorKind::Io));
    }

    /// Who has many disks is told which.
    #[test]
    fn errors_name_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data.raw");
        let made = RawFile::create(&path, 1 << 20).unwrap();
        let opened = RawFile::open(&path, false).unwrap();
        std::fs::File::options().write(true).open(&path).unwrap().set_len(0).unwrap();
        for disk in [made, opened] {
            let error = disk.read_at(&mut [0; 512], 4096).unwrap_err();
            assert_eq!(error.to_string(), format!("cannot read 512 bytes at 4096 of {}", path.display()));
            let error = disk.next_data(0).unwrap_err();
            assert_eq!(error.to_string(), format!("cannot look for holes in {}", path.display()));
        }
    }

    /// A synchronisation that fails is not made good by one that has nothing left to write.
    #[test]
    fn a_failed_flush_is_not_forgotten() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let disk = RawFile::from_file(file, false).unwrap();
        disk.flush().unwrap();
        disk.synced(Err(Errno::IO.into())).unwrap_err();
        let again = BlockBackend::flush(&disk).unwrap_err();
        assert_eq!(
            (again.kind(), again.to_string()),
            (ErrorKind::Io, "an earlier flush of the image has failed".to_owned())
        );
    }
}
