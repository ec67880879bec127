//! Which format a file is in.

use std::fmt;
use std::path::Path;

use crate::error::unsupported;
use crate::source::Source;
use crate::{Result, qcow2, vmdk};

/// A format that disk images are in.
///
/// ```
/// use image_formats::Format;
///
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("upload");
/// # std::fs::write(&path, [0; 512])?;
/// let format = Format::probe(&path)?;
/// assert_eq!(format, Format::Raw, "nothing else fits");
/// assert_eq!(format.to_string(), "raw");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Format {
    /// Byte `n` of the disk is byte `n` of the file.
    Raw,
    /// QEMU's format, versions 2 and 3.
    Qcow2,
    /// VMware's format.
    Vmdk,
}

/// What begins a file of a format that is none of ours: where, what, and its name.
const FOREIGN: [(usize, &[u8], &str); 11] = [
    (0, b"vhdxfile", "VHDX"),
    (0, b"conectix", "VHD"),
    (0x40, b"\x7f\x10\xda\xbe", "VDI"),
    (0, b"QED\0", "QED"),
    (0, b"QFI\xfb\0\0\0\x01", "qcow, version 1"),
    (0, b"WithoutFreeSpace", "Parallels"),
    (0, b"\x1f\x8b\x08", "packed with gzip"),
    (0, b"\xfd7zXZ\0", "packed with xz"),
    (0, b"\x28\xb5\x2f\xfd", "packed with Zstandard"),
    (0, b"BZh", "packed with bzip2"),
    (0, b"PK\x03\x04", "packed with zip"),
];

impl Format {
    /// Tells a file's format by its first bytes: [`Raw`](Self::Raw) if they are those of no format known.
    ///
    /// A raw image is whatever its disk says it is, and who writes to the disk writes these bytes: a guest can make
    /// its raw disk look like a qcow2 image that names a file of the host. So probe a file once, when it comes
    /// in, and keep the answer; never probe one that a guest has written to. This crate opens no file that an
    /// image names, so that a wrong answer costs an error here, and maybe more elsewhere.
    ///
    /// # Errors
    ///
    /// [`Unsupported`](crate::ErrorKind::Unsupported) if it is of another known format, packed as a whole,
    /// or no file; [`NotFound`](crate::ErrorKind::NotFound).
    pub fn probe(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let head = Source::open(path).and_then(|source| source.head(HEAD));
        head.and_then(|head| Self::of(&head)).map_err(|e| e.about(path.display()))
    }

    /// The format of a file that begins with these bytes.
    pub(crate) fn of(head: &[u8]) -> Result<Self> {
        let is = |offset: usize, magic: &[u8]| head.get(offset..).is_some_and(|at| at.starts_with(magic));
        if let Some((_, _, name)) = FOREIGN.iter().find(|(offset, magic, _)| is(*offset, magic)) {
            return Err(unsupported(format!("the file is {name}; raw, qcow2 and VMDK images are read")));
        }
        Ok(match () {
            () if qcow2::is_one(head) => Self::Qcow2,
            () if vmdk::is_one(head) => Self::Vmdk,
            () => Self::Raw,
        })
    }
}

/// How much of a file tells its format.
const HEAD: usize = 512;

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Vmdk => "vmdk",
        })
    }
}
