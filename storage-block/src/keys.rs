//! Encryption at rest: data keys, and who holds the keys that wrap them.
//!
//! A snapshot or a volume is encrypted under a **data key** of its own, which is stored with it, wrapped by
//! a key that only a [`KeyProvider`] has. [`LocalKey`] is one that holds a key in memory or in a file; a key management
//! service is one by implementing two functions, and [`conformance`] says whether it does.
//!
//! ```
//! use std::sync::Arc;
//! use storage_block::keys::LocalKey;
//! use storage_block::{ErrorKind, MemoryDisk, Store, StoreOptions, Volume};
//!
//! # let dir = tempfile::tempdir()?;
//! let options = StoreOptions::new().keys(Arc::new(LocalKey::generate()?));
//! let store = Store::open_with(dir.path().join("store"), &options)?;
//!
//! // An encrypted copy of an image, a clone of it, and a snapshot of that: all under one data key.
//! let image = MemoryDisk::from_vec(vec![7; 1 << 20])?.into_disk();
//! let key = store.new_key(None)?;
//! let (snapshot, _) = store.import_encrypted(&image, &key, &mut |_| ())?;
//! let volume = Volume::create(&dir.path().join("vol"), Some(&snapshot), 1 << 20)?;
//! volume.disk().write_at(b"secret", 0)?;
//! let (next, _) = volume.snapshot(&store)?;
//! assert!(snapshot.encrypted() && volume.encrypted() && next.encrypted());
//!
//! // Without the key there is no way to it.
//! let digest = next.digest();
//! drop((snapshot, volume, next, store));
//! let store = Store::open(dir.path().join("store"))?;
//! assert_eq!(store.snapshot(&digest).unwrap_err().kind(), ErrorKind::KeyUnavailable);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # What is encrypted, and what is not
//!
//! A volume's overlay is encrypted by AES-256-XTS in units of 4 KiB, each under its number, with a key made from the
//! data key and from random bytes of the volume. A snapshot's chunks are named by HMAC-SHA-256 of
//! their bytes and encrypted by AES-256-XTS under that name, both with keys made from the data key: equal chunks under
//! one data key are stored once, equal chunks under two have nothing in common. A chunk's name is checked when it is
//! first read, so that encrypted chunks that were tampered with are found as any damage is. An overlay has nothing
//! of the kind: who can write to it can put an older block, or noise, in the place of a block.
//!
//! Who reads the files learns the size of a disk, which of its blocks are zero, discarded or never written, which
//! chunks of it are equal to each other or to another snapshot's under the same key, or differ in a few blocks, how well
//! each compresses where compression is on, and when what was written; and not what. Snapshots that are no longer wanted
//! are removed without their keys.
//!
//! The data key is wrapped for each volume and each snapshot anew, for that one alone ([`KeyContext`]): who can write to
//! the files cannot have something encrypted under the key of something else.
//!
//! A volume made of an encrypted snapshot is encrypted under the snapshot's key, unless it is given another.
//! A volume that was given another key than its snapshot has, or one where its snapshot has none, reads the
//! snapshot's bytes as they are stored, and its own snapshots store everything under its key: the first that is made
//! after the volume was opened reads all of the disk.
//!
//! The memory that keys are kept in is overwritten when they are dropped, and they stand in no message. What computing with
//! them leaves behind, on the stack and in the state of a hash, is not overwritten, nor is what was passed to `from_bytes`
//! where the caller has it. Chunks that were decrypted are kept
//! in memory for a while where they are compressed, too, and by nobody else.

use std::fmt;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::Arc;

use aes::Aes256;
use aes_kw::Kek;
use zeroize::{Zeroize as _, Zeroizing};

use crate::cipher::{self, Secret, Xts};
use crate::format::{Id, KEY_CHECK, KEY_ID_MAX, SALT, VolumeKey, WRAPPED_MAX, WrappedKey};
use crate::{Error, ErrorKind, Result};

/// The bytes of a key. They are overwritten when it is dropped, and are in no [`Debug`](fmt::Debug) output.
///
/// ```
/// use storage_block::keys::DataKey;
///
/// let key = DataKey::from_bytes([7; 32]);
/// assert_eq!((key.as_bytes(), format!("{key:?}")), (&[7; 32], "DataKey".to_owned()));
/// ```
#[derive(Clone)]
pub struct DataKey(Secret);

