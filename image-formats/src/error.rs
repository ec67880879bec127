//! What can go wrong between an image file and a disk.

use std::error::Error as StdError;
use std::{fmt, io};

/// A result of this crate.
///
/// ```
/// use image_formats::{Format, Result};
/// use storage_block::Disk;
///
/// fn open_whatever_it_is(path: &str) -> Result<Disk> {
///     image_formats::open(path, Format::probe(path)?)
/// }
/// # let _ = open_whatever_it_is;
/// ```
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What kind of failure an [`Error`] is; this is what a program matches on.
///
/// ```
/// use image_formats::{ErrorKind, Format};
///
/// let dir = tempfile::tempdir()?;
/// let path = dir.path().join("upload.img");
/// std::fs::write(&path, b"vhdxfile and more")?;
/// let advice = match Format::probe(&path).map_err(|e| e.kind()) {
///     Ok(_) => "it can be imported",
///     Err(ErrorKind::Unsupported) => "convert it first",
///     Err(ErrorKind::OtherFile | ErrorKind::Corrupt) => "do not touch it",
///     Err(_) => "see the error's text",
/// };
/// assert_eq!(advice, "convert it first");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// Something that is well-formed, as far as can be seen, but that this crate does not read.
    Unsupported,
    /// Bytes are not what their format says.
    Corrupt,
    /// The image has a part of its disk in another file, which is not opened: a backing file, a data file,
    /// an extent.
    OtherFile,
    /// The disk in the image is encrypted.
    Encrypted,
    /// Something is larger than what this crate, or the caller, is willing to take.
    TooLarge,
    /// An option that the format of an export cannot have.
    InvalidOption,
    /// The caller's progress function said to stop.
    Cancelled,
    /// No file of that name.
    NotFound,
    /// A file of that name is there already.
    AlreadyExists,
    /// The file system has no space left.
    NoSpace,
    /// Any other failure of the operating system, or of the disk that is exported.
    Io,
}

/// A failure: its kind, what it happened to, and what caused it.
///
/// ```
/// use image_formats::{ErrorKind, Format};
///
/// let dir = tempfile::tempdir()?;
/// let path = dir.path().join("short.qcow2");
/// std::fs::write(&path, b"QFI\xfb")?;
/// let error = image_formats::open(&path, Format::Qcow2).err().ok_or("a header of four bytes")?;
/// assert_eq!(error.kind(), ErrorKind::Corrupt);
/// assert!(error.to_string().ends_with("short.qcow2: the qcow2 header is cut short"));
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

    pub(crate) fn io(source: io::Error, context: impl Into<String>) -> Self {
        let kind = match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::NoSpace,
            io::ErrorKind::NotFound => ErrorKind::NotFound,
            io::ErrorKind::AlreadyExists => ErrorKind::AlreadyExists,
            _ => ErrorKind::Io,
        };
        Self { kind, context: context.into(), source: Some(Box::new(source)) }
    }

    /// What a disk said.
    pub(crate) fn disk(source: storage_block::Error, context: impl Into<String>) -> Self {
        let kind = match source.kind() {
            storage_block::ErrorKind::Corrupt => ErrorKind::Corrupt,
            storage_block::ErrorKind::InvalidSize => ErrorKind::Unsupported,
            storage_block::ErrorKind::NoSpace => ErrorKind::NoSpace,
            _ => ErrorKind::Io,
        };
        Self { kind, context: context.into(), source: Some(Box::new(source)) }
    }

    /// Says which file the error is about.
    pub(crate) fn about(mut self, name: impl fmt::Display) -> Self {
        self.context = format!("{name}: {}", self.context);
        self
    }

    /// The kind of failure.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The same as a disk says it, which is read long after it was opened.
    pub(crate) fn into_disk_error(self) -> storage_block::Error {
        match self.source {
            Some(source) if self.kind != ErrorKind::Corrupt => {
                storage_block::Error::io(io::Error::other(source), self.context)
            }
            _ => storage_block::Error::new(storage_block::ErrorKind::Corrupt, self.context),
        }
    }
}

/// Bytes that are not what their format says.
pub(crate) fn corrupt(context: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, context)
}

pub(crate) fn unsupported(context: impl Into<String>) -> Error {
    Error::new(ErrorKind::Unsupported, context)
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
