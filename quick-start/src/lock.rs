//! Directories that one build at a time works in.

use std::fs::{self, File, Metadata};
use std::os::unix::fs::MetadataExt as _;
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
        loop {
            let locked = Self::once(dir, reporter)?;
            if locked.is_at(dir) {
                return Ok(locked);
            }
            // Who had it has removed it, and what was waited for is none any more.
        }
    }

    fn once(dir: &Path, reporter: &mut Reporter<'_>) -> Result<Self> {
        let context = || format!("cannot lock {}", dir.display());
        let made = (!dir.exists()).then(|| dir.to_owned());
        fs::create_dir_all(dir).context(|| format!("cannot make {}", dir.display()))?;
        let new = Self { dir: File::open(dir).context(context)?, made };
        match flock(&new.dir, FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) => {
                reporter.detail("waiting for another build");
                // A lock is of the open file, which this program has as its standard input: it can be ended while it
                // waits.
                let mut waiting = process::command("flock");
                waiting.args(["-x", "0"]).stdin(new.dir.try_clone().context(context)?);
                process::output(&mut waiting, reporter)?;
            }
            locked => locked.context(context)?,
        }
        Ok(new)
    }

    fn is_at(&self, path: &Path) -> bool {
        let same = |own: Metadata, there: Metadata| (own.dev(), own.ino()) == (there.dev(), there.ino());
        self.dir.metadata().is_ok_and(|own| path.metadata().is_ok_and(|there| same(own, there)))
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

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread;

    use super::*;
    use crate::ErrorKind;

    #[test]
    fn who_waits_for_a_directory_gets_it_or_is_cancelled() {
        let home = tempfile::tempdir().unwrap();
        let dir = &*home.path().join("dir");
        let lock = |tell: &mut dyn FnMut(crate::Progress)| Locked::new(dir, &mut Reporter::new(tell)?);
        let held = lock(&mut |_| ()).unwrap();
        let cancelled = lock(&mut |progress| progress.cancel());
        assert_eq!(cancelled.err().map(|e| e.kind()), Some(ErrorKind::Cancelled));
        let (waits, waiting) = mpsc::channel();
        thread::scope(|scope| {
            let other = scope.spawn(move || lock(&mut |_| waits.send(()).unwrap()).unwrap().is_at(dir));
            waiting.recv().unwrap();
            // It takes the directory with it, which the other makes anew.
            drop(held);
            assert!(other.join().unwrap());
        });
        assert!(!home.path().join("dir").exists(), "an empty directory is left");
    }
}
