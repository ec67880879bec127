//! What can go wrong between a disk and a kernel in memory.

use std::error::Error as StdError;
use std::fmt;

/// A result of this crate.
///
/// ```
/// use boot_image::{BootEntry, Result};
/// use storage_block::Disk;
///
/// fn command_line(disk: &Disk) -> Result<String> {
///     Ok(BootEntry::find(disk)?.command_line)
/// }
/// # let _ = command_line;
/// ```
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What kind of failure an [`Error`] is; this is what a program matches on.
///
/// ```
/// use boot_image::{BootEntry, ErrorKind};
/// use storage_block::MemoryDisk;
///
/// let disk = MemoryDisk::new(1 << 20)?.into_disk();
/// let advice = match BootEntry::find(&disk).map_err(|e| e.kind()) {
///     Ok(_) => "it boots",
///     Err(ErrorKind::NoFileSystem | ErrorKind::NoPartition) => "this is no disk image",
///     Err(ErrorKind::NoKernel) => "install a kernel in it",
///     Err(_) => "see the error's text",
/// };
/// assert_eq!(advice, "this is no disk image");
/// # Ok::<(), storage_block::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The disk has a partition table, but no partition in it is usable.
    NoPartition,
    /// No file system was found where one was looked for.
    NoFileSystem,
    /// The file systems were read, and none of them holds a kernel.
    NoKernel,
    /// Something that is well-formed, as far as can be seen, but that this crate does not read.
    Unsupported,
    /// Bytes are not what their format says.
    Corrupt,
    /// Something is larger than what this crate is willing to read or unpack.
    TooLarge,
    /// A kernel is for a machine that is none of the architectures an image can have.
    WrongArchitecture,
    /// The disk could not be read.
    Io,
}

/// A failure: its kind, what it happened to, and what caused it.
///
/// ```
/// use boot_image::{ErrorKind, unpack_kernel};
///
/// let err = unpack_kernel(b"\x7fELF").err().ok_or("a header of four bytes")?;
/// assert_eq!(err.kind(), ErrorKind::Corrupt);
/// assert_eq!(err.to_string(), "the ELF header of the kernel is cut short");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    context: String,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl Error {
    pub(crate) fn new(kind: ErrorKind, context: impl Into<String>) -> Self {
        Self { kind, context: context.into(), source: None }
    }

    pub(crate) fn because(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// Says which file the error is about.
    pub(crate) fn about(mut self, path: &str) -> Self {
        self.context = format!("{path}: {}", self.context);
        self
    }

    /// The kind of failure.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.context)
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_deref().map(|e| e as _)
    }
}
