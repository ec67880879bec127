//! Volumes: disks that begin as a snapshot and are their own from then on.

mod changes;
mod create;
mod files;
#[cfg(test)]
mod files_tests;
mod io;
mod length;
mod mark;
#[cfg(test)]
mod mark_tests;
mod snapshot;
mod storing;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod writers_tests;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, RwLock};

use ami_core::Digest;

pub(crate) use self::changes::Changes;
use self::files::{Files, Names, Unmade};
use self::io::Pending;
pub use self::snapshot::FrozenVolumes;
use self::snapshot::Last;
use crate::format::{BLOCK, MAX_SIZE};
use crate::freeze::Freeze;
use crate::fs;
use crate::keys::{EncryptionKey, KeyContext};
use crate::log::{AppendError, Log};
use crate::map::StateMap;
use crate::store::{Locked, lock, parent, sync_dir};
use crate::{Disk, Error, ErrorKind, Result, Snapshot, Store};

/// A disk that can be written, and that begins as a snapshot or as zeroes.
///
/// A volume is a directory with two files: the overlay holds the blocks of 4 KiB that the volume has
/// written, each at its own offset, and the log says which those are. Nothing of the snapshot is copied, so that
/// making a volume takes the same time however large it is. A read goes to the overlay or to the
/// snapshot's packs, and never further.
///
/// # Durability
///
/// A flush makes the overlay durable and then, if blocks were written for the first time, the log: one
/// synchronisation or two, none if nothing was written since the last. After a crash the volume is what
/// it was at the last flush, and of each block written since either that or something newer. When a
/// synchronisation fails the kernel forgets what it could not write, so this and every later
/// flush is an error until the volume is opened again.
///
/// Cheap to clone; all clones are the same volume.
///
/// ```
/// use storage_block::{MemoryDisk, Store, Volume};
///
/// # let dir = tempfile::tempdir()?;
/// let store = Store::open(dir.path().join("store"))?;
/// let image = MemoryDisk::from_vec(vec![7; 1 << 20])?.into_disk();
/// let (snapshot, _) = store.import(&image, &mut |_| ())?;
///
/// let volume = Volume::create(&dir.path().join("vol"), Some(&snapshot), 8 << 20)?;
/// volume.disk().write_at(&[9; 512], 0)?;
/// volume.disk().flush()?;
/// let (next, stats) = volume.snapshot(&store)?;
/// assert_eq!((next.size(), stats.changed_bytes), (volume.size(), 4096));
///
/// let dir = volume.dir().to_owned();
/// drop(volume);
/// let volume = Volume::open(&dir, &store)?;
/// assert_eq!(volume.base(), Some(snapshot.digest()));
/// volume.delete()?;
/// Volume::remove(&dir)?; // of one that is not open; here nothing is left
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Volume(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    dir: PathBuf,
    /// It never shrinks.
    size: AtomicU64,
    base: Option<Snapshot>,
    /// None, of a volume that gets them when it is first written.
    files: OnceLock<Files>,
    /// Held while they are made then, or it is deleted before.
    unmade: Mutex<Unmade>,
    /// Of an encrypted volume.
    key: Option<EncryptionKey>,
    map: StateMap,
    /// Held for reading by writes of whole blocks and of blocks that are in the overlay already; for
    /// writing by whatever takes a block out of the overlay, or carries bytes from a block's old place into
    /// its new one, or wants nobody to write.
    gate: RwLock<Gate>,
    freeze: Freeze,
    /// The last snapshot that was made of the volume, of which it differs in what the gate has.
    last: Mutex<Option<Last>>,
    pending: Mutex<Pending>,
    /// Something was written since the last flush began.
    dirty: AtomicBool,
    /// A synchronisation has failed.
    failed: AtomicBool,
    /// What comes between a block's new state in the map and whatever is done next.
    #[cfg(test)]
    between: writers_tests::Between,
}

/// What who passes the gate has to do.
#[derive(Debug, Default)]
struct Gate {
    /// What was written since the last snapshot, if there was one since the volume was opened.
    changes: Option<Arc<Changes>>,
}

impl Gate {
    /// Notes that so many blocks are not what they were.
    fn mark(&self, first: u64, count: u64) {
        if let Some(changes) = &self.changes {
            changes.mark(first, count);
        }
    }
}

const OVERLAY: &str = "overlay";

