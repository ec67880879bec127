//! Where the chunks of a leaf lie.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::format::{CHUNK, Encoding, HOLE, Id, Kind, LEAF_IDS, PACK_UNITS, SLOT_UNITS, Slot};
use crate::object::{Found, Patched};
use crate::pack::Pack;
use crate::store::{Inner, read};
use crate::{ErrorKind, Result};

/// Where the chunks of one leaf lie. It is made when the leaf is first read through, so that opening a
/// snapshot takes no longer for a large one.
#[derive(Debug)]
pub(super) struct Table {
    pub(super) packs: Vec<Arc<Pack>>,
    pub(super) ids: Vec<Id>,
    entries: Box<[AtomicU64]>,
    /// The chunks that are stored as what differs.
    pub(super) patches: HashMap<usize, Patched>,
}

impl Table {
    /// The table of a leaf.
    pub(super) fn look_up(store: &Inner, leaf: &Id) -> Result<Self> {
        let ids = store.read_leaf(leaf)?;
        // The guard keeps the packs' files there until they are open.
        let index = read(&store.index);
        let mut packs = Vec::new();
        let mut numbers = HashMap::new();
        let mut entries = Vec::with_capacity(LEAF_IDS);
        let mut patches = HashMap::new();
        for (number, id) in ids.iter().enumerate() {
            let found = index.find(id).filter(|found| found.slot.kind == Kind::Chunk);
            let entry = match (id, found) {
                (&HOLE, _) => Entry::NOWHERE,
                (_, None) => Entry::LOST,
                // Who reads it is told what is wrong with its pack, and the others are there all the same.
                (_, Some(found)) if found.open().is_err_and(|error| error.kind() == ErrorKind::Corrupt) => {
                    Entry::LOST
                }
                (_, Some(found)) => {
                    found.open()?;
                    let Found { pack, slot, patch } = found;
                    if let Some(patch) = patch {
                        patches.insert(number, patch);
                    }
                    let place = match numbers.get(&pack.number) {
                        Some(place) => *place,
                        None => {
                            numbers.insert(pack.number, packs.len());
                            packs.push(pack);
                            packs.len() - 1
                        }
                    };
                    Entry::new(place, &slot)
                }
            };
            entries.push(AtomicU64::new(entry.0));
        }
        Ok(Self { packs, ids, entries: entries.into(), patches })
    }

    #[inline]
    pub(super) fn entry(&self, place: usize) -> Entry {
        Entry(self.entries[place].load(Ordering::Relaxed))
    }

    /// Notes that nobody need look at a chunk's name any more.
    pub(super) fn set_verified(&self, place: usize) {
        self.entries[place].fetch_or(Entry::VERIFIED, Ordering::Relaxed);
    }
}

/// Where a chunk lies, in a word that is read and marked without a lock: [`NOWHERE`](Self::NOWHERE),
/// [`LOST`](Self::LOST), or from the lowest bit the first unit, the place in the table's packs plus one, the length and
/// the encoding; the highest bit says that nobody need look at the chunk's name any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry(u64);

impl Entry {
    pub(super) const NOWHERE: Self = Self(0);
    pub(super) const LOST: Self = Self(u64::MAX);
    const PACK: u32 = 20;
    const LEN: u32 = 32;
    const ENCODING: u32 = 52;
    const VERIFIED: u64 = 1 << 63;

    fn new(pack: usize, slot: &Slot) -> Self {
        let encoding = u64::from(slot.encoding.0) << Self::ENCODING;
        let len = u64::from(slot.len) << Self::LEN;
        Self(u64::from(slot.start) | (pack as u64 + 1) << Self::PACK | len | encoding)
    }

    pub(super) fn start(self) -> u32 {
        (self.0 & ((1 << Self::PACK) - 1)) as u32
    }

    pub(super) fn pack(self) -> usize {
        ((self.0 >> Self::PACK & ((1 << (Self::LEN - Self::PACK)) - 1)) as usize).saturating_sub(1)
    }

    pub(super) fn slot(self) -> Slot {
        let len = (self.0 >> Self::LEN & ((1 << (Self::ENCODING - Self::LEN)) - 1)) as u32;
        let encoding = Encoding((self.0 >> Self::ENCODING & 0xff) as u8);
        Slot { start: self.start(), len, crc: None, kind: Kind::Chunk, encoding }
    }

    pub(super) fn is_verified(self) -> bool {
        self.0 & Self::VERIFIED != 0
    }

    /// Whether its bytes can be read from the pack's file as they are.
    pub(super) fn is_plain(self) -> bool {
        self.0 >> Self::ENCODING == Self::VERIFIED >> Self::ENCODING
    }

    /// The entry of a chunk that lies behind this one's in the same pack and is like it in all else. A pack has fewer
    /// units than there is room for, so that it is never the first of another pack.
    pub(super) fn next(self) -> Self {
        if self == Self::NOWHERE { self } else { Self(self.0 + u64::from(SLOT_UNITS)) }
    }
}

const _: () =
    assert!(PACK_UNITS + SLOT_UNITS < 1 << Entry::PACK && CHUNK < 1 << (Entry::ENCODING - Entry::LEN));
const _: () = assert!(LEAF_IDS + 1 < 1 << (Entry::LEN - Entry::PACK));
