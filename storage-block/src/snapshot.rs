//! Snapshots: immutable disks, named by the digest of what they hold.

mod root;
mod table;

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use ami_core::Digest;

pub(crate) use self::root::Root;
use self::table::{Entry, Table};
use crate::format::{self, CHUNK, HOLE, Id, Kind, LEAF_IDS, LEAF_SPAN};
use crate::object::{Object, Part, Patched};
use crate::pack::Pack;
use crate::store::Inner;
use crate::{BlockBackend, Capabilities, Disk, Error, ErrorKind, Result, Verify};

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

    /// Has a chunk on its way from the disk, for who is about to read it. An error is met by the one who does.
    pub(crate) fn fetch(&self, number: u64) {
        let (leaf, within) = ((number / LEAF_IDS as u64) as usize, (number % LEAF_IDS as u64) as usize);
        let Ok(Some(table)) = self.table(leaf) else { return };
        let entry = table.entry(within);
        if entry != Entry::NOWHERE && entry != Entry::LOST {
            let slot = entry.slot();
            table.packs[entry.pack()].fetch(&slot);
        }
    }

    /// Fills `buf` from `offset`; what lies beyond the end reads as zeroes.
    pub(crate) fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        match self.plain(offset, buf.len() as u64) {
            Some((pack, start)) => match pack.read(start, offset % CHUNK, buf) {
                Err(error) if error.kind() == ErrorKind::Corrupt => self.read_elsewhere(buf, offset),
                read => read,
            },
            None => self.read_parts(buf, offset),
        }
    }

    /// Reads what cannot be read from where it was when it was verified, from wherever it is whole now. If that is
    /// nowhere, this is who says what is wrong.
    #[cold]
    fn read_elsewhere(&self, mut buf: &mut [u8], mut offset: u64) -> Result<()> {
        while !buf.is_empty() {
            let len = (CHUNK - offset % CHUNK).min(buf.len() as u64) as usize;
            let (part, rest) = buf.split_at_mut(len);
            let id = self.chunk_id(offset / CHUNK)?;
            let bytes = self.store.read_object(Kind::Chunk, &id, self.root.key())?;
            part.copy_from_slice(&bytes[(offset % CHUNK) as usize..][..len]);
            (buf, offset) = (rest, offset + len as u64);
        }
        Ok(())
    }

    /// The pack and the slot that bytes within one chunk can be read from as they are. Most reads are of such, and to find
    /// a block shall take little of the time in which a page is copied.
    #[inline]
    fn plain(&self, offset: u64, len: u64) -> Option<(&Pack, u32)> {
        if offset % CHUNK + len > CHUNK {
            return None;
        }
        let table = self.root.tables.get((offset / LEAF_SPAN) as usize)?.get()?;
        let entry = table.entry((offset / CHUNK) as usize % LEAF_IDS);
        entry.is_plain().then(|| (&*table.packs[entry.pack()], entry.start()))
    }

    fn read_parts(&self, mut buf: &mut [u8], mut offset: u64) -> Result<()> {
        while !buf.is_empty() {
            let (found, len) = self.extent(offset, buf.len() as u64)?;
            let (part, rest) = buf.split_at_mut(len as usize);
            match found {
                Extent::Hole => part.fill(0),
                Extent::Plain(pack, start) => match pack.read(start, offset % CHUNK, part) {
                    Err(error) if error.kind() == ErrorKind::Corrupt => self.read_elsewhere(part, offset)?,
                    read => read?,
                },
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
        let mut object = Object { own: Part { id, pack, slot }, patch };
        let verify = if entry.is_verified() || pack.is_verified(slot.start) {
            Verify::Never
        } else {
            self.store.verify
        };
        if verify == Verify::Never {
            object.read(key, &self.store.cache, offset, part)?;
        } else {
            if verify == Verify::Checksum {
                object.own.slot.crc = self.store.checksum(id, pack.number, slot.start);
            }
            if part.len() as u64 == CHUNK {
                object.read_sound_into(key, part)?;
            } else {
                let mut bytes = vec![0; CHUNK as usize];
                object.read_sound_into(key, &mut bytes)?;
                part.copy_from_slice(&bytes[offset as usize..][..part.len()]);
                if slot.encoding.compressed() {
                    self.store.cache.insert(object.own.cache_key(key)?, &bytes.into());
                }
            }
            pack.set_verified(slot.start);
        }
        if !entry.is_verified() {
            table.set_verified(place);
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
    #[inline]
    fn table(&self, leaf: usize) -> Result<Option<&Table>> {
        match self.root.tables.get(leaf).and_then(|cell| cell.get()) {
            Some(table) => Ok(Some(table)),
            None => self.look_up(leaf),
        }
    }

    fn look_up(&self, leaf: usize) -> Result<Option<&Table>> {
        let (Some(id), Some(cell)) = (self.root.leaves.get(leaf), self.root.tables.get(leaf)) else {
            return Ok(None);
        };
        if *id == HOLE {
            return Ok(None);
        }
        let table = Table::look_up(&self.store, id)?;
        // Whoever loses this race has made the same table.
        Ok(Some(cell.get_or_init(|| table)))
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
