//! How a volume is made.

use std::path::Path;
use std::sync::atomic::Ordering;

use super::{Inner, Names, OVERLAY, Volume, check_size, mark};
use crate::format::VolumeKey;
use crate::fs::{self, File};
use crate::keys::EncryptionKey;
use crate::log::Log;
use crate::map::StateMap;
use crate::options::VolumeOptions;
use crate::store::{Locked, lock, parent, sync_at_once, sync_dir};
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
    /// snapshot's and at most 64 TiB; [`AlreadyExists`](crate::ErrorKind::AlreadyExists);
    /// [`NoSpace`](crate::ErrorKind::NoSpace). After a failure nothing is left.
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
        check_size(size)?;
        if base.is_some_and(|base| base.size() > size) {
            return Err(Error::invalid_size(size, "is less than that of the snapshot"));
        }
        let new = match fs::create_dir(dir) {
            Ok(()) => true,
            // A mark beside it is that of a volume whose files a crash has taken.
            Err(e)
                if e.kind() == std::io::ErrorKind::AlreadyExists && dir.is_dir() && !mark::is_there(dir)? =>
            {
                false
            }
            Err(e) => return Err(Error::io(e, format!("cannot create {}", dir.display()))),
        };
        let path = dir.join(OVERLAY);
        let overlay = File::create_new(&path).map_err(|e| {
            if new {
                let _ = fs::remove_dir(dir);
            }
            Error::io(e, format!("cannot create {}", path.display()))
        })?;
        if new {
            mark::discard(dir);
        }
        let created = Self::create_files(dir, overlay, base, size, key);
        if let Ok(volume) = &created {
            *lock(&volume.0.names) = Names::New { own_dir: new };
        }
        if created.is_err() {
            let _ = Log::remove(dir);
            let _ = fs::remove_file(&path);
            if new {
                let _ = fs::remove_dir(dir);
            }
        }
        created
    }

    fn create_files(
        dir: &Path,
        overlay: File,
        base: Option<&Snapshot>,
        size: u64,
        key: Option<&EncryptionKey>,
    ) -> Result<Self> {
        let overlay = Locked::lock(overlay, &dir.join(OVERLAY))?;
        overlay.set_len(size).map_err(|e| {
            Error::io(e, format!("cannot make {} {size} bytes long", dir.join(OVERLAY).display()))
        })?;
        let volume_key = key.map(VolumeKey::new).transpose()?;
        let log = Log::create(dir, size, base.map(Snapshot::digest), volume_key)?;
        Ok(Self::new(dir, base.cloned(), overlay, StateMap::default(), log, key.cloned()))
    }

    /// Makes a volume durable to which nothing has been written, by its mark where there can be one.
    pub(crate) fn sync_untouched(&self) -> Result<()> {
        let log = lock(&self.0.log);
        let blank =
            (*lock(&self.0.names) == Names::New { own_dir: true }).then(|| log.blank_name()).flatten();
        // What was in a directory before might come back, and be taken for a part of the volume.
        if blank.is_none_or(|name| mark::make(&self.0.dir, name).is_err()) {
            return self.0.sync_new(&log);
        }
        sync_dir(parent(&self.0.dir))?;
        *lock(&self.0.names) = Names::Marked;
        Ok(())
    }

    /// Makes a volume durable that was [created unsynced](Self::create_unsynced), as it was then. Does nothing to any
    /// other, nor to one that was flushed since.
    ///
    /// # Errors
    ///
    /// What the file system says. The volume may then be there after a crash, or not, and no flush succeeds any more.
    pub fn sync_created(&self) -> Result<()> {
        let log = lock(&self.0.log);
        self.0.check_durable()?;
        self.0.sync_new(&log)
    }
}

impl Inner {
    /// Makes the names durable by which a new volume is found: what is flushed is worth nothing without them.
    pub(super) fn sync_new(&self, log: &Log) -> Result<()> {
        let mut state = lock(&self.names);
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