impl Volume {
    /// Opens the volume in `dir`, whose snapshot is in `store`.
    ///
    /// # Errors
    ///
    /// [`NotFound`](ErrorKind::NotFound) if there is none, nor a whole one, as where a crash came while it was made, or its
    /// snapshot is gone;
    /// [`KeyUnavailable`](ErrorKind::KeyUnavailable) if it is encrypted and the store does not have its key;
    /// [`InUse`](ErrorKind::InUse); [`Corrupt`](ErrorKind::Corrupt).
    pub fn open(dir: &Path, store: &Store) -> Result<Self> {
        let path = dir.join(OVERLAY);
        // A mark that stands alone is what is left of a volume that was never there for anybody, or is no more.
        let marked = dir.is_dir() && mark::is_there(dir)?;
        let overlay = Locked::open(&path, marked)?;
        if marked {
            mark::restore_log(dir)?;
        }
        let (mut log, map) = Log::open(dir)?;
        mark::discard(dir);
        let closing = log.take_closing();
        let header = log.header();
        let base = header.base.map(|base| store.snapshot(&base)).transpose()?;
        if base.as_ref().is_some_and(|base| base.size() > header.size) {
            return Err(Error::corrupt(dir, "the volume is smaller than its snapshot"));
        }
        // No such volume is ever made: somebody has put another log there, by which all that is written from now on would
        // stand in the overlay, and in snapshots of it, for anybody to read.
        if header.key.is_none() && base.as_ref().is_some_and(Snapshot::encrypted) {
            return Err(Error::corrupt(dir, "its snapshot is encrypted, and its log has no key"));
        }
        let failed = |e| Error::io(e, format!("cannot open {}", path.display()));
        let len = overlay.metadata().map_err(failed)?.len();
        if len < map.overlay_end() * BLOCK {
            return Err(Error::corrupt(&path, format_args!("it has been cut to {len} bytes")));
        }
        if len != header.size {
            overlay.set_len(header.size).map_err(failed)?;
        }
        let key = header
            .key
            .as_ref()
            .map(|key| store.0.unlock(&key.wrapped, &KeyContext::volume(&key.salt)))
            .transpose()?;
        let size = header.size;
        let files = Files::new(overlay, log, key.as_ref(), Names::Durable);
        let volume = Self::new(dir, base, size, key, map, Some(files));
        match closing {
            Some(closing) => volume.0.resume(closing, store),
            // Who had it before may have died with writes that no flush has covered, and they are read now.
            None => volume.0.dirty.store(true, Ordering::Release),
        }
        Ok(volume)
    }

    fn new(
        dir: &Path,
        base: Option<Snapshot>,
        size: u64,
        key: Option<EncryptionKey>,
        map: StateMap,
        files: Option<Files>,
    ) -> Self {
        Self(Arc::new(Inner {
            dir: dir.to_owned(),
            size: AtomicU64::new(size),
            base,
            files: files.map_or_else(OnceLock::new, OnceLock::from),
            unmade: Mutex::default(),
            key,
            map,
            gate: RwLock::default(),
            freeze: Freeze::default(),
            last: Mutex::default(),
            pending: Mutex::default(),
            dirty: AtomicBool::new(false),
            failed: AtomicBool::new(false),
            #[cfg(test)]
            between: writers_tests::Between::default(),
        }))
    }

    /// The size in bytes.
    pub fn size(&self) -> u64 {
        self.0.size()
    }

    /// Whether [`grow`](Self::grow) takes this size, for who has to promise it before.
    ///
    /// ```
    /// # let dir = tempfile::tempdir()?;
    /// use storage_block::{ErrorKind, Volume};
    ///
    /// let volume = Volume::create(&dir.path().join("vol"), None, 1 << 30)?;
    /// volume.check_growth(2 << 30)?;
    /// assert_eq!(volume.check_growth(1 << 20).err().map(|error| error.kind()), Some(ErrorKind::InvalidSize));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidSize`](ErrorKind::InvalidSize).
    pub fn check_growth(&self, size: u64) -> Result<()> {
        check_size(size)?;
        if size < self.size() {
            return Err(Error::invalid_size(size, "is less than that of the volume"));
        }
        length::check(&self.0.dir, size)
    }

    /// Makes the volume larger while it is in use; what is new reads as zeroes.
    ///
    /// It is durable on return, and a crash before leaves the volume in its old size or in its new one. Its disks
    /// have the new size from then on: whoever has told a guest the old one asks
    /// [`Disk::size`] again, which costs no more than a load.
    ///
    /// ```
    /// use storage_block::{ErrorKind, Volume};
    ///
    /// let dir = tempfile::tempdir()?;
    /// let volume = Volume::create(&dir.path().join("vol"), None, 1 << 30)?;
    /// let disk = volume.disk();
    /// volume.grow(2 << 30)?;
    /// disk.write_at(b"there is room now", 3 << 29)?;
    /// assert_eq!(disk.size(), 2 << 30);
    /// assert_eq!(volume.grow(1 << 30).err().map(|error| error.kind()), Some(ErrorKind::InvalidSize));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidSize`](ErrorKind::InvalidSize) unless `size` is a multiple of 4096, no less than the volume has,
    /// at most 64 TiB and [no more than the file system takes](Self::create); [`NoSpace`](ErrorKind::NoSpace), or what else the file system says. The size is the old one
    /// then, until the volume is opened again: if it was the last synchronisation that failed, it may then be the new one.
    pub fn grow(&self, size: u64) -> Result<()> {
        let inner = &*self.0;
        check_size(size)?;
        let files = inner.files()?;
        let mut log = lock(&files.log);
        inner.check_durable()?;
        let old = inner.size();
        if size <= old {
            let less = || Error::invalid_size(size, "is less than that of the volume");
            return if size == old { Ok(()) } else { Err(less()) };
        }
        inner.sync_new(files, &log)?;
        length::set_len(files.overlay.file(), &inner.dir, size, || inner.cannot("lengthen"))?;
        let logged = if files.are_deleted() { Ok(()) } else { log.grow(size) };
        match logged {
            Ok(()) => {
                inner.size.store(size, Ordering::Release);
                Ok(())
            }
            Err(AppendError::Write(error)) => {
                // Nobody has written there, and opening would do it too.
                let _ = files.overlay.file().set_len(old);
                Err(error)
            }
            Err(AppendError::Sync(error)) => {
                inner.failed.store(true, Ordering::Release);
                Err(error)
            }
        }
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.0.dir
    }

