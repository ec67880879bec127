//! The contract between whoever stores blocks and whoever reads and writes them.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use crate::{Error, Result};

/// A number of bytes that can be read and written at any offset.
///
/// Users never call a backend: they hold a [`Disk`], which checks every request once, so that a
/// backend may rely on what is said here.
///
/// ```
/// use storage_block::{BlockBackend, Disk, ErrorKind, Result, SECTOR};
///
/// /// So many zeroes, for ever.
/// #[derive(Debug)]
/// struct Zeroes(u64);
///
/// impl BlockBackend for Zeroes {
///     fn size(&self) -> u64 { self.0 }
///     fn read_only(&self) -> bool { true }
///     fn read_at(&self, buf: &mut [u8], _offset: u64) -> Result<()> { buf.fill(0); Ok(()) }
///     fn write_at(&self, _: &[u8], _: u64) -> Result<()> { unreachable!("it is read-only") }
///     fn write_zeroes(&self, _: u64, _: u64) -> Result<()> { unreachable!("it is read-only") }
///     fn flush(&self) -> Result<()> { Ok(()) }
/// }
///
/// let disk = Disk::new(Zeroes(8 * SECTOR))?;
/// assert!(disk.read_only());
/// assert_eq!(disk.write_at(b"x", 0).err().map(|e| e.kind()), Some(ErrorKind::ReadOnly));
/// assert!(Disk::new(Zeroes(1)).is_err(), "no whole sector");
/// # Ok::<(), storage_block::Error>(())
/// ```
///
/// # Contract
///
/// - `offset + len` of every request lies within [`size`](Self::size); `len` is not zero.
/// - Write, discard and write-zeroes never reach a backend whose [`read_only`](Self::read_only) is
///   true.
/// - Requests come from any thread, several at once. Where two overlap in time and in bytes, each
///   byte ends as one of them wrote it.
/// - A write may be lost in a crash until a [`flush`](Self::flush) that began after it returned has
///   returned `Ok`. No write outside a request's range is ever visible.
/// - After an error the bytes of that request are undefined, those of others are not.
pub trait BlockBackend: Send + Sync + fmt::Debug + 'static {
    /// The size in bytes; a multiple of [`SECTOR`]. It may grow while the backend lives and never shrinks: what
    /// lay within it does so for ever. It is asked at every request.
    fn size(&self) -> u64;

    /// Whether requests that change bytes are refused.
    fn read_only(&self) -> bool {
        false
    }

    /// Fills `buf` with the bytes at `offset`.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()>;

    /// Writes `buf` at `offset`.
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()>;

    /// Returns when every write that has returned is durable.
    fn flush(&self) -> Result<()>;

    /// Says that nobody needs these bytes; they read as zeroes from now on.
    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.write_zeroes(offset, len)
    }

    /// Makes the range read as zeroes.
    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()>;

    /// The next range, at or after `offset`, that may hold anything but zeroes; `None` when only
    /// zeroes follow. What is left out must read as zeroes; what is in may do so too.
    fn next_data(&self, offset: u64) -> Result<Option<Range<u64>>> {
        let size = self.size();
        Ok((offset < size).then_some(offset..size))
    }
}

/// The unit in which sizes are counted: a disk's size is a multiple of 512 bytes.
///
/// ```
/// use storage_block::{MemoryDisk, SECTOR};
///
/// let disk = MemoryDisk::new(100 * SECTOR)?.into_disk();
/// assert_eq!(disk.size() / SECTOR, 100);
/// assert!(MemoryDisk::new(100).is_err());
/// # Ok::<(), storage_block::Error>(())
/// ```
pub const SECTOR: u64 = 512;

/// A handle to a disk. Cheap to clone; all clones are the same disk, which is closed with the last.
///
/// Every request is checked here, once: one that leaves the disk, or that would change a read-only
/// one, is an error and reaches no backend.
///
/// ```
/// use storage_block::MemoryDisk;
///
/// let disk = MemoryDisk::new(1 << 20)?.into_disk();
/// disk.write_at(b"hello", 4096)?;
/// let mut buf = [0; 5];
/// disk.read_at(&mut buf, 4096)?;
/// assert_eq!(&buf, b"hello");
/// disk.discard(4096, 512)?;
/// disk.write_zeroes(8192, 512)?;
/// disk.flush()?;
/// assert!(disk.read_at(&mut buf, disk.size()).is_err(), "beyond its end");
/// # Ok::<(), storage_block::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Disk(Arc<dyn BlockBackend>);