impl DataKey {
    /// A key that is known already, for instance what a provider has unwrapped.
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(Zeroizing::new(bytes))
    }

    /// A key that nobody has.
    ///
    /// # Errors
    ///
    /// [`Io`](ErrorKind::Io) if the system has no random bytes.
    pub fn generate() -> Result<Self> {
        let mut bytes = Zeroizing::new([0; 32]);
        random(&mut *bytes)?;
        Ok(Self(bytes))
    }

    /// The bytes, for a provider to wrap.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Debug for DataKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DataKey")
    }
}

/// What a data key is wrapped for: additional authenticated data, or what a key management service calls an encryption
/// context. A wrapped key that was put in another's place is of no use there.
///
/// ```
/// use storage_block::keys::KeyContext;
///
/// /// What AWS KMS takes as an encryption context.
/// fn encryption_context(context: &KeyContext) -> [(String, String); 2] {
///     let id = context.id().iter().map(|byte| format!("{byte:02x}")).collect();
///     [("use", context.usage().to_owned()), ("id", id)].map(|(key, value)| (key.to_owned(), value))
/// }
/// # let _ = encryption_context;
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct KeyContext {
    usage: &'static str,
    id: [u8; 32],
}

impl KeyContext {
    /// Of the volume with this salt.
    pub(crate) fn volume(salt: &[u8; SALT]) -> Self {
        Self { usage: "volume", id: *salt }
    }

    /// Of the snapshot whose root would have these bytes if it had no key.
    pub(crate) fn snapshot(root: &[u8]) -> Self {
        Self { usage: "snapshot", id: *ami_core::Digest::of(root).as_bytes() }
    }

    /// What the key is for: `volume` or `snapshot`; `trial` when a new key is made, to see that it can be wrapped.
    pub fn usage(&self) -> &'static str {
        self.usage
    }

    /// Which of them: random bytes of the volume, or a digest of all that the snapshot holds.
    pub fn id(&self) -> &[u8; 32] {
        &self.id
    }

    /// All of it, in bytes that no other context has.
    pub fn to_bytes(&self) -> Vec<u8> {
        [self.usage.as_bytes(), &[0], &self.id].concat()
    }
}

/// Who holds the keys that data keys are wrapped by: a region's, or a customer's.
///
/// Each such key has an id, which is stored beside what it has wrapped. A provider is called when something encrypted is
/// made or opened and never while it is read or written; from any thread, several at once.
/// [`conformance`] checks an implementation.
///
/// ```
/// use storage_block::keys::{DataKey, KeyContext, KeyProvider, LocalKey, conformance};
/// use storage_block::{Error, ErrorKind, Result};
///
/// /// Several keys, the newest for what is new.
/// struct Ring(Vec<LocalKey>);
///
/// impl KeyProvider for Ring {
///     fn default_key_id(&self) -> &str {
///         self.0.last().map_or("", LocalKey::default_key_id)
///     }
///     fn wrap(&self, key_id: &str, key: &DataKey, context: &KeyContext) -> Result<Vec<u8>> {
///         self.find(key_id)?.wrap(key_id, key, context)
///     }
///     fn unwrap(&self, key_id: &str, wrapped: &[u8], context: Option<&KeyContext>) -> Result<DataKey> {
///         self.find(key_id)?.unwrap(key_id, wrapped, context)
///     }
/// }
///
/// impl Ring {
///     fn find(&self, id: &str) -> Result<&LocalKey> {
///         let found = self.0.iter().find(|key| key.default_key_id() == id);
///         found.ok_or_else(|| Error::new(ErrorKind::KeyUnavailable, format!("there is no key {id}")))
///     }
/// }
///
/// conformance(&Ring(vec![LocalKey::generate()?, LocalKey::generate()?]));
/// # Ok::<(), storage_block::Error>(())
/// ```
pub trait KeyProvider: Send + Sync {
    /// The id of the key for data keys that none is named for: at most 256 bytes, no control characters.
    fn default_key_id(&self) -> &str;

    /// Wraps a data key, so that only who has the key `key_id` can use it, for `context` alone, and cannot be given
    /// another unnoticed. The result has at most 2048 bytes. Equal snapshots under one data key have one digest only if it
    /// is the same every time.
    ///
    /// # Errors
    ///
    /// [`KeyUnavailable`](ErrorKind::KeyUnavailable) for a key that there is not, or that may not be used.
    fn wrap(&self, key_id: &str, key: &DataKey, context: &KeyContext) -> Result<Vec<u8>>;

    /// The data key that was wrapped. `key_id` and `wrapped` come from a file and may be anything. There is no context
    /// where the file is of a version that knew of none; who has never wrapped a key without one need not unwrap any.
    ///
    /// # Errors
    ///
    /// [`KeyUnavailable`](ErrorKind::KeyUnavailable) for a key that there is not, or that may not be used, or that has
    /// not wrapped this, or not for this context.
    fn unwrap(&self, key_id: &str, wrapped: &[u8], context: Option<&KeyContext>) -> Result<DataKey>;
}