    /// The snapshot that the volume began as. The store must keep it for as long as there is the volume.
    pub fn base(&self) -> Option<Digest> {
        self.0.base.as_ref().map(Snapshot::digest)
    }

    /// Whether there is anything of it on the disk: always, but for one that
    /// [is made when it is written](crate::VolumeOptions::create_on_write) and has not been.
    pub fn has_files(&self) -> bool {
        self.0.files.get().is_some()
    }

    /// Whether it is encrypted at rest.
    pub fn encrypted(&self) -> bool {
        self.0.key.is_some()
    }

    /// The key of an encrypted volume, for what is to share its chunks.
    pub fn key(&self) -> Option<&EncryptionKey> {
        self.0.key.as_ref()
    }

    /// The disk. It stays usable when the volume's own handles are gone.
    pub fn disk(&self) -> Disk {
        Disk::from_backend(self.clone())
    }

    /// Deletes the volume. Disks of it that are still held keep its bytes until they are dropped. Its directory goes, too, but
    /// where others have something in it.
    ///
    /// # Errors
    ///
    /// What the file system says.
    pub fn delete(self) -> Result<()> {
        let Some(files) = self.0.files_or_delete() else { return Ok(()) };
        // Nobody flushes meanwhile, and from then on nobody names a file.
        let _log = lock(&files.log);
        if files.are_deleted() {
            return Ok(());
        }
        remove_files(&self.0.dir)?;
        *lock(&files.names) = Names::Gone;
        Ok(())
    }

    /// Deletes the volume in `dir`, whole or half-made, without opening it, and `dir` where nothing is left in it. Files of others
    /// stay: where there is no overlay, a `log` goes only if it begins as a volume's does, or is empty. It is no error if there
    /// is nothing, or nothing of a volume's.
    ///
    /// # Errors
    ///
    /// [`InUse`](ErrorKind::InUse), or what the file system says.
    pub fn remove(dir: &Path) -> Result<()> {
        let _lock = match Locked::open(&dir.join(OVERLAY), false) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            lock => lock.ok(),
        };
        remove_files(dir)
    }
}

impl Inner {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // What no flush has covered may be gone when the volume is opened, and nobody would know.
        if !*self.dirty.get_mut() && !*self.failed.get_mut() {
            self.close();
        }
    }
}

fn check_size(size: u64) -> Result<()> {
    if size % BLOCK != 0 || size > MAX_SIZE {
        return Err(Error::invalid_size(
            size,
            "is not a multiple of 4096 bytes up to 64 TiB, to which the size of a snapshot is rounded up for it",
        ));
    }
    Ok(())
}

/// The mark first, and then the log: without either there is no volume.
fn remove_files(dir: &Path) -> Result<()> {
    mark::remove(dir)?;
    let gone = |result: std::io::Result<()>, path: &Path| match result {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io(e, format!("cannot remove {}", path.display())))
        }
        _ => Ok(()),
    };
    let overlay = dir.join(OVERLAY);
    Log::remove(dir, overlay.symlink_metadata().is_ok())?;
    gone(fs::remove_file(&overlay), &overlay)?;
    match fs::remove_dir(dir) {
        // What others have there stays, and so does the directory; and so does one that is called `.` by who is in it.
        Err(e) if is_not_empty(&e) || e.kind() == std::io::ErrorKind::InvalidInput => return sync_dir(dir),
        removed => gone(removed, dir)?,
    }
    let parent = parent(dir);
    if parent.exists() { sync_dir(parent) } else { Ok(()) }
}

/// Whether that is why a directory cannot be removed; file systems say it in two ways.
fn is_not_empty(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{AlreadyExists, DirectoryNotEmpty};
    matches!(error.kind(), DirectoryNotEmpty | AlreadyExists)
}
