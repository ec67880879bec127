//! Block storage for machine images.

mod backend;
mod error;
mod memory;

pub use backend::{BlockBackend, Disk, SECTOR};
pub use error::{Error, ErrorKind, Result};
pub use memory::MemoryDisk;
