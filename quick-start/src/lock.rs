//! Directories that one build at a time works in.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use crate::error::Context as _;
use crate::progress::Reporter;
use crate::{Result, process};

/// A directory that is this build's alone until this is dropped. One that was made for it, and is still empty, goes then.
pub(crate) struct Locked {
    dir: File,
    made: Option<PathBuf>,
}

impl Locked {
    /// Makes the directory if it is not there, and waits for whoever has it; that can be cancelled.
    pub(crate) fn new(dir: &Path, reporter: &mut Reporter<'_>) -> Result<Self> {
        let context = || format!("cannot lock {}", dir.display());
        let made = (!dir.exists()).then(|| dir.to_owned());
        fs::create_dir_all(dir).context(|| format!("cannot make {}", dir.display()))?;
        let new = Self { dir: File::open(dir).context(context)?, made };
        match flock(&new.dir, FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) => {
                reporter.detail("waiting for another build");
                // A lock is of the open file, which this program has as its standard input: it can be ended while it waits.
                let mut waiting = process::command("flock");
                waiting.args(["-x", "0"]).stdin(new.dir.try_clone().context(context)?);
                process::output(&mut waiting, reporter)?;
            }
            locked => locked.context(context)?,
        }
        Ok(new)
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        if let Some(made) = &self.made {
            // It fails where something is in it.
            let _ = fs::remove_dir(made);
        }
        let _ = flock(&self.dir, FlockOperation::Unlock);
    }
}
