//! A file of a disk, whatever file system it is on.

use storage_block::Disk;

use crate::search::Search;
use crate::{Error, ErrorKind, Result};

/// The bytes of the regular file at `path`, of at most `limit` bytes, on the first file system of the disk that has one;
/// `None` if there is none. The file systems are those that [`BootEntry::find`](crate::BootEntry::find) searches.
///
/// ```
/// use boot_image::{ErrorKind, read_file};
/// use storage_block::MemoryDisk;
///
/// let disk = MemoryDisk::new(1 << 20)?.into_disk();
/// let nothing = read_file(&disk, "/etc/os-release", 4096).unwrap_err();
/// assert_eq!(nothing.kind(), ErrorKind::NoFileSystem);
/// # Ok::<(), storage_block::Error>(())
/// ```
///
/// # Errors
///
/// [`TooLarge`](ErrorKind::TooLarge) for a larger file, and as [`ErrorKind`] lists them for a disk that is not read.
pub fn read_file(disk: &Disk, path: &str, limit: u64) -> Result<Option<Vec<u8>>> {
    if !path.starts_with('/') {
        return Err(Error::new(ErrorKind::Unsupported, format!("{path:?} is no path from the root")));
    }
    Search::open(disk)?.read(path, limit)
}
