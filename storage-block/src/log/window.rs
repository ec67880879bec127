//! A file that is read from one end to the other.

use std::os::unix::fs::FileExt as _;
use std::path::Path;

use crate::fs::File;
use crate::{Error, Result};

/// How much is read at once.
const PIECE: usize = 2 << 20;

/// A part of a file, read in large pieces and looked at in small ones.
pub(super) struct Window<'f> {
    file: &'f File,
    path: &'f Path,
    at: u64,
    bytes: Vec<u8>,
    /// Nothing comes behind `bytes`.
    last: bool,
}

impl<'f> Window<'f> {
    pub(super) fn new(file: &'f File, path: &'f Path) -> Self {
        Self { file, path, at: 0, bytes: Vec::new(), last: false }
    }

    /// `len` bytes from `at`, fewer only at the end of the file.
    pub(super) fn get(&mut self, at: u64, len: usize) -> Result<&[u8]> {
        let held = self.at..self.at + self.bytes.len() as u64;
        if at < held.start || (at + len as u64 > held.end && !self.last) {
            self.bytes.resize(len.max(PIECE), 0);
            let mut filled = 0;
            self.last = false;
            while filled < self.bytes.len() {
                match self.file.read_at(&mut self.bytes[filled..], at + filled as u64) {
                    Ok(0) => {
                        self.last = true;
                        break;
                    }
                    Ok(read) => filled += read,
                    Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                    Err(e) => return Err(Error::io(e, format!("cannot read {}", self.path.display()))),
                }
            }
            self.bytes.truncate(filled);
            self.at = at;
        }
        let start = ((at - self.at) as usize).min(self.bytes.len());
        let end = (start + len).min(self.bytes.len());
        Ok(&self.bytes[start..end])
    }
}
