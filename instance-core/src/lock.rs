//! The lock that says who owns a region directory.

use std::fs::File;
use std::path::Path;

use rustix::fs::{FlockOperation, flock};

use crate::{Error, ErrorKind, Result};

/// The lock, which goes with this or with the process.
#[derive(Debug)]
pub(crate) struct Lock(File);

impl Lock {
    /// Takes the lock that makes this process the owner.
    pub(crate) fn take(dir: &Path) -> Result<Self> {
        let path = dir.join("lock");
        let file = File::options().create(true).truncate(false).write(true).open(&path);
        let file = file.map_err(|e| Error::io(e, format!("cannot open {}", path.display())))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self(file)),
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let dir = dir.display();
                let what =
                    format!("the region {dir} is in use by another process or handle; close that one first");
                Err(Error::new(ErrorKind::RegionInUse, what))
            }
            Err(e) => Err(Error::io(e.into(), format!("cannot lock {}", path.display()))),
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Closing alone is not enough: a child that another thread is starting just now has the file
        // too, until it is another program.
        let _ = flock(&self.0, FlockOperation::Unlock);
    }
}