/// A provider of one key, which it holds in memory: AES key wrap of RFC 3394, under a key that is derived from it for
/// each context.
///
/// Its id is made from the key, so that another key is told from it. Where the key comes from a file, only
/// the file's owner may read that.
///
/// ```
/// use storage_block::keys::{KeyProvider, LocalKey, conformance};
///
/// # let dir = tempfile::tempdir()?;
/// let made = LocalKey::create(&dir.path().join("region.key"))?;
/// let opened = LocalKey::open(&dir.path().join("region.key"))?;
/// assert_eq!(opened.default_key_id(), made.default_key_id());
/// assert_ne!(opened.default_key_id(), LocalKey::generate()?.default_key_id());
/// conformance(&opened);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct LocalKey {
    id: String,
    key: Secret,
}

impl LocalKey {
    /// The provider of a key that is known already.
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self::from_secret(Zeroizing::new(bytes))
    }

    fn from_secret(key: Secret) -> Self {
        let digest = cipher::derive(&key, &[b"storage-block key id"]);
        Self { id: format!("local-{}", hex::encode(&digest[..8])), key }
    }

    /// The provider of a new key, which is lost with it unless it came from [`create`](Self::create).
    ///
    /// # Errors
    ///
    /// [`Io`](ErrorKind::Io) if the system has no random bytes.
    pub fn generate() -> Result<Self> {
        Ok(Self::from_secret(DataKey::generate()?.0))
    }

    /// A new key in a new file, which is durable and readable for its owner alone. Who loses it loses
    /// everything that was encrypted with it.
    ///
    /// # Errors
    ///
    /// [`AlreadyExists`](ErrorKind::AlreadyExists), or what the file system says; nothing is left then.
    pub fn create(path: &Path) -> Result<Self> {
        let made = Self::generate()?;
        let failed = |e| Error::io(e, format!("cannot create {}", path.display()));
        let mut file = File::options().write(true).create_new(true).mode(0o600).open(path).map_err(failed)?;
        let written = file.write_all(&*made.key).and_then(|()| file.sync_all());
        let written =
            written.map_err(failed).and_then(|()| crate::store::sync_dir(crate::store::parent(path)));
        written.inspect_err(|_| drop(std::fs::remove_file(path)))?;
        Ok(made)
    }

    /// The key in a file of 32 bytes.
    ///
    /// # Errors
    ///
    /// [`KeyUnavailable`](ErrorKind::KeyUnavailable) if it has another length or others than its owner may read it;
    /// [`NotFound`](ErrorKind::NotFound), or what the file system says.
    pub fn open(path: &Path) -> Result<Self> {
        let failed = |e| Error::io(e, format!("cannot read {}", path.display()));
        let unfit = |why| Error::new(ErrorKind::KeyUnavailable, format!("{} {why}", path.display()));
        let mut file = File::open(path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        if metadata.len() != 32 {
            return Err(unfit("is not a key of 32 bytes"));
        }
        if metadata.mode() & 0o077 != 0 {
            return Err(unfit("can be read by others than its owner"));
        }
        let mut bytes = Zeroizing::new([0; 32]);
        file.read_exact(&mut *bytes).map_err(failed)?;
        Ok(Self::from_secret(bytes))
    }

    /// What wraps for a context: a key of its own.
    fn kek(&self, key_id: &str, context: Option<&KeyContext>) -> Result<Kek<Aes256>> {
        if key_id != self.id {
            let what = format!("the key {key_id} is not at hand, {} is", self.id);
            return Err(Error::new(ErrorKind::KeyUnavailable, what));
        }
        let key = match context {
            Some(context) => cipher::derive(&self.key, &[b"storage-block wrap\0", &context.to_bytes()]),
            None => self.key.clone(),
        };
        Ok(Kek::new((&*key).into()))
    }
}

impl fmt::Debug for LocalKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LocalKey").field("id", &self.id).finish_non_exhaustive()
    }
}

impl KeyProvider for LocalKey {
    fn default_key_id(&self) -> &str {
        &self.id
    }

    fn wrap(&self, key_id: &str, key: &DataKey, context: &KeyContext) -> Result<Vec<u8>> {
        let mut wrapped = vec![0; 40];
        let done = self.kek(key_id, Some(context))?.wrap(key.as_bytes(), &mut wrapped);
        done.map_err(|_| Error::new(ErrorKind::KeyUnavailable, format!("{key_id} cannot wrap a key")))?;
        Ok(wrapped)
    }

