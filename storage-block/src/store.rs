//! The store: the directory of packs and snapshots, and who may use it.

use std::collections::HashMap;
use std::io::Read as _;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak};
use std::thread::ScopedJoinHandle;

use ami_core::Digest;
use rustix::fs::FlockOperation;

use crate::cache::Cache;
use crate::format::{self, WrappedKey};
use crate::fs::{self, File};
use crate::keys::{EncryptionKey, KeyContext};
use crate::options::{Keys, StoreOptions};
use crate::pack::{Index, read_dir};
use crate::snapshot::{Root, Snapshot};
use crate::turns::Turns;
use crate::{Compression, Error, ErrorKind, Result, Verify};

/// A directory of snapshots, whose chunks are stored once however many snapshots have them.
///
/// A handle is cheap to clone. One process at a time has a store open, and one `Store` in it: a lock on
/// a file of the directory says so, which the kernel releases when the process dies. The store stays
/// open as long as any [`Snapshot`] or [`Volume`](crate::Volume) of it lives.
///
/// ```
/// use storage_block::{MemoryDisk, Store};
///
/// # let dir = tempfile::tempdir()?;
/// let store = Store::open(dir.path())?;
/// let image = MemoryDisk::from_vec(vec![7; 1 << 20])?.into_disk();
/// let (snapshot, stats) = store.import(&image, &mut |_| ())?;
/// assert_eq!(snapshot.size(), 1 << 20);
/// // Sixteen equal chunks are stored as one, and the manifest of them as another.
/// assert_eq!(stats.stored_bytes, (64 << 10) + (32 << 10));
/// assert_eq!(store.snapshots()?, [snapshot.digest()]);
/// assert!(Store::open(store.dir()).is_err(), "it is open");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Store(pub(crate) Arc<Inner>);

#[derive(Debug)]
pub(crate) struct Inner {
    dir: PathBuf,
    pub(crate) pack_units: u32,
    pub(crate) compression: Compression,
    pub(crate) verify: Verify,
    keys: Keys,
    pub(crate) cache: Cache,
    pub(crate) index: RwLock<Index>,
    /// Objects are dropped while nothing is stored that may rely on them.
    pub(crate) turns: Arc<Turns>,
    /// Held by who gives roots their names, until their objects are known.
    pub(crate) publishing: Mutex<()>,
    /// The snapshots that are open. Held while roots are removed, none of which is open then.
    pub(crate) roots: Mutex<HashMap<Digest, Weak<Root>>>,
    _lock: Locked,
}

