//! Files that a machine reads.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// An open file that is never changed: what a [`BootFile`](super::BootFile) and a [`SavedMachine`](super::SavedMachine)
/// are, which show it in use. Cheap to clone.
#[derive(Debug, Clone)]
pub struct OpenFile(Arc<File>, u64);

impl OpenFile {
    /// The file as it is now.
    pub(super) fn new(file: File) -> io::Result<Self> {
        let len = file.metadata()?.len();
        Ok(Self(Arc::new(file), len))
    }

    /// Its length in bytes.
    pub fn len(&self) -> u64 {
        self.1
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.1 == 0
    }

    /// The file. Its position means nothing: read with an offset.
    pub fn file(&self) -> &Arc<File> {
        &self.0
    }

    /// All its bytes.
    ///
    /// # Errors
    ///
    /// What the operating system says, or [`FileTooLarge`](io::ErrorKind::FileTooLarge) for a file
    /// longer than an address space.
    pub fn read(&self) -> io::Result<Vec<u8>> {
        let len = usize::try_from(self.1).map_err(|_| io::ErrorKind::FileTooLarge)?;
        let mut bytes = vec![0; len];
        self.0.read_exact_at(&mut bytes, 0)?;
        Ok(bytes)
    }
}
