//! A key in memory or in a file.

use std::fmt;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

use aes::Aes256;
use aes_kw::Kek;
use zeroize::Zeroizing;

use super::{DataKey, KeyContext, KeyProvider};
use crate::cipher::{self, Secret};
use crate::{Error, ErrorKind, Result};

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
