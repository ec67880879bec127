//! What is done to an object before it is stored, and undone when it is read: compression where it pays, then
//! encryption.

use ami_core::Digest;

use crate::format::{Encoding, Id, Kind, Slot, UNIT};
use crate::keys::EncryptionKey;

/// Whether chunks are compressed.
///
/// Chunks are stored as they are unless one asks for something else, because what is read most is read from the local
/// disk: a 4 KiB read of a chunk that is stored as it is costs the read alone, and one of a compressed chunk costs the
/// decompression of all its 64 KiB, unless it is among the few that are kept in memory. Compression is for a store
/// that is short of space and not of processor time.
///
/// A store has chunks of both kinds side by side: the choice is about what is stored from now on.
///
/// ```
/// use storage_block::{Compression, MemoryDisk, Store, StoreOptions};
///
/// # let dir = tempfile::tempdir()?;
/// let options = StoreOptions::new().compression(Compression::WherePays { percent: 20 });
/// let store = Store::open_with(dir.path(), &options)?;
/// let image = MemoryDisk::from_vec(vec![7; 64 << 10])?.into_disk();
/// let (snapshot, stats) = store.import(&image, &mut |_| ())?;
/// // A chunk and a leaf of the manifest, which take 64 and 32 KiB otherwise.
/// assert_eq!(stats.stored_bytes, 2 * 4096);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Compression {
    /// Chunks are stored as they are.
    #[default]
    None,
    /// A chunk that LZ4 makes at least so many percent smaller, in whole units of 4 KiB, is stored compressed.
    WherePays {
        /// The least share of a chunk that has to be saved.
        percent: u8,
    },
}

/// An object as it is stored, without the zeroes that fill up its last unit; encrypted ones have none.
pub(crate) struct Stored {
    pub(crate) bytes: Vec<u8>,
    /// Bytes that mean something, or of an encrypted object those that did before it was encrypted.
    pub(crate) len: u32,
    pub(crate) encoding: Encoding,
}

/// Makes an object what is stored. A chunk is encrypted if there is a key, a leaf never.
pub(crate) fn encode(
    kind: Kind,
    id: &Id,
    bytes: &[u8],
    compression: Compression,
    key: Option<&EncryptionKey>,
) -> Stored {
    let (mut bytes, mut encoding) = match compress(bytes, compression) {
        Some(packed) => (packed, Encoding::LZ4),
        None => (bytes.to_vec(), Encoding::RAW),
    };
    let len = bytes.len() as u32;
    bytes.resize(bytes.len().next_multiple_of(UNIT as usize), 0);
    if let (Kind::Chunk, Some(key)) = (kind, key) {
        key.chunks().encrypt(&mut bytes, tweak(id));
        encoding = encoding.with(Encoding::ENCRYPTED);
    }
    Stored { bytes, len, encoding }
}

/// The compressed bytes, if that is worth it.
fn compress(bytes: &[u8], compression: Compression) -> Option<Vec<u8>> {
    let Compression::WherePays { percent } = compression else { return None };
    let packed = lz4_flex::block::compress(bytes);
    let units = |len: usize| len.div_ceil(UNIT as usize);
    let (before, after) = (units(bytes.len()), units(packed.len()));
    (after < before && (before - after) * 100 >= usize::from(percent) * before).then_some(packed)
}

/// The number of the first unit of a chunk: what is encrypted under it is that chunk alone.
pub(crate) fn tweak(id: &Id) -> u128 {
    let mut first = [0; 16];
    first.copy_from_slice(&id[..16]);
    u128::from_le_bytes(first)
}

/// What is wrong with an encrypted chunk of a snapshot that is not encrypted.
pub(crate) const NO_KEY: &str = "is encrypted, and the snapshot is not";

/// Makes what is stored, all units of it, an object again. `stored` may hold anything, and the object
/// has still to be checked; that it has its length is.
pub(crate) fn decode(
    slot: &Slot,
    id: &Id,
    mut stored: Vec<u8>,
    key: Option<&EncryptionKey>,
) -> Result<Vec<u8>, &'static str> {
    if slot.encoding.encrypted() {
        let Some(key) = key else { return Err(NO_KEY) };
        key.chunks().decrypt(&mut stored, tweak(id));
    }
    stored.truncate(slot.len as usize);
    if slot.encoding.compressed() {
        // No more is ever taken than an object may have.
        let mut bytes = vec![0; slot.kind.len()];
        return match lz4_flex::block::decompress_into(&stored, &mut bytes) {
            Ok(found) if found == bytes.len() => Ok(bytes),
            _ => Err("cannot be decompressed"),
        };
    }
    if stored.len() == slot.kind.len() { Ok(stored) } else { Err("has the wrong length") }
}

/// The name of an object: of a chunk under a key a keyed digest, of any other the digest.
pub(crate) fn name(kind: Kind, bytes: &[u8], key: Option<&EncryptionKey>) -> Id {
    match (kind, key) {
        (Kind::Chunk, Some(key)) => key.name(bytes),
        _ => *Digest::of(bytes).as_bytes(),
    }
}
