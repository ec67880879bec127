//! Snapshots: immutable disks, named by the digest of what they hold.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use ami_core::Digest;

use crate::format::{
    self, CHUNK, Encoding, HOLE, Id, Kind, LEAF_IDS, LEAF_SPAN, PACK_UNITS, RootParts, SLOT_UNITS, Slot,
    WrappedKey,
};
use crate::keys::{EncryptionKey, KeyContext};
use crate::object::{Found, Object, Part, Patched};
use crate::pack::Pack;
use crate::store::{Inner, read};
use crate::{BlockBackend, Capabilities, Disk, Error, ErrorKind, Result};

/// An immutable disk in a [`Store`](crate::Store).
///
/// Its digest is that of its content and its size and of nothing else: the same bytes imported into two
/// stores, or reached by two histories, are one snapshot. Cheap to clone; all clones are the same one.
///
/// ```
/// use storage_block::{MemoryDisk, Store};
///
/// # let dir = tempfile::tempdir()?;
/// let store = Store::open(dir.path())?;
/// let image = MemoryDisk::from_vec(vec![7; 1 << 20])?.into_disk();
/// let (snapshot, _) = store.import(&image, &mut |_| ())?;
/// assert_eq!((snapshot.size(), snapshot.disk().read_only()), (1 << 20, true));
/// snapshot.verify()?;
///
/// let same = store.snapshot(&snapshot.digest())?;
/// assert_eq!(same.digest(), store.import(&image, &mut |_| ())?.0.digest());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct Snapshot {
    pub(crate) store: Arc<Inner>,
    pub(crate) root: Arc<Root>,
}

/// The manifest's root, and those of its leaves that somebody has read through.
#[derive(Debug)]
pub(crate) struct Root {
    pub(crate) digest: Digest,
    pub(crate) size: u64,
    pub(crate) leaves: Vec<Id>,
    /// The key of an encrypted snapshot, as it is stored, and when somebody has come with the key to it.
    wrapped: Option<WrappedKey>,
    key: OnceLock<EncryptionKey>,
    tables: Box<[OnceLock<Table>]>,
}

/// Where the chunks of one leaf lie. It is made when the leaf is first read through, so that opening a
/// snapshot takes no longer for a large one.
#[derive(Debug)]
struct Table {
    packs: Vec<Arc<Pack>>,
    ids: Vec<Id>,
    entries: Box<[AtomicU64]>,
    /// The chunks that are stored as what differs.
    patches: HashMap<usize, Patched>,
}

/// Where a chunk lies, in a word that is read and marked without a lock: [`NOWHERE`](Self::NOWHERE),
/// [`LOST`](Self::LOST), or from the lowest bit the first unit, the place in the table's packs plus one, the length and
/// the encoding; the highest bit says that nobody need look at the chunk's name any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry(u64);

impl Entry {
    const NOWHERE: Self = Self(0);
    const LOST: Self = Self(u64::MAX);
    const PACK: u32 = 20;
    const LEN: u32 = 32;
    const ENCODING: u32 = 52;
    const VERIFIED: u64 = 1 << 63;

    fn new(pack: usize, slot: &Slot) -> Self {
        let encoding = u64::from(slot.encoding.0) << Self::ENCODING;
        let len = u64::from(slot.len) << Self::LEN;
        Self(u64::from(slot.start) | (pack as u64 + 1) << Self::PACK | len | encoding)
    }

    fn start(self) -> u32 {
        (self.0 & ((1 << Self::PACK) - 1)) as u32
    }

    fn pack(self) -> usize {
        ((self.0 >> Self::PACK & ((1 << (Self::LEN - Self::PACK)) - 1)) as usize).saturating_sub(1)
    }

    fn slot(self) -> Slot {
        let len = (self.0 >> Self::LEN & ((1 << (Self::ENCODING - Self::LEN)) - 1)) as u32;
        let encoding = Encoding((self.0 >> Self::ENCODING & 0xff) as u8);
        Slot { start: self.start(), len, crc: None, kind: Kind::Chunk, encoding }
    }

    fn is_verified(self) -> bool {
        self.0 & Self::VERIFIED != 0
    }

    /// Whether its bytes can be read from the pack's file as they are.
    fn is_plain(self) -> bool {
        self.0 >> Self::ENCODING == Self::VERIFIED >> Self::ENCODING
    }

    /// The entry of a chunk that lies behind this one's in the same pack and is like it in all else. A pack has fewer
    /// units than there is room for, so that it is never the first of another pack.
    fn next(self) -> Self {
        if self == Self::NOWHERE { self } else { Self(self.0 + u64::from(SLOT_UNITS)) }
    }
}

const _: () =
    assert!(PACK_UNITS + SLOT_UNITS < 1 << Entry::PACK && CHUNK < 1 << (Entry::ENCODING - Entry::LEN));
const _: () = assert!(LEAF_IDS + 1 < 1 << (Entry::LEN - Entry::PACK));

