//! The file that an image lies in, as the readers see it.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::OFlags;

use crate::error::{corrupt, unsupported};
use crate::{Error, Result};

/// An open file of known length; nothing is read beyond that.
#[derive(Debug)]
pub(crate) struct Source {
    file: File,
    len: u64,
    name: String,
}

impl Source {
    /// Opens a regular file or a block device, and waits for nothing: a pipe is not one.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let no_waiting = OFlags::NONBLOCK.bits() as i32;
        let file = OpenOptions::new().read(true).custom_flags(no_waiting).open(path);
        let source = Self::from_file(file.map_err(|e| Error::io(e, "cannot be opened"))?)?;
        Ok(Self { name: path.display().to_string(), ..source })
    }

    /// One that errors call the image, for want of a name.
    pub(crate) fn from_file(mut file: File) -> Result<Self> {
        let metadata = file.metadata().map_err(|e| Error::io(e, "cannot be looked at"))?;
        let len = if metadata.is_file() {
            metadata.len()
        } else if metadata.file_type().is_block_device() {
            file.seek(SeekFrom::End(0)).map_err(|e| Error::io(e, "the device's size cannot be learned"))?
        } else {
            return Err(unsupported("is neither a file nor a block device"));
        };
        Ok(Self { file, len, name: "the image".to_owned() })
    }

    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// What errors call it that come when it is read as a disk.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn into_file(self) -> File {
        self.file
    }

    /// Fills `buf` with the bytes at `offset`, all of which must be there.
    pub(crate) fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        if offset.checked_add(buf.len() as u64).is_none_or(|end| end > self.len) {
            return Err(corrupt(format!(
                "{} bytes at offset {offset} lie beyond the end of a file of {} bytes",
                buf.len(),
                self.len
            )));
        }
        let read = self.file.read_exact_at(buf, offset);
        read.map_err(|e| Error::io(e, format!("cannot read {} bytes at {offset} of the image", buf.len())))
    }

    /// As [`read_exact_at`](Self::read_exact_at), with zeroes for what lies beyond the end.
    pub(crate) fn read_padded_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let there = self.len.saturating_sub(offset).min(buf.len() as u64) as usize;
        let (inside, beyond) = buf.split_at_mut(there);
        beyond.fill(0);
        if inside.is_empty() { Ok(()) } else { self.read_exact_at(inside, offset) }
    }

    /// The first bytes of the file, `len` of them or as many as there are.
    pub(crate) fn head(&self, len: usize) -> Result<Vec<u8>> {
        let mut head = vec![0; self.len.min(len as u64) as usize];
        self.read_exact_at(&mut head, 0)?;
        Ok(head)
    }
}

/// Whether all bytes are zero; in words, so that it is as fast as reading them.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    bytes.chunks(256).all(|part| part.iter().fold(0, |all, byte| all | byte) == 0)
}
