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
//! The memory that keys are kept in is overwritten when they are dropped, the states of ciphers and hashes with them, and they
//! stand in no message. What computing with them leaves on the stack is not overwritten, nor is what was passed to `from_bytes`
//! where the caller has it. Chunks that were decrypted are kept
//! in memory for a while where they are compressed, too, and by nobody else.

mod encryption;
mod local;

use std::fmt;

use zeroize::{Zeroize as _, Zeroizing};

pub use self::encryption::EncryptionKey;
pub use self::local::LocalKey;
use crate::cipher::Secret;
use crate::format::{KEY_ID_MAX, SALT, WRAPPED_MAX};
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