impl Disk {
    /// A handle to a backend.
    ///
    /// # Errors
    ///
    /// [`InvalidSize`](crate::ErrorKind::InvalidSize) if the backend's size is not a multiple of
    /// [`SECTOR`].
    pub fn new(backend: impl BlockBackend) -> Result<Self> {
        let size = backend.size();
        if size % SECTOR != 0 {
            return Err(Error::invalid_size(size, "is not a multiple of 512 bytes"));
        }
        Ok(Self::from_backend(backend))
    }

    /// For the backends of this crate, whose constructors have checked the size.
    pub(crate) fn from_backend(backend: impl BlockBackend) -> Self {
        Self(Arc::new(backend))
    }

    /// The size in bytes. A disk may grow while it is in use ([`Volume::grow`](crate::Volume::grow)); it never
    /// shrinks.
    pub fn size(&self) -> u64 {
        self.0.size()
    }

    /// Whether the disk can only be read.
    pub fn read_only(&self) -> bool {
        self.0.read_only()
    }

    /// Fills `buf` with the bytes at `offset`.
    ///
    /// # Errors
    ///
    /// [`OutOfBounds`](crate::ErrorKind::OutOfBounds), or what the backend met.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.check(offset, buf.len() as u64)?;
        if buf.is_empty() { Ok(()) } else { self.0.read_at(buf, offset) }
    }

    /// Writes `buf` at `offset`.
    ///
    /// # Errors
    ///
    /// [`OutOfBounds`](crate::ErrorKind::OutOfBounds), [`ReadOnly`](crate::ErrorKind::ReadOnly), or
    /// what the backend met.
    pub fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.check_change(offset, buf.len() as u64)?;
        if buf.is_empty() { Ok(()) } else { self.0.write_at(buf, offset) }
    }

    /// Returns when every write that has returned is durable.
    ///
    /// # Errors
    ///
    /// What the backend met; the writes may then be lost.
    pub fn flush(&self) -> Result<()> {
        self.0.flush()
    }

    /// Says that nobody needs these bytes; they read as zeroes from now on.
    ///
    /// # Errors
    ///
    /// As [`write_at`](Self::write_at).
    pub fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.check_change(offset, len)?;
        if len == 0 { Ok(()) } else { self.0.discard(offset, len) }
    }

    /// Makes the range read as zeroes.
    ///
    /// # Errors
    ///
    /// As [`write_at`](Self::write_at).
    pub fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.check_change(offset, len)?;
        if len == 0 { Ok(()) } else { self.0.write_zeroes(offset, len) }
    }

    /// The next range, at or after `offset`, that may hold anything but zeroes; `None` when only
    /// zeroes follow. The range is never empty and lies within the disk.
    ///
    /// ```
    /// use storage_block::{Disk, MemoryDisk, Result, Store};
    ///
    /// /// How many bytes may hold anything but zeroes.
    /// fn data(disk: &Disk) -> Result<u64> {
    ///     let (mut at, mut found) = (0, 0);
    ///     while let Some(range) = disk.next_data(at)? {
    ///         found += range.end - range.start;
    ///         at = range.end;
    ///     }
    ///     Ok(found)
    /// }
    /// # let dir = tempfile::tempdir()?;
    /// # let store = Store::open(dir.path())?;
    /// let disk = MemoryDisk::new(1 << 20)?.into_disk();
    /// disk.write_at(b"hello", 512 << 10)?;
    /// assert_eq!(data(&disk)?, disk.size(), "a disk in memory does not know its holes");
    /// let (snapshot, _) = store.import(&disk, &mut |_| ())?;
    /// assert_eq!(data(&snapshot.disk())?, 64 << 10, "one chunk of a snapshot");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// What the backend met.
    pub fn next_data(&self, offset: u64) -> Result<Option<Range<u64>>> {
        let size = self.size();
        if offset >= size {
            return Ok(None);
        }
        let range = self.0.next_data(offset)?.map(|found| found.start.max(offset)..found.end.min(size));
        Ok(range.filter(|found| found.start < found.end))
    }

    fn check(&self, offset: u64, len: u64) -> Result<()> {
        match offset.checked_add(len) {
            Some(end) if end <= self.size() => Ok(()),
            _ => Err(Error::out_of_bounds(offset, len, self.size())),
        }
    }

    fn check_change(&self, offset: u64, len: u64) -> Result<()> {
        if self.read_only() {
            return Err(Error::read_only());
        }
        self.check(offset, len)
    }
}
