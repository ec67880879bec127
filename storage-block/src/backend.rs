//! The contract between whoever stores blocks and whoever reads and writes them.

use std::fmt;
use std::ops::Range;
use std::os::fd::BorrowedFd;

use crate::{IoBuf, IoBufMut, Result, bounce};

/// A number of bytes that can be read and written at any offset.
///
/// Users never call a backend: they hold a [`Disk`](crate::Disk), which checks every request once, so that a
/// backend may rely on what is said here. What a backend has to have is little; all else has a default that
/// is right and slow. [`testing::conformance`](crate::testing::conformance) checks that all is as said.
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
/// - `offset + len` of every request lies within [`size`](Self::size); `len` is not zero, and no read or
///   write is longer than [`Capabilities::max_request`]. Any byte may be a request's first and last.
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

    /// What this backend is good at. It does not change while the backend lives.
    fn capabilities(&self) -> Capabilities {
        Capabilities::default()
    }

    /// Fills `buf` with the bytes at `offset`.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()>;

    /// Writes `buf` at `offset`.
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()>;

    /// Fills the buffers, one after the other, with the bytes at `offset`. There is at least one byte to
    /// read; what the buffers are afterwards does not matter.
    ///
    /// By default bytes that an [`extent`](Self::extent) tells of are read from its file with no copy between, and
    /// others pass through memory of this crate, since the buffers may be memory that others change.
    fn read_vectored_at(&self, bufs: &mut [IoBufMut<'_>], offset: u64) -> Result<()> {
        bounce::read(self, bufs, offset)
    }

    /// Writes the buffers, one after the other, at `offset`. There is at least one byte to write; what the
    /// buffers are afterwards does not matter.
    ///
    /// By default they pass through memory of this crate, since the buffers may be memory that others change.
    fn write_vectored_at(&self, bufs: &mut [IoBuf<'_>], offset: u64) -> Result<()> {
        bounce::write(self, bufs, offset)
    }

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

    /// How the bytes from `offset` on can be read, `len` of them at most, and how many of them in that way.
    ///
    /// It is asked in front of reads, and by whoever must not wait: it looks at memory alone, and what it would
    /// have to wait for is [`Extent::Backend`]. Until a request changes the bytes of an extent they stay where it
    /// says, and the file stays open as long as the backend lives, whatever becomes of its name. Where reading an
    /// extent's file fails, the same bytes are asked of [`read_at`](Self::read_at), which knows what to say.
    fn extent(&self, offset: u64, len: u64) -> Extent<'_> {
        let _ = offset;
        Extent::Backend { len }
    }
}

/// How a part of a disk can be read.
///
/// ```
/// use storage_block::{BlockBackend, Extent, MemoryDisk};
///
/// let disk = MemoryDisk::new(512)?;
/// assert!(matches!(disk.extent(0, 512), Extent::Backend { len: 512 }), "it is in no file");
/// # Ok::<(), storage_block::Error>(())
/// ```
#[derive(Debug, Clone, Copy)]
pub enum Extent<'b> {
    /// The next `len` bytes lie in a file, one after the other from `offset` on, as they are.
    File {
        /// The file, open as long as the backend.
        file: BorrowedFd<'b>,
        /// Where in the file.
        offset: u64,
        /// How many bytes.
        len: u64,
    },
    /// The next `len` bytes are zeroes.
    Zeroes {
        /// How many bytes.
        len: u64,
    },
    /// The next `len` bytes have to be asked of the backend.
    Backend {
        /// How many bytes.
        len: u64,
    },
}

impl Extent<'_> {
    /// How many bytes, of `wanted`; never none.
    pub(crate) fn len(&self, wanted: u64) -> u64 {
        let (Self::File { len, .. } | Self::Zeroes { len } | Self::Backend { len }) = *self;
        len.clamp(1, wanted.max(1))
    }
}

/// What a disk is good at, for those who offer it to others: a guest, an NBD client. It promises no result,
/// only what things cost; every request is served either way.
///
/// ```
/// use storage_block::{Capabilities, RawFile};
///
/// let file = tempfile::tempfile()?;
/// file.set_len(1 << 20)?;
/// let disk = RawFile::from_file(file, false)?.into_disk();
/// let Capabilities { knows_holes, discard_frees, physical_block, .. } = disk.capabilities();
/// assert!(knows_holes && discard_frees && physical_block == 4096);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Capabilities {
    /// The unit that a guest should be told to count in: 512 bytes, unless the disk is of another kind.
    pub logical_block: u32,
    /// The unit that is best written whole, aligned to itself: less of it costs a read too.
    pub physical_block: u32,
    /// The longest read or write that the backend is to get; [`Disk`](crate::Disk) cuts longer ones up.
    pub max_request: u64,
    /// Discarding gives space back, where whatever is below can.
    pub discard_frees: bool,
    /// Writing zeroes costs far less than writing so many bytes.
    pub cheap_zeroes: bool,
    /// [`next_data`](BlockBackend::next_data) leaves out holes.
    pub knows_holes: bool,
    /// Some of it lies in files that [`extent`](BlockBackend::extent) tells of, so that an asynchronous engine of
    /// the kernel is of use.
    pub in_files: bool,
}

impl Default for Capabilities {
    /// Blocks of 512 and 4096 bytes, requests of any length, and nothing that is cheaper than writing.
    fn default() -> Self {
        Self::LEAST
    }
}

impl Capabilities {
    /// The default.
    pub(crate) const LEAST: Self = Self {
        logical_block: 512,
        physical_block: 4096,
        max_request: u64::MAX,
        discard_frees: false,
        cheap_zeroes: false,
        knows_holes: false,
        in_files: false,
    };
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
