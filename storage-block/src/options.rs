//! What is chosen when a store is opened or a volume is made.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use crate::format::PACK_UNITS;
use crate::keys::{EncryptionKey, KeyProvider};
use crate::{Compression, Result, Snapshot, Volume};

/// Bytes of decompressed chunks that are kept unless another number is said.
const CACHE: usize = 16 << 20;

/// How a [`Store`](crate::Store) is opened. None of it is stored: the next who opens the store chooses anew.
///
/// ```
/// use std::sync::Arc;
/// use storage_block::keys::LocalKey;
/// use storage_block::{Compression, Store, StoreOptions, Verify};
///
/// # let dir = tempfile::tempdir()?;
/// let options = StoreOptions::new()
///     .compression(Compression::WherePays { percent: 20 })
///     .cache_bytes(64 << 20)
///     .keys(Arc::new(LocalKey::create(&dir.path().join("region.key"))?))
///     .verify(Verify::Digest);
/// let store = Store::open_with(dir.path().join("store"), &options)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct StoreOptions {
    pub(crate) compression: Compression,
    pub(crate) keys: Keys,
    pub(crate) verify: Verify,
    pub(crate) cache: usize,
    pub(crate) create: bool,
    pub(crate) pack_units: u32,
}

impl StoreOptions {
    /// No compression, no keys, chunks verified by their checksums when they are first read; a store is made where there is
    /// none.
    pub fn new() -> Self {
        Self {
            compression: Compression::None,
            keys: Keys(None),
            verify: Verify::default(),
            cache: CACHE,
            create: true,
            pack_units: PACK_UNITS,
        }
    }

    /// Whether a store is made where there is none; otherwise that is an error, which tells of a mistyped directory.
    ///
    /// ```
    /// use storage_block::{ErrorKind, Store, StoreOptions};
    ///
    /// # let dir = tempfile::tempdir()?;
    /// let typo = dir.path().join("stroe");
    /// let there = StoreOptions::new().create(false);
    /// assert_eq!(Store::open_with(&typo, &there).err().map(|e| e.kind()), Some(ErrorKind::NotFound));
    /// assert!(!typo.exists());
    /// drop(Store::open(&typo)?);
    /// Store::open_with(&typo, &there)?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn create(mut self, create: bool) -> Self {
        self.create = create;
        self
    }

    /// Whether what is stored from now on is compressed.
    pub fn compression(mut self, compression: Compression) -> Self {
        self.compression = compression;
        self
    }

    /// Who wraps and unwraps the keys of what is encrypted.
    pub fn keys(mut self, provider: Arc<dyn KeyProvider>) -> Self {
        self.keys = Keys(Some(provider));
        self
    }

    /// What a chunk is compared with when it is first read after the store was opened. It costs reading all 64 KiB of it,
    /// once; any later read of it costs nothing more.
    pub fn verify(mut self, verify: Verify) -> Self {
        self.verify = verify;
        self
    }

    /// How many bytes of decompressed chunks are kept in memory: 16 MiB unless this says otherwise. It is taken up only
    /// as compressed chunks are read.
    pub fn cache_bytes(mut self, bytes: usize) -> Self {
        self.cache = bytes;
        self
    }
}

/// What a chunk is compared with when it is first read after its store was opened.
///
/// [`Snapshot::verify`] and [`Store::scrub`](crate::Store::scrub) compare with digests whatever this says.
///
/// ```
/// use storage_block::{Store, StoreOptions, Verify};
///
/// # let dir = tempfile::tempdir()?;
/// // Somebody else has had the disk.
/// let store = Store::open_with(dir.path(), &StoreOptions::new().verify(Verify::Digest))?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Verify {
    /// Nothing.
    Never,
    /// The CRC-32C of its bytes, which was stored beside its name when both were computed from them: that finds what
    /// a disk has lost or changed, for a tenth of what a digest takes. A chunk that is encrypted, compressed or stored as
    /// what differs from another is compared with its name.
    #[default]
    Checksum,
    /// Its name, which also finds what somebody has changed on purpose.
    Digest,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self::new()
    }
}

/// Who has the keys, if anybody.
#[derive(Clone)]
pub(crate) struct Keys(Option<Arc<dyn KeyProvider>>);

impl Keys {
    pub(crate) fn provider(&self) -> Option<&Arc<dyn KeyProvider>> {
        self.0.as_ref()
    }
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Keys").field(&self.0.as_ref().map(|provider| provider.default_key_id())).finish()
    }
}

