//! Where a lab's disk lies until the lab is up. A lab that was killed before could not remove its own,
//! so the next one does.

use std::fs::{self, File};
use std::path::Path;

use anyhow::{Context as _, Result};
use rustix::fs::{FlockOperation, flock};
use tempfile::TempDir;

/// A directory that is removed when this is dropped, or by the next lab after this process has died.
pub(super) struct WorkDir {
    dir: TempDir,
    /// Says that its owner lives.
    _lock: File,
}

impl WorkDir {
    /// Makes one in `parent`.
    pub(super) fn new(parent: &Path) -> Result<Self> {
        let context = || format!("cannot make a working directory in {}", parent.display());
        fs::create_dir_all(parent).with_context(context)?;
        // Nobody sweeps while a directory is there and not locked yet.
        let sweeping = File::open(parent).with_context(context)?;
        flock(&sweeping, FlockOperation::LockExclusive).with_context(context)?;
        sweep(parent).context("cannot remove what a lab left that was killed")?;
        let prefix = format!("{}-", std::process::id());
        let dir = tempfile::Builder::new().prefix(&prefix).tempdir_in(parent).with_context(context)?;
        let lock = File::open(dir.path()).with_context(context)?;
        flock(&lock, FlockOperation::LockExclusive).with_context(context)?;
        Ok(Self { dir, _lock: lock })
    }

    pub(super) fn path(&self) -> &Path {
        self.dir.path()
    }
}

/// Removes the directories in `parent` that nobody has locked.
fn sweep(parent: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(parent)? {
        let path = entry?.path();
        // One that its owner removes meanwhile needs no sweeping.
        let Ok(dir) = File::open(&path) else { continue };
        if flock(&dir, FlockOperation::NonBlockingLockExclusive).is_ok() && path.is_dir() {
            fs::remove_dir_all(&path)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn removes_what_the_dead_left_and_nothing_else() {
        let parent = tempfile::tempdir().unwrap();
        let alive = WorkDir::new(parent.path()).unwrap();
        let dead = WorkDir::new(parent.path()).unwrap();
        fs::write(dead.path().join("disk.raw"), "").unwrap();
        let WorkDir { dir, _lock } = dead;
        let dead = dir.keep();
        drop(_lock);
        let next = WorkDir::new(parent.path()).unwrap();
        assert!(!dead.exists());
        assert!(alive.path().is_dir() && next.path().is_dir());
        drop((alive, next));
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 0);
    }
}
