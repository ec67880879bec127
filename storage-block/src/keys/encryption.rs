//! Data keys in use.

use std::fmt;
use std::sync::Arc;

use super::{DataKey, KeyContext, KeyProvider, random};
use crate::cipher::{self, Secret, Xts};
use crate::format::{Id, KEY_CHECK, KEY_ID_MAX, SALT, VolumeKey, WRAPPED_MAX, WrappedKey};
use crate::{Error, ErrorKind, Result};

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
    check: [u8; KEY_CHECK],
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
        let check = check_of(&data);
        Self(Arc::new(Inner { key_id, provider: Arc::clone(provider), data, names, chunks, check }))
    }

    /// The id of the key that wraps this one.
    pub fn key_id(&self) -> &str {
        &self.0.key_id
    }

    /// What is stored with something that is encrypted under this key.
    pub(crate) fn wrap(&self, context: &KeyContext) -> Result<WrappedKey> {
        let Inner { key_id, provider, data, check, .. } = &*self.0;
        let wrapped = provider.wrap(key_id, data, context)?;
        let fits = key_id.len() <= KEY_ID_MAX && wrapped.len() <= WRAPPED_MAX;
        if !fits || key_id.chars().any(char::is_control) {
            let what = format!("a key id of {} bytes and a wrapped key of {}", key_id.len(), wrapped.len());
            return Err(Error::new(ErrorKind::KeyUnavailable, format!("{what} cannot be stored")));
        }
        Ok(WrappedKey { key_id: key_id.clone(), wrapped, check: *check, bound: true })
    }

    /// Whether chunks under the one are chunks under the other.
    pub(crate) fn are_same(one: Option<&Self>, other: Option<&Self>) -> bool {
        one.map(|key| key.0.data.as_bytes()) == other.map(|key| key.0.data.as_bytes())
    }

    /// What tells it from every other key, and nothing of it.
    pub(crate) fn check(&self) -> [u8; KEY_CHECK] {
        self.0.check
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
