//! How long a file the file system can have: a volume is no larger, as its overlay is one.

use std::io;
use std::path::Path;

use crate::fs::{self, File};
use crate::store::parent;
use crate::{Error, ErrorKind, Result};

/// What every file system takes on which volumes are of any use.
const SURE: u64 = 1 << 40;

/// Gives the overlay in `dir` a length. `context` says what was done where that fails for another reason than its size.
pub(super) fn set_len(overlay: &File, dir: &Path, size: u64, context: impl FnOnce() -> String) -> Result<()> {
    overlay.set_len(size).map_err(|error| match error.kind() {
        io::ErrorKind::FileTooLarge => too_large(error, dir, size),
        _ => Error::io(error, context()),
    })
}

/// The same of a volume in `dir` before that is done: one that gets its files when it is first written would be told then, and so
/// would whoever writes. What else comes in the way is met by who makes them.
pub(super) fn check(dir: &Path, size: u64) -> Result<()> {
    if size < SURE {
        return Ok(());
    }
    match fs::longest_file(parent(dir), size) {
        Ok(longest) if longest < size => Err(too_large(io::ErrorKind::FileTooLarge.into(), dir, size)),
        _ => Ok(()),
    }
}

#[cold]
fn too_large(error: io::Error, dir: &Path, size: u64) -> Error {
    let file_system = format!("the file system of {}", dir.display());
    let why = match fs::longest_file(parent(dir), size) {
        Ok(longest) => format!("the {longest} bytes of the longest file that {file_system} can have"),
        Err(_) => format!("{file_system} can have in a file"),
    };
    Error::with_source(ErrorKind::InvalidSize, format!("a size of {size} bytes is more than {why}"), error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::MAX_SIZE;
    use crate::{Volume, VolumeOptions};

    /// A directory whose file system has no file as long as a volume may be, and how long its files may be.
    fn narrow() -> Option<(tempfile::TempDir, u64)> {
        let dir = tempfile::tempdir().unwrap();
        let longest = fs::longest_file(dir.path(), MAX_SIZE).unwrap();
        if longest == MAX_SIZE {
            eprintln!("SKIPPED: the file system has files of 64 TiB; sizes that it has not are not tested");
            return None;
        }
        Some((dir, longest))
    }

    fn refused<T: std::fmt::Debug>(result: Result<T>, longest: u64) {
        let error = result.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidSize, "{error}");
        assert!(error.to_string().contains(&longest.to_string()), "{error}");
    }

    #[test]
    fn what_the_file_system_cannot_hold_is_refused_when_it_is_made_or_grown() {
        let Some((dir, longest)) = narrow() else { return };
        let path = dir.path().join("volume");
        refused(Volume::create(&path, None, MAX_SIZE), longest);
        assert!(!path.exists(), "nothing is left of it");
        let volume = Volume::create(&path, None, 1 << 20).unwrap();
        refused(volume.check_growth(longest + 4096), longest);
        refused(volume.grow(longest + 4096), longest);
        assert_eq!(volume.size(), 1 << 20);
        volume.grow(longest).unwrap();
        volume.disk().write_at(&[7; 4096], longest - 4096).unwrap();
        volume.disk().flush().unwrap();
    }

    /// Before anybody writes to it, to whom an error would come as one of the disk's.
    #[test]
    fn a_volume_without_files_is_none_that_could_never_have_them() {
        let Some((dir, longest)) = narrow() else { return };
        let path = dir.path().join("volume");
        let create = |size| VolumeOptions::new().create_on_write(&path, None, size, || ());
        refused(create(longest + 4096), longest);
        let volume = create(longest).unwrap();
        assert_eq!(
            std::fs::read_dir(dir.path()).unwrap().count(),
            0,
            "nothing is there before it is written"
        );
        volume.disk().write_at(&[7; 4096], longest - 4096).unwrap();
        volume.disk().flush().unwrap();
    }
}
