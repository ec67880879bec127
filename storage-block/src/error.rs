//! What can go wrong with blocks.

use std::error::Error as StdError;
use std::fmt;
use std::path::Path;

use rustix::io::Errno;

/// A result of this crate.
///
/// ```
/// use storage_block::{Disk, Result};
///
/// fn boot_sector(disk: &Disk) -> Result<[u8; 512]> {
///     let mut sector = [0; 512];
///     disk.read_at(&mut sector, 0)?;
///     Ok(sector)
/// }
/// # assert_eq!(boot_sector(&storage_block::MemoryDisk::new(512)?.into_disk())?, [0; 512]);
/// # Ok::<(), storage_block::Error>(())
/// ```
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What kind of failure an [`Error`] is; this is what a program matches on.
///
/// ```
/// use storage_block::{ErrorKind, RawFile};
///
/// let dir = tempfile::tempdir()?;
/// let path = dir.path().join("disk.raw");
/// let disk = match RawFile::open(&path, false) {
///     Err(e) if e.kind() == ErrorKind::NotFound => RawFile::create(&path, 1 << 20)?,
///     other => other?,
/// };
/// assert_eq!(RawFile::create(&path, 512).err().map(|e| e.kind()), Some(ErrorKind::AlreadyExists));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A request left the disk.
    OutOfBounds,
    /// A request would have changed what can only be read.
    ReadOnly,
    /// A size that no disk can have.
    InvalidSize,
    /// The file system has no space left; nothing that was acknowledged is lost.
    NoSpace,
    /// No snapshot or volume of that name.
    NotFound,
    /// Bytes on disk are not what their digest, checksum or format says, or the disk does not give back what is in a pack.
    Corrupt,
    /// Another process, or another handle of this one, has it open.
    InUse,
    /// Something of that name is there already.
    AlreadyExists,
    /// It is encrypted, and the key to it is not at hand, or is another; nothing is damaged.
    KeyUnavailable,
    /// The other side of a connection has said what nobody may say there.
    Protocol,
    /// The other side of a connection cannot do what it is needed for.
    Unsupported,
    /// Nothing proves who is on the other side of a connection, and something should.
    Untrusted,
    /// Whoever asked for it did not want it any more, and said so by
    /// [`Progress::cancel`](crate::Progress::cancel) or [`Queue::cancel`](crate::Queue::cancel).
    Cancelled,
    /// Any other failure of the operating system.
    Io,
}

/// A failure: its kind, what it happened to, and what caused it.
///
/// ```
/// use std::error::Error as _;
/// use std::io;
/// use storage_block::{Error, ErrorKind};
///
/// // What a backend of one's own says.
/// let full = Error::io(io::Error::from(io::ErrorKind::StorageFull), "cannot write the journal");
/// assert_eq!((full.kind(), full.to_string()), (ErrorKind::NoSpace, "cannot write the journal".to_owned()));
/// assert!(full.source().is_some());
/// let bad = Error::new(ErrorKind::Corrupt, "the journal ends too early");
/// assert!(bad.source().is_none());
/// ```
#[derive(Debug)]
pub struct Error(Box<Inner>);

/// On the heap, so that a result is a word: each layer that a request comes through hands one on.
#[derive(Debug)]
struct Inner {
    kind: ErrorKind,
    context: String,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl Error {
    /// An error of `kind` about what `context` says.
    pub fn new(kind: ErrorKind, context: impl Into<String>) -> Self {
        Self::made(kind, context.into(), None)
    }

    /// The kind of failure.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    #[cold]
    fn made(kind: ErrorKind, context: String, source: Option<Box<dyn StdError + Send + Sync>>) -> Self {
        Self(Box::new(Inner { kind, context, source }))
    }

    /// The operating system's error, with what was being done. A full file system or quota becomes
    /// [`ErrorKind::NoSpace`], a missing file [`ErrorKind::NotFound`].
    pub fn io(source: std::io::Error, context: impl Into<String>) -> Self {
        let kind = match source.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => ErrorKind::NoSpace,
            std::io::ErrorKind::NotFound => ErrorKind::NotFound,
            std::io::ErrorKind::AlreadyExists => ErrorKind::AlreadyExists,
            _ => ErrorKind::Io,
        };
        Self::made(kind, context.into(), Some(Box::new(source)))
    }

    /// The same of the packs and their indices, which others may have copies of: what the disk or the file system has lost
    /// there is damaged like what it gives back wrong, and what goes for that goes for it.
    #[cold]
    pub(crate) fn stored(source: std::io::Error, context: impl Into<String>) -> Self {
        const LOST: [Errno; 5] = [Errno::IO, Errno::UCLEAN, Errno::BADMSG, Errno::REMOTEIO, Errno::NODATA];
        match Errno::from_io_error(&source) {
            Some(errno) if LOST.contains(&errno) => Self::with_source(ErrorKind::Corrupt, context, source),
            _ => Self::io(source, context),
        }
    }

    pub(crate) fn with_source(
        kind: ErrorKind,
        context: impl Into<String>,
        source: impl Into<Box<dyn StdError + Send + Sync>>,
    ) -> Self {
        Self::made(kind, context.into(), Some(source.into()))
    }

    /// A file whose bytes are not what its format says.
    pub(crate) fn corrupt(path: &Path, why: impl fmt::Display) -> Self {
        Self::new(ErrorKind::Corrupt, format!("{}: {why}", path.display()))
    }

    #[cold]
    pub(crate) fn out_of_bounds(offset: u64, len: u64, size: u64) -> Self {
        let context = format!("{len} bytes at offset {offset} leave a disk of {size} bytes");
        Self::new(ErrorKind::OutOfBounds, context)
    }

    pub(crate) fn read_only() -> Self {
        Self::new(ErrorKind::ReadOnly, "the disk is read-only")
    }

    pub(crate) fn invalid_size(size: u64, why: &str) -> Self {
        Self::new(ErrorKind::InvalidSize, format!("a size of {size} bytes {why}"))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.context)
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_deref().map(|e| e as _)
    }
}
