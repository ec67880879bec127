//! A disk for tests of those who go by what a disk says of itself.

use crate::{BlockBackend, Capabilities, Disk, MemoryDisk, Result};

/// Memory of so many bytes that says of itself what it is told to say.
///
/// ```
/// use storage_block::{Capabilities, testing};
///
/// let mut claimed = Capabilities::default();
/// claimed.physical_block = 16 << 10;
/// let disk = testing::claiming(1 << 20, claimed)?;
/// assert_eq!(disk.capabilities(), claimed);
/// # Ok::<(), storage_block::Error>(())
/// ```
///
/// # Errors
///
/// As those of [`MemoryDisk::new`].
pub fn claiming(size: u64, capabilities: Capabilities) -> Result<Disk> {
    Disk::new(Claiming(MemoryDisk::new(size)?, capabilities))
}

#[derive(Debug)]
struct Claiming(MemoryDisk, Capabilities);

impl BlockBackend for Claiming {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn capabilities(&self) -> Capabilities {
        self.1
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.0.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.0.write_at(buf, offset)
    }

    fn flush(&self) -> Result<()> {
        self.0.flush()
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.0.write_zeroes(offset, len)
    }
}