impl Store {
    /// Opens the store in `dir`, making it if there is none, and clears away what a crash left
    /// half-made.
    ///
    /// # Errors
    ///
    /// [`InUse`](ErrorKind::InUse) if it is open already, [`NotFound`](ErrorKind::NotFound) if there is none and none
    /// is [to be made](StoreOptions::create), or what the file system says. A damaged pack is none: what it
    /// holds cannot be read, [`scrub`](Self::scrub) reports it, and all else is there.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        Self::open_with(dir, &StoreOptions::new())
    }

    /// The same with options.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open).
    pub fn open_with(dir: impl AsRef<Path>, options: &StoreOptions) -> Result<Self> {
        let dir = dir.as_ref().to_owned();
        let (packs, snapshots) = (dir.join(PACKS), dir.join(SNAPSHOTS));
        // The lock is made last: where it is, the names above it are durable.
        let lock = dir.join("lock");
        let new = !lock.exists();
        if new && !options.create {
            return Err(Error::new(ErrorKind::NotFound, format!("there is no store in {}", dir.display())));
        }
        for made in [&packs, &snapshots] {
            fs::create_dir_all(made)
                .map_err(|e| Error::io(e, format!("cannot create {}", made.display())))?;
        }
        if new {
            sync_dir(&dir)?;
            sync_dir(parent(&dir))?;
        }
        let lock = Locked::open(&lock, true)?;
        clear_half_made(&packs)?;
        clear_half_made(&snapshots)?;
        clear_lone_indices(&packs)?;
        let index = RwLock::new(Index::load(&packs, options.pack_units)?);
        // A process may have died between a name and its synchronisation, and what has a name is not
        // stored again.
        sync_dir(&packs)?;
        sync_dir(&snapshots)?;
        Ok(Self(Arc::new(Inner {
            dir,
            pack_units: options.pack_units,
            compression: options.compression,
            verify: options.verify,
            keys: options.keys.clone(),
            cache: Cache::new(options.cache),
            index,
            turns: Arc::default(),
            publishing: Mutex::default(),
            roots: Mutex::default(),
            _lock: lock,
        })))
    }

    /// A store whose new packs hold so many chunks, fewer than they may.
    #[cfg(test)]
    pub(crate) fn with_pack_slots(dir: PathBuf, pack_slots: u32) -> Result<Self> {
        let pack_units = pack_slots * crate::format::SLOT_UNITS;
        Self::open_with(dir, &StoreOptions { pack_units, ..StoreOptions::new() })
    }

    /// A new data key, wrapped by the key `key_id` of the store's [`KeyProvider`](crate::keys::KeyProvider) or by its
    /// default one. It is stored with what is encrypted with it, and nowhere else.
    ///
    /// # Errors
    ///
    /// [`KeyUnavailable`](ErrorKind::KeyUnavailable) if the store has no keys, or the provider does not have this one.
    pub fn new_key(&self, key_id: Option<&str>) -> Result<EncryptionKey> {
        match self.0.keys.provider() {
            Some(provider) => EncryptionKey::new(provider, key_id),
            None => Err(Error::new(ErrorKind::KeyUnavailable, "the store has no keys")),
        }
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.0.dir
    }

    /// Opens a snapshot: its root is read and checked, whatever its size.
    ///
    /// # Errors
    ///
    /// [`NotFound`](ErrorKind::NotFound), [`Corrupt`](ErrorKind::Corrupt);
    /// [`KeyUnavailable`](ErrorKind::KeyUnavailable) if it is encrypted and the store does not have its key.
    pub fn snapshot(&self, digest: &Digest) -> Result<Snapshot> {
        let root = self.0.open_root(digest)?;
        root.unlock(|wrapped, context| self.0.unlock(wrapped, context))?;
        Ok(Snapshot::new(Arc::clone(&self.0), root))
    }

    /// The snapshots there are, in the order of their digests.
    ///
    /// # Errors
    ///
    /// What the file system says.
    pub fn snapshots(&self) -> Result<Vec<Digest>> {
        let names = read_dir(&self.0.snapshots_dir())?;
        let mut digests: Vec<Digest> =
            names.iter().filter_map(|name| format!("{}{name}", Digest::PREFIX).parse().ok()).collect();
        digests.sort_unstable();
        Ok(digests)
    }
}

impl Inner {
    /// The key that was stored with something.
    pub(crate) fn unlock(&self, wrapped: &WrappedKey, context: &KeyContext) -> Result<EncryptionKey> {
        EncryptionKey::from_wrapped(self.keys.provider(), wrapped, context)
    }

    pub(crate) fn packs_dir(&self) -> PathBuf {
        self.dir.join(PACKS)
    }

    pub(crate) fn snapshots_dir(&self) -> PathBuf {
        self.dir.join(SNAPSHOTS)
    }

    pub(crate) fn root_path(&self, digest: &Digest) -> PathBuf {
        self.snapshots_dir().join(digest.to_hex())
    }

    /// The snapshot's root, shared by all who have it open.
    pub(crate) fn open_root(&self, digest: &Digest) -> Result<Arc<Root>> {
        // Held until it is known to be open, so that a sweep does not remove it meanwhile.
        let mut roots = lock(&self.roots);
        if let Some(root) = roots.get(digest).and_then(Weak::upgrade) {
            return Ok(root);
        }
        let path = self.root_path(digest);
        let bytes = match read_root(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Err(Error::new(ErrorKind::NotFound, format!("there is no snapshot {digest}")));
            }
            Err(e) => return Err(Error::io(e, format!("cannot read {}", path.display()))),
        };
        if bytes.len() > format::ROOT_MAX {
            return Err(Error::corrupt(&path, "it is longer than the root of any snapshot"));
        }
        let root = Root::parse(*digest, &bytes).map_err(|why| Error::corrupt(&path, why))?;
        Ok(remember(&mut roots, root))
    }

    /// Whether there is a root of this name that is what its name says.
    pub(crate) fn has_root(&self, digest: &Digest, bytes: &[u8]) -> bool {
        let path = self.root_path(digest);
        let is_as_long = |metadata: std::fs::Metadata| metadata.len() == bytes.len() as u64;
        std::fs::metadata(&path).is_ok_and(is_as_long) && read_root(&path).is_ok_and(|found| found == bytes)
    }

    /// Writes a root where it is found from now on. Its objects are durable already. A failure may leave it there.
    pub(crate) fn publish_root(&self, bytes: &[u8], key: Option<&EncryptionKey>) -> Result<Arc<Root>> {
        let digest = Digest::of(bytes);
        let path = self.root_path(&digest);
        let root = Root::parse(digest, bytes).map_err(|why| Error::corrupt(&path, why))?;
        if !self.has_root(&digest, bytes) {
            let dir = self.snapshots_dir();
            let failed = |e| Error::io(e, format!("cannot write {}", path.display()));
            fs::write_named(&path, bytes).map_err(failed)?;
            sync_dir(&dir)?;
        }
        let root = remember(&mut lock(&self.roots), root);
        if let Some(key) = key {
            root.unlock(|_, _| Ok(key.clone()))?;
        }
        Ok(root)
    }
}

