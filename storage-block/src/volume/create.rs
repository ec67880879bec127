//! How a volume is made.

use std::path::Path;
use std::sync::atomic::Ordering;

use super::{Files, Inner, Names, Unmade, Volume, check_size, length, mark};
use crate::keys::EncryptionKey;
use crate::log::Log;
use crate::map::StateMap;
use crate::options::VolumeOptions;
use crate::store::{lock, parent, sync_at_once, sync_dir};
use crate::{Error, Result, Snapshot};

impl Volume {
    /// Makes a volume of `size` bytes in `dir`, which is made too; its parent exists.
    ///
    /// It is durable on return. That takes one synchronisation, of `dir`'s parent: in there a symbolic link, `.NAME.new`
    /// for a `dir` called NAME, says all that there is to say of a new volume, and opening makes again what a crash
    /// takes of its files. The link goes with the first flush. Where there can be none, where `dir` was there
    /// before and where the volume is encrypted, the names in `dir` are synchronised side by side with those in its parent,
    /// and the log if it is encrypted.
    ///
    /// # Errors
    ///
    /// [`InvalidSize`](crate::ErrorKind::InvalidSize) unless `size` is a multiple of 4096, no less than the
    /// snapshot's, at most 64 TiB and no more than the file system takes in one file, which is 4 KiB less than 16 TiB on ext4:
    /// the error says how much that is; [`AlreadyExists`](crate::ErrorKind::AlreadyExists);
    /// [`NoSpace`](crate::ErrorKind::NoSpace). After a failure nothing is left of what was made.
    pub fn create(dir: &Path, base: Option<&Snapshot>, size: u64) -> Result<Self> {
        VolumeOptions::new().create(dir, base, size)
    }

    /// The same without waiting for the disk: the volume becomes durable with its first flush, or by
    /// [`sync_created`](Self::sync_created). For those who can make it once more if a crash takes it before.
    ///
    /// ```
    /// use storage_block::Volume;
    ///
    /// let dir = tempfile::tempdir()?;
    /// let volume = Volume::create_unsynced(&dir.path().join("vol"), None, 1 << 30)?;
    /// volume.disk().write_at(b"at work", 0)?;
    /// volume.sync_created()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`create`](Self::create).
    pub fn create_unsynced(dir: &Path, base: Option<&Snapshot>, size: u64) -> Result<Self> {
        VolumeOptions::new().create_unsynced(dir, base, size)
    }

    pub(crate) fn create_with(
        dir: &Path,
        base: Option<&Snapshot>,
        size: u64,
        key: Option<&EncryptionKey>,
    ) -> Result<Self> {
        check_sizes(base, size)?;
        let files = Files::create(dir, true, base.map(Snapshot::digest), size, key)?;
        Ok(Self::new(dir, base.cloned(), size, key.cloned(), StateMap::default(), Some(files)))
    }

    pub(crate) fn create_without_files(
        dir: &Path,
        base: Option<&Snapshot>,
        size: u64,
        made: impl FnOnce() + Send + 'static,
    ) -> Result<Self> {
        check_sizes(base, size)?;
        length::check(dir, size)?;
        let volume = Self::new(dir, base.cloned(), size, None, StateMap::default(), None);
        *lock(&volume.0.unmade) = Unmade::telling(made);
        Ok(volume)
    }

    /// Makes a volume durable to which nothing has been written, by its mark where there can be one.
    pub(crate) fn sync_untouched(&self) -> Result<()> {
        let files = self.0.files()?;
        let log = lock(&files.log);
        let blank = (*lock(&files.names) == Names::New { own_dir: true }).then(|| log.blank_name()).flatten();
        // What was in a directory before might come back, and be taken for a part of the volume.
        if blank.is_none_or(|name| mark::make(&self.0.dir, name).is_err()) {
            return self.0.sync_new(files, &log);
        }
        sync_dir(parent(&self.0.dir))?;
        *lock(&files.names) = Names::Marked;
        Ok(())
    }

    /// Makes a volume durable that was [created unsynced](Self::create_unsynced), as it was then, or that is
    /// [made when it is written](VolumeOptions::create_on_write), whether or not it was. Does nothing to any
    /// other, nor to one that was flushed since.
    ///
    /// # Errors
    ///
    /// What the file system says. The volume may then be there after a crash, or not, and no flush succeeds any more, unless
    /// its files could not be made.
    pub fn sync_created(&self) -> Result<()> {
        let files = self.0.files()?;
        let log = lock(&files.log);
        self.0.check_durable()?;
        self.0.sync_new(files, &log)
    }
}

impl Inner {
    /// Makes the names durable by which a new volume is found: what is flushed is worth nothing without them.
    pub(super) fn sync_new(&self, files: &Files, log: &Log) -> Result<()> {
        let mut state = lock(&files.names);
        let dir = &self.dir;
        // None of them relies on another: before this returns nobody has been promised anything.
        let names: [&(dyn Fn() -> Result<()> + Sync); 2] = [&|| sync_dir(parent(dir)), &|| sync_dir(dir)];
        let synced = match *state {
            Names::Durable | Names::Gone => return Ok(()),
            Names::Marked => names[1]().inspect(|()| mark::discard(dir)),
            Names::New { .. } if log.is_blank() => sync_at_once(&names),
            Names::New { .. } => sync_at_once(&[names[0], names[1], &|| log.sync_all()]),
        };
        match synced {
            Ok(()) => *state = Names::Durable,
            Err(_) => self.failed.store(true, Ordering::Release),
        }
        synced
    }
}

fn check_sizes(base: Option<&Snapshot>, size: u64) -> Result<()> {
    check_size(size)?;
    match base {
        Some(base) if base.size() > size => {
            Err(Error::invalid_size(size, "is less than that of the snapshot"))
        }
        _ => Ok(()),
    }
}
