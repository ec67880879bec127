//! Images as disks that are read and never written.

use std::fmt;
use std::ops::Range;

use storage_block::{BlockBackend, Capabilities, ErrorKind};

use crate::Result;

/// What an image is asked; what it is not asked as a disk, [`ReadOnly`] answers for all of them.
pub(crate) trait ReadImage: fmt::Debug + Send + Sync + 'static {
    /// The size of the disk in bytes, whole sectors.
    fn size(&self) -> u64;

    /// Fills `buf`, which lies within the disk, with the bytes at `offset`.
    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()>;

    /// The next range at or after `offset` that may hold anything but zeroes.
    fn next_data(&self, offset: u64) -> Result<Option<Range<u64>>>;
}

/// An image as a disk.
#[derive(Debug)]
pub(crate) struct ReadOnly<I> {
    image: I,
    /// Of the file, for errors: who reads the disk may have many.
    name: String,
}

impl<I: ReadImage> ReadOnly<I> {
    pub(crate) fn new(image: I, name: String) -> Self {
        Self { image, name }
    }

    fn said<T>(&self, result: Result<T>) -> storage_block::Result<T> {
        result.map_err(|e| e.about(&self.name).into_disk_error())
    }
}

/// What an image says to being written, which a [`Disk`](storage_block::Disk) never asks for.
fn refused() -> storage_block::Error {
    storage_block::Error::new(ErrorKind::ReadOnly, "an image can only be read")
}

impl<I: ReadImage> BlockBackend for ReadOnly<I> {
    fn size(&self) -> u64 {
        self.image.size()
    }

    fn read_only(&self) -> bool {
        true
    }

    fn capabilities(&self) -> Capabilities {
        let mut capabilities = Capabilities::default();
        capabilities.knows_holes = true;
        capabilities
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> storage_block::Result<()> {
        self.said(self.image.read(buf, offset))
    }

    fn write_at(&self, _: &[u8], _: u64) -> storage_block::Result<()> {
        Err(refused())
    }

    fn write_zeroes(&self, _: u64, _: u64) -> storage_block::Result<()> {
        Err(refused())
    }

    fn flush(&self) -> storage_block::Result<()> {
        Ok(())
    }

    fn next_data(&self, offset: u64) -> storage_block::Result<Option<Range<u64>>> {
        self.said(self.image.next_data(offset))
    }
}