    fn unwrap(&self, key_id: &str, wrapped: &[u8], context: Option<&KeyContext>) -> Result<DataKey> {
        let mut bytes = Zeroizing::new([0; 32]);
        let done = self.kek(key_id, context)?.unwrap(wrapped, &mut *bytes);
        let failed = |_| Error::new(ErrorKind::KeyUnavailable, format!("{key_id} has not wrapped this key"));
        done.map_err(failed)?;
        Ok(DataKey(bytes))
    }
}

/// A data key in use, with its wrapped form: what a snapshot or a volume is encrypted with.
///
/// It comes from [`Store::new_key`](crate::Store::new_key) or from something that is encrypted already. What shares
/// a key shares chunks. Cheap to clone; the key is overwritten in memory when the last of all that use it is gone.
///
/// ```
/// use std::sync::Arc;
/// use storage_block::keys::LocalKey;
/// use storage_block::{MemoryDisk, Store, StoreOptions};
///
/// # let dir = tempfile::tempdir()?;
/// # let options = StoreOptions::new().keys(Arc::new(LocalKey::generate()?));
/// let store = Store::open_with(dir.path(), &options)?;
/// let key = store.new_key(None)?;
/// let image = MemoryDisk::from_vec(vec![7; 1 << 20])?.into_disk();
/// let (snapshot, _) = store.import_encrypted(&image, &key, &mut |_| ())?;
/// let again = store.import_encrypted(&image, &key, &mut |_| ())?;
/// assert_eq!((again.0.digest(), again.1.stored_bytes), (snapshot.digest(), 0));
/// assert_eq!(snapshot.key_id(), Some(key.key_id()));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct EncryptionKey(Arc<Inner>);

struct Inner {
    key_id: String,
    provider: Arc<dyn KeyProvider>,
    data: DataKey,
    names: Secret,
    chunks: Xts,
}

impl EncryptionKey {
    /// A new data key, to be wrapped by the key `key_id` of the provider or by its default one.
    pub(crate) fn new(provider: &Arc<dyn KeyProvider>, key_id: Option<&str>) -> Result<Self> {
        let key_id = key_id.unwrap_or_else(|| provider.default_key_id()).to_owned();
        let key = Self::with_data(provider, key_id, DataKey::generate()?);
        // Who makes a key shall know at once that it can be used.
        let mut id = [0; 32];
        random(&mut id)?;
        key.wrap(&KeyContext { usage: "trial", id })?;
        Ok(key)
    }

    /// The key that was stored with something, of which this is the context.
    pub(crate) fn from_wrapped(
        provider: Option<&Arc<dyn KeyProvider>>,
        wrapped: &WrappedKey,
        context: &KeyContext,
    ) -> Result<Self> {
        let key_id = &wrapped.key_id;
        let Some(provider) = provider else {
            let what = format!("it is encrypted with the key {key_id}, and the store has no keys");
            return Err(Error::new(ErrorKind::KeyUnavailable, what));
        };
        let data = provider.unwrap(key_id, &wrapped.wrapped, wrapped.bound.then_some(context))?;
        if check_of(&data) != wrapped.check {
            let what = format!("what {key_id} has unwrapped is another key");
            return Err(Error::new(ErrorKind::KeyUnavailable, what));
        }
        Ok(Self::with_data(provider, key_id.clone(), data))
    }

    fn with_data(provider: &Arc<dyn KeyProvider>, key_id: String, data: DataKey) -> Self {
        let names = cipher::derive(&data.0, &[b"storage-block names"]);
        let chunks = Xts::derive(&data.0, "storage-block chunks", &[]);
        Self(Arc::new(Inner { key_id, provider: Arc::clone(provider), data, names, chunks }))
    }

    /// The id of the key that wraps this one.
    pub fn key_id(&self) -> &str {
        &self.0.key_id
    }

    /// What is stored with something that is encrypted under this key.
    pub(crate) fn wrap(&self, context: &KeyContext) -> Result<WrappedKey> {
        let Inner { key_id, provider, data, .. } = &*self.0;
        let wrapped = provider.wrap(key_id, data, context)?;
        let fits = key_id.len() <= KEY_ID_MAX && wrapped.len() <= WRAPPED_MAX;
        if !fits || key_id.chars().any(char::is_control) {
            let what = format!("a key id of {} bytes and a wrapped key of {}", key_id.len(), wrapped.len());
            return Err(Error::new(ErrorKind::KeyUnavailable, format!("{what} cannot be stored")));
        }
        Ok(WrappedKey { key_id: key_id.clone(), wrapped, check: check_of(data), bound: true })
    }

