//! What is done to an object before it is stored, and undone when it is read: compression where it pays, then
//! encryption.

use ami_core::Digest;

use crate::format::{BLOCK, Encoding, HOLE, Id, Kind, Patch, Slot, UNIT, units};
use crate::import::is_zero;
use crate::keys::EncryptionKey;

/// Whether chunks are compressed.
///
/// Chunks are stored as they are unless one asks for something else, because what is read most is read from the local
/// disk: a 4 KiB read of a chunk that is stored as it is costs the read alone, and one of a compressed chunk costs the
/// decompression of all its 64 KiB, unless it is among the few that are kept in memory. Measured on an image of 512 MiB,
/// most of it programs and libraries, with everything in the page cache: it took 276 MiB, random reads of 4 KiB fell to
/// a twentieth and reading it from end to end to a fifth. Compression is for a store that is short of space and not of
/// processor time.
///
/// It is LZ4, which is pure Rust and quick to read; zstd would save a fifth more, and needs a C compiler.
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

/// Blocks that a chunk that is stored as what differs may have, so that reading it is not in too many pieces.
const PATCH_MAX: u32 = 8;

/// What a chunk may be stored as the difference from.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Patches {
    /// Nothing: others may differ from it.
    None,
    /// Zeroes, or this.
    Of(Option<Patch>),
}

/// An object as it is stored: all units of it, whole.
pub(crate) struct Stored {
    /// Nothing where they are the object's own, as most are.
    pub(crate) bytes: Option<Vec<u8>>,
    /// Bytes before the zeroes that fill up the last unit; those, too, are encrypted.
    pub(crate) len: u32,
    pub(crate) encoding: Encoding,
    pub(crate) patch: Option<Patch>,
}

/// Makes an object what is stored: whatever takes the fewest units. A chunk is encrypted if there is a key, a leaf never.
pub(crate) fn encode(
    kind: Kind,
    id: &Id,
    bytes: &[u8],
    compression: Compression,
    key: Option<&EncryptionKey>,
    patches: Patches,
) -> Stored {
    let patches = match patches {
        Patches::None => [None, None],
        Patches::Of(patch) => [Some(Patch { mask: mask_of(bytes), base: HOLE }), patch],
    };
    let blocks = |patch: &Patch| patch.mask.count_ones();
    let small = |patch: &Patch| (1..=PATCH_MAX).contains(&blocks(patch)) && kind == Kind::Chunk;
    let mut patch = patches.into_iter().flatten().filter(small).min_by_key(blocks);
    let packed = compress(bytes, compression);
    let (mut stored, mut encoding) = match (packed, &patch) {
        (Some(packed), patch) if patch.is_none_or(|patch| units(packed.len()) < blocks(&patch)) => {
            (packed, Encoding::LZ4)
        }
        (_, Some(patch)) => {
            let blocks: Vec<&[u8]> = blocks_of(bytes, patch.mask).map(|(_, block)| block).collect();
            (blocks.concat(), Encoding::PATCH)
        }
        (_, None) if key.is_none() || kind != Kind::Chunk => {
            return Stored { bytes: None, len: bytes.len() as u32, encoding: Encoding::RAW, patch: None };
        }
        (_, None) => (bytes.to_vec(), Encoding::RAW),
    };
    if !encoding.patch() {
        patch = None;
    }
    let len = stored.len() as u32;
    stored.resize(stored.len().next_multiple_of(UNIT as usize), 0);
    if let (Kind::Chunk, Some(key)) = (kind, key) {
        let numbers = (0..16).filter(|block| patch.is_none_or(|patch| patch.mask >> block & 1 != 0));
        for (unit, block) in stored.chunks_mut(UNIT as usize).zip(numbers) {
            key.chunks().encrypt(unit, tweak(id).wrapping_add(block));
        }
        encoding = encoding.with(Encoding::ENCRYPTED);
    }
    Stored { bytes: Some(stored), len, encoding, patch }
}

/// The blocks that are not zero.
fn mask_of(bytes: &[u8]) -> u16 {
    blocks_of(bytes, u16::MAX).filter(|(_, block)| !is_zero(block)).fold(0, |mask, (at, _)| mask | 1 << at)
}

/// The blocks of a mask, with their numbers.
fn blocks_of(bytes: &[u8], mask: u16) -> impl Iterator<Item = (u32, &[u8])> {
    (0..).zip(bytes.chunks(BLOCK as usize)).filter(move |(at, _)| mask >> at & 1 != 0)
}

/// The compressed bytes, if that is worth it.
fn compress(bytes: &[u8], compression: Compression) -> Option<Vec<u8>> {
    let Compression::WherePays { percent } = compression else { return None };
    let packed = lz4_flex::block::compress(bytes);
    let (before, after) = (units(bytes.len()), units(packed.len()));
    (after < before && (before - after) * 100 >= u32::from(percent) * before).then_some(packed)
}

/// The number of the first unit of a chunk: what is encrypted under it is that chunk alone.
pub(crate) fn tweak(id: &Id) -> u128 {
    let mut first = [0; 16];
    first.copy_from_slice(&id[..16]);
    u128::from_le_bytes(first)
}

/// What is wrong with an encrypted chunk of a snapshot that is not encrypted.
pub(crate) const NO_KEY: &str = "is encrypted, and the snapshot is not";

/// Makes what is stored, all units of it, an object again, which is no patch. `stored` may hold anything, and the
/// object has still to be checked; that it has its length is.
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
