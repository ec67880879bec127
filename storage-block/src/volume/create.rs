//! How a volume is made.

use std::path::Path;
use std::sync::atomic::Ordering;

use super::{Inner, OVERLAY, Volume, check_size};
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
    /// It is durable on return. That takes two synchronisations side by side, of `dir` and of its parent; a journalling
    /// file system does the work of both in one commit. All that there is to say is said by names, but where the volume is
    /// encrypted: then its log is synchronised, too. The overlay is left out: what is lost of it in a crash is its
    /// length, which opening restores.
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
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists && dir.is_dir() => false,
            Err(e) => return Err(Error::io(e, format!("cannot create {}", dir.display()))),
        };
        let path = dir.join(OVERLAY);
        let overlay = File::create_new(&path).map_err(|e| {
            if new {
                let _ = fs::remove_dir(dir);
            }
            Error::io(e, format!("cannot create {}", path.display()))
        })?;
        let created = Self::create_files(dir, overlay, base, size, key);
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
        let volume = Self::new(dir, base.cloned(), overlay, StateMap::default(), log, key.cloned());
        volume.0.new.store(true, Ordering::Release);
        Ok(volume)
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
        if !self.new.load(Ordering::Acquire) {
            return Ok(());
        }
        let dir = &self.dir;
        // None of them relies on another: before this returns nobody has been promised anything.
        let names: [&(dyn Fn() -> Result<()> + Sync); 2] = [&|| sync_dir(parent(dir)), &|| sync_dir(dir)];
        let synced = match log.is_blank() {
            true => sync_at_once(&names),
            false => sync_at_once(&[names[0], names[1], &|| log.sync_all()]),
        };
        match synced {
            Ok(()) => self.new.store(false, Ordering::Release),
            Err(_) => self.failed.store(true, Ordering::Release),
        }
        synced
    }
}
