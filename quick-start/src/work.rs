//! The directory that something is made in before it is moved to its place.

use std::fs::{self, File};
use std::io::ErrorKind::NotFound;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::syncfs;

use crate::Result;
use crate::error::Context as _;

/// Its name in a directory that one build at a time has, so that what a crash has left goes with the next.
const NAME: &str = ".work";

/// A working directory, empty at first, which goes with all that is left in it.
pub(crate) struct Work {
    path: PathBuf,
}

impl Work {
    /// In `dir`, which the caller has [locked](crate::lock::Locked).
    pub(crate) fn new(dir: &Path) -> Result<Self> {
        let path = dir.join(NAME);
        match fs::remove_dir_all(&path) {
            Err(e) if e.kind() == NotFound => {}
            gone => {
                gone.context(|| format!("cannot remove {}, which an earlier build has left", path.display()))?
            }
        }
        // Where root of a namespace builds, it is another user here.
        let made = fs::create_dir(&path)
            .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(0o755)));
        made.context(|| format!("cannot make {}", path.display()))?;
        Ok(Self { path })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes what is in it last, so that no crash leaves it under its name without its content.
    pub(crate) fn sync(&self) -> Result<()> {
        let synced = File::open(&self.path).and_then(|dir| Ok(syncfs(dir)?));
        synced.context(|| format!("cannot write {} to its device", self.path.display()))
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_crash_has_left_goes_or_is_told_of() {
        let dir = tempfile::tempdir().unwrap();
        let entries = || dir.path().read_dir().unwrap().count();
        let crashed = Work::new(dir.path()).unwrap();
        fs::create_dir_all(crashed.path().join("tree/etc")).unwrap();
        std::mem::forget(crashed);
        let next = Work::new(dir.path()).unwrap();
        assert_eq!((entries(), next.path().read_dir().unwrap().count()), (1, 0));
        next.sync().unwrap();
        drop(next);
        assert_eq!(entries(), 0);

        fs::write(dir.path().join(NAME), "no directory").unwrap();
        let error = Work::new(dir.path()).err().unwrap();
        assert!(error.to_string().contains(NAME), "{error}");
    }
}
