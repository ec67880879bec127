//! The lock that says who owns a network's directory: of two that write the same file one would undo what the other has done.

use std::fs::File;
use std::path::Path;

use rustix::fs::{FlockOperation, flock};

use crate::{Error, ErrorKind, Result};

/// Its name. A region's, which may be in the same directory, is another.
const NAME: &str = "network.lock";

/// The lock, which goes with this or with the process.
#[derive(Debug)]
pub(super) struct Lock(File);

impl Lock {
    /// Takes the lock that makes this network the owner.
    pub(super) fn take(dir: &Path) -> Result<Self> {
        let path = dir.join(NAME);
        let file = File::options().create(true).truncate(false).write(true).open(&path);
        let file = file.map_err(|e| Error::host(format!("cannot open {}", path.display()), e))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self(file)),
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let dir = dir.display();
                let what =
                    format!("the network {dir} is in use by another process or handle; close that one first");
                Err(Error::new(ErrorKind::NetworkInUse, what))
            }
            Err(e) => Err(Error::host(format!("cannot lock {}", path.display()), e.into())),
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Closing alone is not enough: a child that another thread is starting just now has the file too, until it is another
        // program.
        let _ = flock(&self.0, FlockOperation::Unlock);
    }
}