/// How a [`Volume`] is made: as [`Volume::create`] does it, or encrypted, or when it is first written.
///
/// ```
/// use std::sync::Arc;
/// use storage_block::keys::LocalKey;
/// use storage_block::{Store, StoreOptions, VolumeOptions};
///
/// # let dir = tempfile::tempdir()?;
/// # let options = StoreOptions::new().keys(Arc::new(LocalKey::generate()?));
/// let store = Store::open_with(dir.path().join("store"), &options)?;
/// let key = store.new_key(None)?;
/// let volume = VolumeOptions::new().encrypt(&key).create(&dir.path().join("vol"), None, 1 << 30)?;
/// assert!(volume.encrypted());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Default)]
pub struct VolumeOptions {
    key: Option<EncryptionKey>,
}

impl VolumeOptions {
    /// Encrypted as the snapshot is.
    pub fn new() -> Self {
        Self::default()
    }

    /// Encrypted under this key, whatever the snapshot is; [`keys`](crate::keys) says what that means for its snapshots.
    pub fn encrypt(mut self, key: &EncryptionKey) -> Self {
        self.key = Some(key.clone());
        self
    }

    /// Makes a volume, as [`Volume::create`].
    ///
    /// # Errors
    ///
    /// As [`Volume::create`].
    pub fn create(&self, dir: &Path, base: Option<&Snapshot>, size: u64) -> Result<Volume> {
        let volume = self.create_unsynced(dir, base, size)?;
        match volume.sync_untouched() {
            Ok(()) => Ok(volume),
            Err(error) => {
                // What cannot be removed either is found by whoever looks for it.
                let _ = volume.delete();
                Err(error)
            }
        }
    }

    /// Makes a volume, as [`Volume::create_unsynced`].
    ///
    /// # Errors
    ///
    /// As [`Volume::create`].
    pub fn create_unsynced(&self, dir: &Path, base: Option<&Snapshot>, size: u64) -> Result<Volume> {
        let key = self.key.as_ref().or_else(|| base?.root.key());
        Volume::create_with(dir, base, size, key)
    }

    /// Makes a volume of which nothing is on the disk before it is needed there: its files are made by the first write or
    /// discard that changes anything, and by whatever makes it durable, which are flushes,
    /// [`Volume::sync_created`] and [`Volume::grow`]. A volume that is encrypted is made at once, as
    /// [`create_unsynced`](Self::create_unsynced) does it.
    ///
    /// For those who have a record of `dir`, `base` and `size`, and who make the volume again when it is not there: until its
    /// files are made nothing is left of it but that record, neither by a crash nor by the last handle that goes. `made` is
    /// called when they have been, in the thread for which they were; it does not wait. From then on the record is not all
    /// there is to know, and who has it may want the volume to be durable soon: what is half there after a crash was not
    /// flushed. Nobody else uses `dir`, which no lock keeps meanwhile.
    ///
    /// ```
    /// use std::sync::mpsc::channel;
    /// use storage_block::VolumeOptions;
    ///
    /// let dir = tempfile::tempdir()?;
    /// let (tell, told) = channel();
    /// let made = move || tell.send(()).unwrap_or_default();
    /// let volume = VolumeOptions::new().create_on_write(&dir.path().join("vol"), None, 1 << 30, made)?;
    /// assert!(!volume.has_files() && !volume.dir().exists());
    /// volume.disk().read_at(&mut [0; 512], 0)?;
    /// assert!(told.try_recv().is_err());
    /// volume.disk().write_at(&[1; 512], 0)?;
    /// assert!(volume.has_files() && told.try_recv().is_ok());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidSize`](crate::ErrorKind::InvalidSize) as [`Volume::create`], for which a file without a name is made as long
    /// as a volume of a TiB or more. What else that says,
    /// [`AlreadyExists`](crate::ErrorKind::AlreadyExists) or [`NoSpace`](crate::ErrorKind::NoSpace) say, comes of what needs the
    /// files: nobody looks at `dir` before, where by then not even an empty directory may stand. That has done nothing then, and may
    /// be tried again.
    pub fn create_on_write(
        &self,
        dir: &Path,
        base: Option<&Snapshot>,
        size: u64,
        made: impl FnOnce() + Send + 'static,
    ) -> Result<Volume> {
        if self.key.is_some() || base.is_some_and(Snapshot::encrypted) {
            return self.create_unsynced(dir, base, size);
        }
        Volume::create_without_files(dir, base, size, made)
    }
}
