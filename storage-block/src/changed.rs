//! Which blocks of a snapshot hold anything, and which differ between two: what a copy, a backup or an
//! endpoint that speaks of blocks asks for.

use std::iter::FusedIterator;

use crate::format::{CHUNK, HOLE, Id, LEAF_IDS, leaf_count};
use crate::keys::EncryptionKey;
use crate::{Error, Result, Snapshot};

/// A block that differs between two snapshots, by [`Snapshot::changed_blocks`].
///
/// ```
/// use storage_block::{ChangedBlock, Disk, Result};
///
/// /// Brings a copy of the earlier disk up to the later one.
/// fn follow(copy: &Disk, later: &Disk, block_size: u64, changed: ChangedBlock) -> Result<()> {
///     let at = changed.index * block_size;
///     if !changed.after {
///         return copy.discard(at, block_size.min(copy.size() - at));
///     }
///     let mut bytes = vec![0; block_size.min(later.size() - at) as usize];
///     later.read_at(&mut bytes, at)?;
///     copy.write_at(&bytes, at)
/// }
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct ChangedBlock {
    /// The number of the block: it begins at so many times the block size.
    pub index: u64,
    /// Whether the earlier snapshot has anything but zeroes in it.
    pub before: bool,
    /// Whether the later snapshot has.
    pub after: bool,
}

impl Snapshot {
    /// The numbers of the blocks of `block_size` bytes that hold anything but zeroes, in order.
    ///
    /// It reads those leaves of the manifest that have any, one at a time, and no chunk.
    ///
    /// ```
    /// use storage_block::{MemoryDisk, Result, Store};
    ///
    /// # let dir = tempfile::tempdir()?;
    /// let store = Store::open(dir.path())?;
    /// let disk = MemoryDisk::new(8 << 20)?.into_disk();
    /// disk.write_at(b"hello", 3 << 20)?;
    /// let (snapshot, _) = store.import(&disk, &mut |_| ())?;
    /// let blocks: Vec<u64> = snapshot.blocks(512 << 10)?.collect::<Result<_>>()?;
    /// assert_eq!(blocks, [6]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidSize`](crate::ErrorKind::InvalidSize) unless `block_size` is a multiple of 64 KiB. The iterator
    /// says [`Corrupt`](crate::ErrorKind::Corrupt) of a leaf that cannot be read, and ends there.
    pub fn blocks(&self, block_size: u64) -> Result<Blocks> {
        Walk::new(None, self, block_size).map(Blocks)
    }

    /// The blocks of `block_size` bytes in which this snapshot differs from an `earlier` one, in order.
    ///
    /// What two manifests share is passed over by its digest, so that it takes as long as the parts that
    /// differ and no longer for large snapshots. The two may differ in size, what lies beyond the end of one reads
    /// as zeroes, and neither need have come of the other.
    ///
    /// Chunks under two keys, or under one and none, have no names in common: of two such snapshots what both have is read
    /// and compared, which takes as long as it takes to read it.
    ///
    /// ```
    /// use storage_block::{MemoryDisk, Result, Store, Volume};
    ///
    /// # let dir = tempfile::tempdir()?;
    /// let store = Store::open(dir.path().join("store"))?;
    /// let image = MemoryDisk::from_vec(vec![7; 4 << 20])?.into_disk();
    /// let (first, _) = store.import(&image, &mut |_| ())?;
    /// let volume = Volume::create(&dir.path().join("volume"), Some(&first), 8 << 20)?;
    /// volume.disk().write_at(b"hello", 5 << 20)?;
    /// volume.disk().discard(0, 1 << 20)?;
    /// let (second, _) = volume.snapshot(&store)?;
    ///
    /// let mut copy = vec![7; 4 << 20];
    /// copy.resize(8 << 20, 0);
    /// for block in second.changed_blocks(&first, 512 << 10)? {
    ///     let block = block?;
    ///     assert!([0, 1, 10].contains(&block.index));
    ///     assert_eq!((block.before, block.after), (block.index < 2, block.index == 10));
    ///     let at = block.index as usize * (512 << 10);
    ///     second.disk().read_at(&mut copy[at..at + (512 << 10)], at as u64)?;
    /// }
    /// assert_eq!(&copy[5 << 20..][..5], b"hello");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`blocks`](Self::blocks); between two keys also what reading a chunk meets.
    pub fn changed_blocks(&self, earlier: &Self, block_size: u64) -> Result<ChangedBlocks> {
        Walk::new(Some(earlier), self, block_size).map(ChangedBlocks)
    }
}

/// The blocks of a snapshot, by [`Snapshot::blocks`].
///
/// ```
/// # use storage_block::{MemoryDisk, Result, Store};
/// # let dir = tempfile::tempdir()?;
/// # let store = Store::open(dir.path())?;
/// let image = MemoryDisk::from_vec(vec![7; 1 << 20])?.into_disk();
/// let (snapshot, _) = store.import(&image, &mut |_| ())?;
/// let page: Vec<u64> = snapshot.blocks(64 << 10)?.starting_at(3).take(4).collect::<Result<_>>()?;
/// assert_eq!(page, [3, 4, 5, 6]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Blocks(Walk);

/// The blocks that differ between two snapshots, by [`Snapshot::changed_blocks`].
///
/// ```
/// # use storage_block::{MemoryDisk, Result, Store};
/// # let dir = tempfile::tempdir()?;
/// # let store = Store::open(dir.path())?;
/// let image = |byte| MemoryDisk::from_vec(vec![byte; 1 << 20]).map(MemoryDisk::into_disk);
/// let (first, _) = store.import(&image(7)?, &mut |_| ())?;
/// let (second, _) = store.import(&image(8)?, &mut |_| ())?;
/// let rest = second.changed_blocks(&first, 64 << 10)?.starting_at(13).collect::<Result<Vec<_>>>()?;
/// assert_eq!(rest.iter().map(|block| block.index).collect::<Vec<_>>(), [13, 14, 15]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct ChangedBlocks(Walk);