    /// Whether chunks under the one are chunks under the other.
    pub(crate) fn are_same(one: Option<&Self>, other: Option<&Self>) -> bool {
        one.map(|key| key.0.data.as_bytes()) == other.map(|key| key.0.data.as_bytes())
    }

    /// The name of a chunk under this key.
    pub(crate) fn name(&self, bytes: &[u8]) -> Id {
        cipher::keyed_digest(&self.0.names, bytes)
    }

    /// What encrypts chunks.
    pub(crate) fn chunks(&self) -> &Xts {
        &self.0.chunks
    }

    /// What encrypts the overlay of the volume with this salt.
    pub(crate) fn overlay(&self, salt: &[u8; SALT]) -> Xts {
        Xts::derive(&self.0.data.0, "storage-block overlay", salt)
    }
}

impl VolumeKey {
    /// What a new volume that is encrypted under `key` stores.
    pub(crate) fn new(key: &EncryptionKey) -> Result<Self> {
        let mut salt = [0; SALT];
        random(&mut salt)?;
        Ok(Self { wrapped: key.wrap(&KeyContext::volume(&salt))?, salt })
    }
}

fn check_of(data: &DataKey) -> [u8; KEY_CHECK] {
    let digest = cipher::derive(&data.0, &[b"storage-block check"]);
    let mut check = [0; KEY_CHECK];
    check.copy_from_slice(&digest[..KEY_CHECK]);
    check
}

impl fmt::Debug for EncryptionKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EncryptionKey").field("key_id", &self.key_id()).finish_non_exhaustive()
    }
}

/// Fills `bytes` with random ones.
pub(crate) fn random(bytes: &mut [u8]) -> Result<()> {
    getrandom::fill(bytes).map_err(|e| {
        bytes.zeroize();
        Error::io(std::io::Error::other(e), "cannot get random bytes")
    })
}

/// Checks that a provider does what [`KeyProvider`] says.
///
/// # Panics
///
/// Where it does not, with what it has done.
pub fn conformance(provider: &dyn KeyProvider) {
    let id = provider.default_key_id();
    assert!(id.len() <= KEY_ID_MAX && !id.chars().any(char::is_control), "{id:?} cannot be stored");
    let kind = |result: Result<()>| result.map_err(|error| error.kind());
    let [one, other] = [[0x5a; 32], [0xa5; 32]].map(DataKey::from_bytes);
    let context = KeyContext { usage: "volume", id: [7; 32] };
    let others = [KeyContext { usage: "snapshot", ..context }, KeyContext { id: [8; 32], ..context }];
    for key in [&one, &other] {
        let wrapped = provider.wrap(id, key, &context).expect("wraps a data key");
        assert!(wrapped.len() <= WRAPPED_MAX, "a wrapped key of {} bytes cannot be stored", wrapped.len());
        assert!(!wrapped.windows(8).any(|part| part == &key.as_bytes()[..8]), "the key is in plain sight");
        let found = provider.unwrap(id, &wrapped, Some(&context)).expect("unwraps what it has wrapped");
        assert!(found.as_bytes() == key.as_bytes(), "what it unwraps is not what it has wrapped");
        for other in [Some(&others[0]), Some(&others[1]), None] {
            let found = kind(provider.unwrap(id, &wrapped, other).map(drop));
            assert_eq!(found, Err(ErrorKind::KeyUnavailable), "it was wrapped for another context");
        }

        for at in 0..wrapped.len() {
            let mut damaged = wrapped.clone();
            damaged[at] ^= 1;
            let found = kind(provider.unwrap(id, &damaged, Some(&context)).map(drop));
            assert_eq!(found, Err(ErrorKind::KeyUnavailable), "a damaged wrapped key, at {at}");
        }
        for damaged in [&wrapped[..wrapped.len() - 1], &[]] {
            let found = kind(provider.unwrap(id, damaged, Some(&context)).map(drop));
            assert_eq!(found, Err(ErrorKind::KeyUnavailable), "a wrapped key cut to {} bytes", damaged.len());
        }
        let absent = format!("{id}-absent");
        assert_eq!(
            kind(provider.unwrap(&absent, &wrapped, Some(&context)).map(drop)),
            Err(ErrorKind::KeyUnavailable)
        );
        assert_eq!(kind(provider.wrap(&absent, key, &context).map(drop)), Err(ErrorKind::KeyUnavailable));
    }
}
