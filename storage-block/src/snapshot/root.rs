//! The root of a manifest.

use std::sync::OnceLock;

use ami_core::Digest;

use super::table::Table;
use crate::Result;
use crate::format::{self, Id, RootParts, WrappedKey};
use crate::keys::{EncryptionKey, KeyContext};

/// The manifest's root, and those of its leaves that somebody has read through.
#[derive(Debug)]
pub(crate) struct Root {
    pub(crate) digest: Digest,
    pub(crate) size: u64,
    pub(crate) leaves: Vec<Id>,
    /// The key of an encrypted snapshot, as it is stored, and when somebody has come with the key to it.
    wrapped: Option<WrappedKey>,
    key: OnceLock<EncryptionKey>,
    pub(super) tables: Box<[OnceLock<Table>]>,
}

impl Root {
    /// The root whose bytes these are, if they are what `digest` names.
    pub(crate) fn parse(digest: Digest, bytes: &[u8]) -> Result<Self, format::Wrong> {
        if Digest::of(bytes) != digest {
            return Err(format!("its content does not have the digest {digest}"));
        }
        let RootParts { size, leaves, key: wrapped } = format::parse_root(bytes)?;
        let tables = leaves.iter().map(|_| OnceLock::new()).collect();
        Ok(Self { digest, size, leaves, wrapped, key: OnceLock::new(), tables })
    }

    /// Gets the key of an encrypted snapshot from `unwrap`, unless it is there already.
    pub(crate) fn unlock(
        &self,
        unwrap: impl FnOnce(&WrappedKey, &KeyContext) -> Result<EncryptionKey>,
    ) -> Result<()> {
        if let (Some(wrapped), None) = (&self.wrapped, self.key.get()) {
            let context = KeyContext::snapshot(&format::encode_root(self.size, &self.leaves, None));
            let key = unwrap(wrapped, &context)?;
            // Whoever loses this race has come with the same key.
            let _ = self.key.set(key);
        }
        Ok(())
    }

    /// The key of an encrypted snapshot that has been unlocked.
    pub(crate) fn key(&self) -> Option<&EncryptionKey> {
        self.key.get()
    }

    /// The key of an encrypted snapshot, as it is stored.
    pub(crate) fn wrapped(&self) -> Option<&WrappedKey> {
        self.wrapped.as_ref()
    }
}