/// What holds the bytes from some offset.
enum Extent<'t> {
    Hole,
    /// A slot whose bytes are the disk's, and more such behind it.
    Plain(&'t Arc<Pack>, u32),
    /// A chunk that is not stored as it is, or not yet verified.
    Chunk(&'t Table, usize),
}

impl Snapshot {
    pub(crate) fn new(store: Arc<Inner>, root: Arc<Root>) -> Self {
        Self { store, root }
    }

    /// What identifies it: the SHA-256 digest of its manifest's root.
    pub fn digest(&self) -> Digest {
        self.root.digest
    }

    /// The size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.root.size
    }

    /// Whether it is encrypted at rest.
    pub fn encrypted(&self) -> bool {
        self.root.wrapped().is_some()
    }

    /// The id of the key that wraps its data key, if it is encrypted.
    pub fn key_id(&self) -> Option<&str> {
        self.root.wrapped().map(|wrapped| wrapped.key_id.as_str())
    }

    /// The disk, which can only be read.
    pub fn disk(&self) -> Disk {
        Disk::from_backend(self.clone())
    }

    /// Reads everything and checks that each chunk is what its name says.
    ///
    /// # Errors
    ///
    /// [`Corrupt`](crate::ErrorKind::Corrupt) with the first chunk that is not, or what the file system says.
    pub fn verify(&self) -> Result<()> {
        for leaf in 0..self.root.leaves.len() {
            for id in self.leaf_ids(leaf)?.iter().filter(|id| **id != HOLE) {
                self.store.read_object(Kind::Chunk, id, self.root.key())?;
            }
        }
        Ok(())
    }

    /// The chunk ids of a leaf, read and checked.
    pub(crate) fn leaf_ids(&self, leaf: usize) -> Result<Vec<Id>> {
        match self.root.leaves.get(leaf) {
            None | Some(&HOLE) => Ok(vec![HOLE; LEAF_IDS]),
            Some(id) => self.store.read_leaf(id),
        }
    }

    /// The id of one chunk; that of a hole, beyond the end, too.
    pub(crate) fn chunk_id(&self, number: u64) -> Result<Id> {
        let (leaf, within) = ((number / LEAF_IDS as u64) as usize, (number % LEAF_IDS as u64) as usize);
        Ok(self.table(leaf)?.map_or(HOLE, |table| table.ids[within]))
    }

    /// Fills `buf` from `offset`; what lies beyond the end reads as zeroes.
    pub(crate) fn read(&self, mut buf: &mut [u8], mut offset: u64) -> Result<()> {
        while !buf.is_empty() {
            let (found, len) = self.extent(offset, buf.len() as u64)?;
            let (part, rest) = buf.split_at_mut(len as usize);
            match found {
                Extent::Hole => part.fill(0),
                Extent::Plain(pack, start) => pack.read(start, offset % CHUNK, part)?,
                Extent::Chunk(table, place) => self.read_chunk(table, place, offset % CHUNK, part)?,
            }
            (buf, offset) = (rest, offset + len);
        }
        Ok(())
    }

    /// What holds the bytes from `offset`, and how many of them, `len` at most, one read can get.
    fn extent(&self, offset: u64, len: u64) -> Result<(Extent<'_>, u64)> {
        let (leaf, within) = ((offset / LEAF_SPAN) as usize, offset % LEAF_SPAN);
        let len = len.min(LEAF_SPAN - within);
        let Some(table) = self.table(leaf)? else { return Ok((Extent::Hole, len)) };
        let first = (within / CHUNK) as usize;
        let last = ((within + len - 1) / CHUNK) as usize;
        let entry = table.entry(first);
        let one = len.min((first as u64 + 1) * CHUNK - within);
        if entry != Entry::NOWHERE && !entry.is_plain() {
            return Ok((Extent::Chunk(table, first), one));
        }
        let (mut end, mut next) = (first, entry.next());
        while end < last && table.entry(end + 1) == next {
            end += 1;
            next = next.next();
        }
        let len = len.min((end as u64 + 1) * CHUNK - within);
        if entry == Entry::NOWHERE {
            return Ok((Extent::Hole, len));
        }
        Ok((Extent::Plain(&table.packs[entry.pack()], entry.start()), len))
    }

    /// Reads a part of one chunk, and the first time anybody does verifies all of it.
    fn read_chunk(&self, table: &Table, place: usize, offset: u64, part: &mut [u8]) -> Result<()> {
        let (entry, id, key) = (table.entry(place), &table.ids[place], self.root.key());
        let read = match entry {
            Entry::LOST => Err(Error::new(ErrorKind::Corrupt, "it was not there")),
            _ => self.read_entry(table, place, offset, part),
        };
        match read {
            // It may lie elsewhere by now, and if it does not, this is who says what is wrong.
            Err(error) if error.kind() == ErrorKind::Corrupt => {
                let bytes = self.store.read_object(Kind::Chunk, id, key)?;
                part.copy_from_slice(&bytes[offset as usize..][..part.len()]);
                Ok(())
            }
            read => read,
        }
    }

    fn read_entry(&self, table: &Table, place: usize, offset: u64, part: &mut [u8]) -> Result<()> {
        let (entry, id, key) = (table.entry(place), &table.ids[place], self.root.key());
        let (pack, slot) = (&*table.packs[entry.pack()], entry.slot());
        let patch = if slot.encoding.patch() { table.patches.get(&place).map(Patched::part) } else { None };
        let object = Object { own: Part { id, pack, slot }, patch };
        let verified = entry.is_verified() || !self.store.verify || pack.is_verified(slot.start);
        if verified {
            object.read(key, &self.store.cache, offset, part)?;
        } else {
            if part.len() as u64 == CHUNK {
                object.read_checked_into(key, part)?;
            } else {
                let bytes = object.read_checked(key)?;
                part.copy_from_slice(&bytes[offset as usize..][..part.len()]);
                if slot.encoding.compressed() {
                    self.store.cache.insert(pack.number, slot.start, &bytes.into());
                }
            }
            pack.set_verified(slot.start);
        }
        if !entry.is_verified() {
            table.entries[place].fetch_or(Entry::VERIFIED, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Where bytes lie, as far as that is in memory, and has been verified.
    pub(crate) fn extent_in_memory(&self, offset: u64, len: u64) -> crate::Extent<'_> {
        let (leaf, within) = ((offset / LEAF_SPAN) as usize, offset % LEAF_SPAN);
        let known = match self.root.leaves.get(leaf) {
            None | Some(&HOLE) => true,
            Some(_) => self.root.tables[leaf].get().is_some(),
        };
        if !known {
            return crate::Extent::Backend { len: len.min(LEAF_SPAN - within) };
        }
        match self.extent(offset, len) {
            Ok((Extent::Hole, len)) => crate::Extent::Zeroes { len },
            Ok((Extent::Plain(pack, start), len)) => match pack.opened() {
                Some(file) => {
                    let offset = format::unit_offset(start) + offset % CHUNK;
                    crate::Extent::File { file: file.for_reading(), offset, len }
                }
                None => crate::Extent::Backend { len },
            },
            Ok((Extent::Chunk(..), len)) => crate::Extent::Backend { len },
            // Whoever reads it is told why it cannot be read.
            Err(_) => crate::Extent::Backend { len: len.min(CHUNK - offset % CHUNK) },
        }
    }

    /// Where the leaf's chunks lie; `None` where all of it is a hole.
    fn table(&self, leaf: usize) -> Result<Option<&Table>> {
        let (Some(id), Some(cell)) = (self.root.leaves.get(leaf), self.root.tables.get(leaf)) else {
            return Ok(None);
        };
        if *id == HOLE {
            return Ok(None);
        }
        if let Some(table) = cell.get() {
            return Ok(Some(table));
        }
        let table = self.make_table(id)?;
        // Whoever loses this race has made the same table.
        Ok(Some(cell.get_or_init(|| table)))
    }

    fn make_table(&self, leaf: &Id) -> Result<Table> {
        let ids = self.store.read_leaf(leaf)?;
        // The guard keeps the packs' files there until they are open.
        let index = read(&self.store.index);
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
        Ok(Table { packs, ids, entries: entries.into(), patches })
    }

    /// The next range at or after `offset` that is no hole.
    pub(crate) fn next_stored(&self, mut offset: u64) -> Result<Option<Range<u64>>> {
        while offset < self.size() {
            let (leaf, within) = ((offset / LEAF_SPAN) as usize, offset % LEAF_SPAN);
            let rest = LEAF_SPAN - within;
            let first = (within / CHUNK) as usize;
            let Some(table) = self.table(leaf)? else {
                offset += rest;
                continue;
            };
            let stored = table.entry(first) != Entry::NOWHERE;
            let same = |place: &usize| (table.entry(*place) != Entry::NOWHERE) == stored;
            let end = first + (first..LEAF_IDS).take_while(same).count();
            let next = offset - within + end as u64 * CHUNK;
            if stored {
                return Ok(Some(offset..next.min(self.size())));
            }
            offset = next;
        }
        Ok(None)
    }
}

impl Table {
    fn entry(&self, place: usize) -> Entry {
        Entry(self.entries[place].load(Ordering::Relaxed))
    }
}

impl fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Snapshot").field("digest", &self.digest()).field("size", &self.size()).finish()
    }
}

impl BlockBackend for Snapshot {
    fn size(&self) -> u64 {
        self.root.size
    }

    fn read_only(&self) -> bool {
        true
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.read(buf, offset)
    }

    fn write_at(&self, _: &[u8], _: u64) -> Result<()> {
        Err(Error::read_only())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn write_zeroes(&self, _: u64, _: u64) -> Result<()> {
        Err(Error::read_only())
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { knows_holes: true, in_files: true, ..Capabilities::default() }
    }

    fn extent(&self, offset: u64, len: u64) -> crate::Extent<'_> {
        self.extent_in_memory(offset, len)
    }

    fn next_data(&self, offset: u64) -> Result<Option<Range<u64>>> {
        self.next_stored(offset)
    }
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