impl Blocks {
    /// Begins at the block of this number, for those who list page by page.
    #[must_use]
    pub fn starting_at(mut self, index: u64) -> Self {
        self.0.start_at(index);
        self
    }
}

impl ChangedBlocks {
    /// Begins at the block of this number, for those who list page by page.
    #[must_use]
    pub fn starting_at(mut self, index: u64) -> Self {
        self.0.start_at(index);
        self
    }
}

impl Iterator for Blocks {
    type Item = Result<u64>;

    fn next(&mut self) -> Option<Self::Item> {
        Some(self.0.next()?.map(|block| block.index))
    }
}

impl Iterator for ChangedBlocks {
    type Item = Result<ChangedBlock>;

    fn next(&mut self) -> Option<Self::Item> {
        self.0.next()
    }
}

impl FusedIterator for Blocks {}
impl FusedIterator for ChangedBlocks {}

/// A walk through two manifests; where there is no earlier one it is that of a disk of zeroes.
#[derive(Debug)]
struct Walk {
    before: Option<Side>,
    after: Side,
    /// Equal chunks of the two have equal names.
    same_names: bool,
    /// Chunks in a block.
    block: u64,
    /// The next chunk, and the one after the last.
    at: u64,
    end: u64,
}

impl Walk {
    fn new(before: Option<&Snapshot>, after: &Snapshot, block_size: u64) -> Result<Self> {
        if block_size == 0 || block_size % CHUNK != 0 {
            return Err(Error::invalid_size(block_size, "is not a multiple of 64 KiB, as that of blocks is"));
        }
        let size = before.map_or(0, Snapshot::size).max(after.size());
        let end = leaf_count(size) * LEAF_IDS as u64;
        let key = after.root.key();
        Ok(Self {
            before: before.map(Side::new),
            after: Side::new(after),
            same_names: before.is_none_or(|before| EncryptionKey::are_same(before.root.key(), key)),
            block: block_size / CHUNK,
            at: 0,
            end,
        })
    }

    fn start_at(&mut self, index: u64) {
        self.at = index.saturating_mul(self.block).min(self.end);
    }

    fn next(&mut self) -> Option<Result<ChangedBlock>> {
        let found = self.find();
        if !matches!(found, Ok(Some(_))) {
            self.at = self.end;
        }
        found.transpose()
    }

    fn find(&mut self) -> Result<Option<ChangedBlock>> {
        while self.at < self.end {
            let leaf = (self.at / LEAF_IDS as u64) as usize;
            if self.before.as_ref().map_or(&HOLE, |side| side.leaf(leaf)) == self.after.leaf(leaf) {
                self.at = (leaf as u64 + 1) * LEAF_IDS as u64;
                continue;
            }
            let before = self.before.as_mut().map_or(Ok(HOLE), |side| side.id(self.at))?;
            let after = self.after.id(self.at)?;
            if before != after && (before == HOLE || after == HOLE || self.bytes_differ()?) {
                return self.take().map(Some);
            }
            self.at += 1;
        }
        Ok(None)
    }

    /// Whether the chunk we have come to, which both have by another name, holds other bytes.
    fn bytes_differ(&self) -> Result<bool> {
        let Some(before) = self.before.as_ref().filter(|_| !self.same_names) else { return Ok(true) };
        let read = |side: &Side| {
            let mut bytes = vec![0; CHUNK as usize];
            side.snapshot.read(&mut bytes, self.at * CHUNK).map(|()| bytes)
        };
        Ok(read(before)? != read(&self.after)?)
    }

    /// The block of the chunk we have come to, all of which may lie in several leaves.
    fn take(&mut self) -> Result<ChangedBlock> {
        let index = self.at / self.block;
        let chunks = index * self.block..(index + 1) * self.block;
        self.at = chunks.end;
        let before = match &mut self.before {
            Some(side) => side.any(chunks.clone())?,
            None => false,
        };
        Ok(ChangedBlock { index, before, after: self.after.any(chunks)? })
    }
}

/// A manifest, and the leaf of it that was read last.
#[derive(Debug)]
struct Side {
    snapshot: Snapshot,
    read: Option<(usize, Vec<Id>)>,
}

impl Side {
    fn new(snapshot: &Snapshot) -> Self {
        Self { snapshot: snapshot.clone(), read: None }
    }

    fn leaf(&self, leaf: usize) -> &Id {
        self.snapshot.root.leaves.get(leaf).unwrap_or(&HOLE)
    }

    fn id(&mut self, chunk: u64) -> Result<Id> {
        let (leaf, within) = ((chunk / LEAF_IDS as u64) as usize, (chunk % LEAF_IDS as u64) as usize);
        if *self.leaf(leaf) == HOLE {
            return Ok(HOLE);
        }
        let ids = match self.read.take() {
            Some((number, ids)) if number == leaf => ids,
            _ => self.snapshot.leaf_ids(leaf)?,
        };
        let id = ids[within];
        self.read = Some((leaf, ids));
        Ok(id)
    }

    /// Whether any of these chunks holds anything.
    fn any(&mut self, chunks: std::ops::Range<u64>) -> Result<bool> {
        let end = chunks.end.min(leaf_count(self.snapshot.size()) * LEAF_IDS as u64);
        for chunk in chunks.start..end {
            if self.id(chunk)? != HOLE {
                return Ok(true);
            }
        }
        Ok(false)
    }
}