/// The bytes of a root, or of what is longer than any: enough of it to see that.
fn read_root(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    std::fs::File::open(path)?.take(format::ROOT_MAX as u64 + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn remember(roots: &mut HashMap<Digest, Weak<Root>>, root: Root) -> Arc<Root> {
    if let Some(open) = roots.get(&root.digest).and_then(Weak::upgrade) {
        return open;
    }
    roots.retain(|_, root| root.strong_count() > 0);
    let digest = root.digest;
    let root = Arc::new(root);
    roots.insert(digest, Arc::downgrade(&root));
    root
}

const PACKS: &str = "packs";
const SNAPSHOTS: &str = "snapshots";

/// An open file with the lock on it, which goes with it, or with the process.
#[derive(Debug)]
pub(crate) struct Locked(File);

impl Locked {
    /// Opens `path`, making it if `create` says so, and takes the lock.
    pub(crate) fn open(path: &Path, create: bool) -> Result<Self> {
        let file = if create { File::open_or_create(path) } else { File::open_writable(path) };
        Self::lock(file.map_err(|e| Error::io(e, format!("cannot open {}", path.display())))?, path)
    }

    /// Takes the lock on a file that was opened as `path`.
    pub(crate) fn lock(file: File, path: &Path) -> Result<Self> {
        match file.flock(FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self(file)),
            Err(rustix::io::Errno::WOULDBLOCK) => {
                Err(Error::new(ErrorKind::InUse, format!("{} is in use", path.display())))
            }
            Err(e) => Err(Error::io(e.into(), format!("cannot lock {}", path.display()))),
        }
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        // Closing alone is not enough: a child that another thread is starting just now has the file too,
        // until it is another program.
        let _ = self.0.flock(FlockOperation::Unlock);
    }
}

impl Deref for Locked {
    type Target = File;

    fn deref(&self) -> &File {
        &self.0
    }
}

/// Removes the files that never got their final names.
fn clear_half_made(dir: &Path) -> Result<()> {
    for name in read_dir(dir)?.iter().filter(|name| name.ends_with(".tmp")) {
        let path = dir.join(name);
        fs::remove_file(&path).map_err(|e| Error::io(e, format!("cannot remove {}", path.display())))?;
    }
    Ok(())
}

/// Removes an index whose pack a crash kept from getting, or from losing, its name.
fn clear_lone_indices(packs: &Path) -> Result<()> {
    for name in read_dir(packs)? {
        if let Some(number) = crate::pack::number_of(&name, "index") {
            // One that cannot be looked at is there.
            if matches!(crate::pack::pack_path(packs, number).try_exists(), Ok(false)) {
                let path = packs.join(&name);
                fs::remove_file(&path)
                    .map_err(|e| Error::io(e, format!("cannot remove {}", path.display())))?;
            }
        }
    }
    Ok(())
}

pub(crate) fn sync_dir(dir: &Path) -> Result<()> {
    fs::sync_dir(dir).map_err(|e| Error::io(e, format!("cannot make {} durable", dir.display())))
}

/// Makes several things durable side by side, where each alone would wait for a journal's commit of its own. Returns when
/// all is done, with an error if any failed.
pub(crate) fn sync_at_once(syncs: &[&(dyn Fn() -> Result<()> + Sync)]) -> Result<()> {
    let Some((here, others)) = syncs.split_last() else { return Ok(()) };
    std::thread::scope(|scope| {
        let mut threads = Vec::new();
        let mut synced = Ok(());
        for sync in others {
            let thread = std::thread::Builder::new().name("storage-sync".to_owned());
            match thread.spawn_scoped(scope, sync) {
                Ok(thread) => threads.push(thread),
                // It is slower and no less right.
                Err(_) => synced = synced.and(sync()),
            }
        }
        synced = synced.and(here());
        let end = |thread: ScopedJoinHandle<'_, Result<()>>| {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        threads.into_iter().map(end).fold(synced, Result::and)
    })
}

pub(crate) fn parent(dir: &Path) -> &Path {
    match dir.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        Some(_) => Path::new("."),
        None => dir,
    }
}

// Nothing here is left half-changed by a panic, so a poisoned lock is as good as any.

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) fn write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}
