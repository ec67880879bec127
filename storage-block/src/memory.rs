//! A disk in memory.

use std::sync::{PoisonError, RwLock};

use crate::{BlockBackend, Disk, Error, Result, SECTOR};

/// A disk whose bytes lie in memory and go with it.
///
/// ```
/// use storage_block::MemoryDisk;
///
/// let empty = MemoryDisk::new(1 << 20)?.into_disk();
/// let full = MemoryDisk::from_vec(vec![0xff; 1 << 20])?.into_disk();
/// assert_eq!(empty.size(), full.size());
/// # Ok::<(), storage_block::Error>(())
/// ```
#[derive(Debug)]
pub struct MemoryDisk(RwLock<Vec<u8>>, u64);

impl MemoryDisk {
    /// A disk of `size` zero bytes.
    ///
    /// # Errors
    ///
    /// [`InvalidSize`](crate::ErrorKind::InvalidSize) if `size` is not a multiple of [`SECTOR`] or
    /// more than a `usize` holds.
    ///
    /// # Panics
    ///
    /// As a `Vec` does, where there is not so much memory.
    pub fn new(size: u64) -> Result<Self> {
        let len = usize::try_from(size).map_err(|_| Error::invalid_size(size, "does not fit in memory"))?;
        Self::from_vec(vec![0; len])
    }

    /// A disk with these bytes.
    ///
    /// # Errors
    ///
    /// [`InvalidSize`](crate::ErrorKind::InvalidSize) if their number is not a multiple of
    /// [`SECTOR`].
    pub fn from_vec(bytes: Vec<u8>) -> Result<Self> {
        let size = bytes.len() as u64;
        if size % SECTOR != 0 {
            return Err(Error::invalid_size(size, "is not a multiple of 512 bytes"));
        }
        Ok(Self(RwLock::new(bytes), size))
    }

    /// A handle to it.
    pub fn into_disk(self) -> Disk {
        Disk::from_backend(self)
    }

    fn change(&self, offset: u64, len: u64, change: impl FnOnce(&mut [u8])) {
        let mut bytes = self.0.write().unwrap_or_else(PoisonError::into_inner);
        change(&mut bytes[offset as usize..(offset + len) as usize]);
    }
}

impl BlockBackend for MemoryDisk {
    fn size(&self) -> u64 {
        self.1
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let bytes = self.0.read().unwrap_or_else(PoisonError::into_inner);
        buf.copy_from_slice(&bytes[offset as usize..offset as usize + buf.len()]);
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.change(offset, buf.len() as u64, |bytes| bytes.copy_from_slice(buf));
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.change(offset, len, |bytes| bytes.fill(0));
        Ok(())
    }
}
