//! Snapshots: immutable disks, named by the digest of what they hold.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

use ami_core::Digest;

use crate::format::{self, CHUNK, HOLE, Id, Kind, LEAF_IDS, LEAF_SPAN};
use crate::pack::{self, Pack};
use crate::store::{Inner, read};
use crate::{BlockBackend, Capabilities, Disk, Error, ErrorKind, Extent, Result};

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
    tables: Box<[OnceLock<Table>]>,
}

/// Where the chunks of one leaf lie. It is made when the leaf is first read through, so that opening a
/// snapshot takes no longer for a large one.
#[derive(Debug)]
struct Table {
    packs: Vec<Arc<Pack>>,
    /// For each chunk [`NOWHERE`], [`LOST`], or the place in `packs` plus one above the slot.
    entries: Box<[u32]>,
}

/// A pack, and the number of a slot in it.
type Slot<'t> = (&'t Arc<Pack>, u32);

const NOWHERE: u32 = 0;
const LOST: u32 = u32::MAX;
/// One more than it takes, so that the entry after that of a pack's last slot is nobody's.
const SLOT_BITS: u32 = 15;
const _: () = assert!(format::PACK_SLOTS < 1 << SLOT_BITS && (LEAF_IDS as u32 + 1) < (LOST >> SLOT_BITS));

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

    /// The disk, which can only be read.
    pub fn disk(&self) -> Disk {
        Disk::from_backend(self.clone())
    }

    /// Reads everything and checks that each chunk is what its name says.
    ///
    /// # Errors
    ///
    /// [`Corrupt`](ErrorKind::Corrupt) with the first chunk that is not, or what the file system says.
    pub fn verify(&self) -> Result<()> {
        for leaf in 0..self.root.leaves.len() {
            for id in self.leaf_ids(leaf)?.iter().filter(|id| **id != HOLE) {
                let found = read(&self.store.index).find_open(id)?;
                let Some((pack, slot)) = found else { return Err(lost(id)) };
                pack::read_checked(&pack, slot, id, Kind::Chunk)?;
            }
        }
        Ok(())
    }

    /// The chunk ids of a leaf, read and checked.
    pub(crate) fn leaf_ids(&self, leaf: usize) -> Result<Vec<Id>> {
        match self.root.leaves.get(leaf) {
            None | Some(&HOLE) => Ok(vec![HOLE; LEAF_IDS]),
            Some(id) => Ok(format::split_ids(&read(&self.store.index).read(id, Kind::Leaf)?)),
        }
    }

    /// Fills `buf` from `offset`; what lies beyond the end reads as zeroes.
    pub(crate) fn read(&self, mut buf: &mut [u8], mut offset: u64) -> Result<()> {
        while !buf.is_empty() {
            let (found, len) = self.extent(offset, buf.len() as u64)?;
            let (part, rest) = buf.split_at_mut(len as usize);
            match found {
                None => part.fill(0),
                Some((pack, slot)) => pack.read(slot, offset % CHUNK, part)?,
            }
            (buf, offset) = (rest, offset + len);
        }
        Ok(())
    }

    /// What holds the bytes from `offset`, and how many of them, `len` at most, one read can get.
    fn extent(&self, offset: u64, len: u64) -> Result<(Option<Slot<'_>>, u64)> {
        let (leaf, within) = ((offset / LEAF_SPAN) as usize, offset % LEAF_SPAN);
        let len = len.min(LEAF_SPAN - within);
        let Some(table) = self.table(leaf)? else { return Ok((None, len)) };
        let first = (within / CHUNK) as usize;
        let last = ((within + len - 1) / CHUNK) as usize;
        let entry = table.entries[first];
        if entry == LOST {
            let ids = self.leaf_ids(leaf)?;
            return Err(lost(&ids[first]));
        }
        let step = u32::from(entry != NOWHERE);
        let mut end = first;
        while end < last && table.entries[end + 1] == table.entries[end] + step {
            end += 1;
        }
        let len = len.min((end as u64 + 1) * CHUNK - within);
        if entry == NOWHERE {
            return Ok((None, len));
        }
        let (pack, slot) = ((entry >> SLOT_BITS) as usize - 1, entry & ((1 << SLOT_BITS) - 1));
        Ok((Some((&table.packs[pack], slot)), len))
    }

    /// Where bytes lie, as far as that is in memory.
    pub(crate) fn extent_in_memory(&self, offset: u64, len: u64) -> Extent<'_> {
        let (leaf, within) = ((offset / LEAF_SPAN) as usize, offset % LEAF_SPAN);
        let known = match self.root.leaves.get(leaf) {
            None | Some(&HOLE) => true,
            Some(_) => self.root.tables[leaf].get().is_some(),
        };
        if known {
            match self.extent(offset, len) {
                Ok((None, len)) => return Extent::Zeroes { len },
                Ok((Some((pack, slot)), len)) => {
                    if let Some(file) = pack.opened() {
                        let offset = pack::slot_offset(slot) + offset % CHUNK;
                        return Extent::File { file: file.for_reading(), offset, len };
                    }
                }
                // Whoever reads it is told why it cannot be read.
                Err(_) => {}
            }
        }
        Extent::Backend { len: len.min(LEAF_SPAN - within) }
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
        // The guard keeps the packs' files there until they are open.
        let index = read(&self.store.index);
        let ids = format::split_ids(&index.read(leaf, Kind::Leaf)?);
        let mut packs = Vec::new();
        let mut numbers = HashMap::new();
        let mut entries = Vec::with_capacity(LEAF_IDS);
        for id in &ids {
            entries.push(match (id, index.find(id)) {
                (&HOLE, _) => NOWHERE,
                (_, None) => LOST,
                (_, Some((pack, slot))) => {
                    let place = match numbers.get(&pack.number) {
                        Some(place) => *place,
                        None => {
                            pack.file()?;
                            numbers.insert(pack.number, packs.len() as u32 + 1);
                            packs.push(pack);
                            packs.len() as u32
                        }
                    };
                    place << SLOT_BITS | slot
                }
            });
        }
        Ok(Table { packs, entries: entries.into() })
    }

    /// The next range at or after `offset` that is no hole.
    pub(crate) fn next_stored(&self, mut offset: u64) -> Result<Option<Range<u64>>> {
        while offset < self.size() {
            let (found, len) = self.extent(offset, LEAF_SPAN)?;
            if found.is_some() {
                return Ok(Some(offset..(offset + len).min(self.size())));
            }
            offset += len;
        }
        Ok(None)
    }
}

fn lost(id: &Id) -> Error {
    Error::new(ErrorKind::Corrupt, format!("no pack holds the chunk {}", hex::encode(id)))
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

    fn extent(&self, offset: u64, len: u64) -> Extent<'_> {
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
        let (size, leaves) = format::parse_root(bytes)?;
        let tables = leaves.iter().map(|_| OnceLock::new()).collect();
        Ok(Self { digest, size, leaves, tables })
    }
}
