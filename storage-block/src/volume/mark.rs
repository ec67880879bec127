//! The mark beside a new volume, by which it is durable before its own names are.
//!
//! A volume of which nothing has been flushed is what its log's name says. A symbolic link in the directory above says the
//! same: so one synchronisation of that directory makes the volume's name durable and all that is to be known of it, and
//! what a power cut takes of its files is made again when it is opened. The first flush makes the names in the volume
//! durable, and the mark goes. From then on it means nothing, even if a power cut brings it back: who has a log
//! that says something asks no mark, and who removes a volume sees to it that the mark is gone for good before anything else.

use std::path::{Path, PathBuf};

use rustix::io::Errno;

use crate::fs;
use crate::log::Log;
use crate::store::{parent, sync_dir};
use crate::{Error, Result, format};

/// Where the mark of the volume in `dir` is, if that has a name.
fn path(dir: &Path) -> Option<PathBuf> {
    let mut name = std::ffi::OsString::from(".");
    name.push(dir.file_name()?);
    name.push(".new");
    Some(parent(dir).join(name))
}

/// What the mark says: the name of the volume's log. `None` where there is no mark.
fn read(dir: &Path) -> Result<Option<(PathBuf, PathBuf)>> {
    let Some(path) = path(dir) else { return Ok(None) };
    match std::fs::read_link(&path) {
        Ok(target) => Ok(Some((path, target))),
        // There is nothing, or what is no link, or a volume whose name has no room for a mark's.
        Err(e) => match Errno::from_io_error(&e) {
            Some(Errno::NOENT | Errno::NOTDIR | Errno::INVAL | Errno::NAMETOOLONG) => Ok(None),
            _ => Err(Error::io(e, format!("cannot read {}", path.display()))),
        },
    }
}

/// Whether there is a mark.
pub(super) fn is_there(dir: &Path) -> Result<bool> {
    read(dir).map(|mark| mark.is_some())
}

/// Makes the mark of a volume whose log is called `log`.
pub(super) fn make(dir: &Path, log: &str) -> std::io::Result<()> {
    fs::symlink(log, &path(dir).ok_or(std::io::ErrorKind::InvalidInput)?)
}

/// Makes again what is missing of the log of a volume with a mark. Nothing was ever flushed to it, so that it is as it was
/// when the volume was made.
pub(super) fn restore_log(dir: &Path) -> Result<()> {
    let Some((path, target)) = read(dir)? else { return Ok(()) };
    Log::restore(dir, || {
        let name = target.to_str().unwrap_or_default();
        format::parse_log_name(name).map_err(|why| Error::corrupt(&path, why)).map(|_| name)
    })
}

/// Removes the mark of a volume whose names are durable, or one that was left of an earlier volume. If that fails, it does
/// no harm.
pub(super) fn discard(dir: &Path) {
    if let Ok(Some((path, _))) = read(dir) {
        let _ = fs::remove_file(&path);
    }
}

/// Removes the mark for good: one that came back when half of a volume's files are gone would bring back an empty volume.
pub(super) fn remove(dir: &Path) -> Result<()> {
    if let Some((path, _)) = read(dir)? {
        match fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io(e, format!("cannot remove {}", path.display())));
            }
            _ => {}
        }
    }
    // Also where there is none: who removed it may have died, and so may have who flushed the volume.
    let parent = parent(dir);
    if parent.exists() { sync_dir(parent) } else { Ok(()) }
}
