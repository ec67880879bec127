//! How bytes become a snapshot: chunks into packs, ids into leaves, leaves into a root.

use std::ops::Range;
use std::sync::Arc;

use crate::format::{self, CHUNK, HOLE, Id, Kind, LEAF_IDS, MAX_SIZE};
use crate::session::Session;
use crate::store::{Inner, Store};
use crate::{Digest, Disk, Error, Result, Snapshot, pipeline};

/// How far an import has come.
///
/// ```
/// # use storage_block::{MemoryDisk, Store};
/// use storage_block::Progress;
///
/// # let dir = tempfile::tempdir()?;
/// # let store = Store::open(dir.path())?;
/// # let image = MemoryDisk::from_vec(vec![7; 4 << 20])?.into_disk();
/// let mut percent = Vec::new();
/// store.import(&image, &mut |p: Progress| percent.push(p.done * 100 / p.total))?;
/// assert!(percent.is_sorted() && percent.last() == Some(&100));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// Bytes of the disk behind us, holes with them.
    pub done: u64,
    /// Bytes of the disk.
    pub total: u64,
}

/// What making a snapshot took.
///
/// ```
/// # use storage_block::{MemoryDisk, Store};
/// # let dir = tempfile::tempdir()?;
/// # let store = Store::open(dir.path())?;
/// let image = MemoryDisk::from_vec(vec![7; 4 << 20])?.into_disk();
/// let (_, first) = store.import(&image, &mut |_| ())?;
/// let (_, again) = store.import(&image, &mut |_| ())?;
/// assert_eq!((first.size, first.changed_bytes), (4 << 20, 4 << 20));
/// assert!(first.stored_bytes > 0 && again.stored_bytes == 0, "the store has it all already");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct SnapshotStats {
    /// The size of the disk.
    pub size: u64,
    /// Of an import, the bytes that were not known to be holes; of a volume's snapshot, the bytes of the
    /// 4 KiB blocks that have changed since the snapshot the volume began as.
    pub changed_bytes: u64,
    /// Bytes that were not in the store yet and are now: chunks of 64 KiB, manifest leaves of 32 KiB.
    pub stored_bytes: u64,
}

impl Store {
    /// Makes a snapshot of a disk, which should not change meanwhile.
    ///
    /// Chunks of zeroes are not stored and holes not read, so a large sparse image takes no longer than
    /// its data. Chunks that any snapshot has are not stored again. `progress` is called about once
    /// for every megabyte. When it returns, the snapshot is durable; when it fails, nothing of it is left.
    ///
    /// # Errors
    ///
    /// [`InvalidSize`](crate::ErrorKind::InvalidSize) above 64 TiB, [`NoSpace`](crate::ErrorKind::NoSpace), what
    /// the disk says to being read.
    pub fn import(
        &self,
        disk: &Disk,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<(Snapshot, SnapshotStats)> {
        let total = disk.size();
        if total > MAX_SIZE {
            return Err(Error::invalid_size(total, "is more than 64 TiB"));
        }
        let mut builder = Builder::new(&self.0, total, None);
        let read = |step: Range<u64>, buf: &mut Vec<u8>| {
            let len = (step.end - step.start) as usize;
            buf.resize(len.next_multiple_of(CHUNK as usize), 0);
            disk.read_at(&mut buf[..len], step.start)?;
            buf[len..].fill(0);
            let ids: Vec<Id> = buf.chunks_exact(CHUNK as usize).map(chunk_id).collect();
            Ok((step, ids))
        };
        pipeline::in_order(Steps { disk, done: 0, data: 0..0 }, read, |(step, ids), bytes| {
            builder.stats.changed_bytes += step.end - step.start;
            let chunks = bytes.chunks_exact(CHUNK as usize).zip(ids);
            for ((chunk, id), number) in chunks.zip(step.start / CHUNK..) {
                builder.set_named(number, &id, chunk)?;
            }
            progress(Progress { done: step.end, total });
            Ok(())
        })?;
        let made = builder.finish()?;
        progress(Progress { done: total, total });
        Ok(made)
    }
}

/// The parts of a disk that may hold data, in pieces of whole chunks.
struct Steps<'d> {
    disk: &'d Disk,
    /// All before is done or no data.
    done: u64,
    /// What is left of the range of data that was found last.
    data: Range<u64>,
}

impl Iterator for Steps<'_> {
    type Item = Result<Range<u64>>;

    fn next(&mut self) -> Option<Self::Item> {
        const STEP: u64 = 1 << 20;
        while self.data.is_empty() {
            let data = match self.disk.next_data(self.done) {
                Ok(data) => data?,
                Err(error) => return Some(Err(error)),
            };
            // Ranges may meet within a chunk: whole chunks are read, and none twice.
            let end = data.end.next_multiple_of(CHUNK).min(self.disk.size());
            self.data = (data.start / CHUNK * CHUNK).max(self.done)..end;
            self.done = end;
        }
        let step = self.data.start..self.data.end.min(self.data.start + STEP);
        self.data.start = step.end;
        Some(Ok(step))
    }
}

/// Makes a snapshot out of chunks that come in ascending order; the others are those of a base.
pub(crate) struct Builder<'s> {
    store: &'s Arc<Inner>,
    session: Session<'s>,
    base: Option<&'s Snapshot>,
    leaves: Vec<Id>,
    /// The leaf that chunks are coming in for.
    current: Option<(usize, Vec<Id>)>,
    pub(crate) stats: SnapshotStats,
}

impl<'s> Builder<'s> {
    pub(crate) fn new(store: &'s Arc<Inner>, size: u64, base: Option<&'s Snapshot>) -> Self {
        let mut leaves = base.map_or_else(Vec::new, |base| base.root.leaves.clone());
        leaves.resize(format::leaf_count(size) as usize, HOLE);
        let session = Session::begin(store);
        Self {
            store,
            session,
            base,
            leaves,
            current: None,
            stats: SnapshotStats { size, ..Default::default() },
        }
    }

    /// Sets a whole chunk.
    pub(crate) fn set(&mut self, number: u64, bytes: &[u8]) -> Result<()> {
        self.set_named(number, &chunk_id(bytes), bytes)
    }

    /// The same for a chunk whose id is known.
    pub(crate) fn set_named(&mut self, number: u64, id: &Id, bytes: &[u8]) -> Result<()> {
        if *id != HOLE {
            self.session.put_named(Kind::Chunk, id, bytes)?;
        }
        let (leaf, within) = ((number / LEAF_IDS as u64) as usize, (number % LEAF_IDS as u64) as usize);
        if self.current.as_ref().is_none_or(|(current, _)| *current != leaf) {
            self.finish_leaf()?;
            let ids = match self.base {
                Some(base) => base.leaf_ids(leaf)?,
                None => vec![HOLE; LEAF_IDS],
            };
            self.current = Some((leaf, ids));
        }
        if let Some((_, ids)) = &mut self.current {
            ids[within] = *id;
        }
        Ok(())
    }

    fn finish_leaf(&mut self) -> Result<()> {
        if let Some((leaf, ids)) = self.current.take() {
            let hole = ids.iter().all(|id| *id == HOLE);
            self.leaves[leaf] = if hole { HOLE } else { self.session.put(Kind::Leaf, ids.as_flattened())? };
        }
        Ok(())
    }

    pub(crate) fn finish(mut self) -> Result<(Snapshot, SnapshotStats)> {
        self.finish_leaf()?;
        self.stats.stored_bytes = self.session.appended();
        let bytes = format::encode_root(self.stats.size, &self.leaves);
        let root = self.session.commit(&bytes)?;
        Ok((Snapshot::new(Arc::clone(self.store), root), self.stats))
    }
}

/// What names a chunk; the one of zeroes is a hole.
fn chunk_id(bytes: &[u8]) -> Id {
    if is_zero(bytes) { HOLE } else { *Digest::of(bytes).as_bytes() }
}

/// Whether all bytes are zero; in words, so that it is as fast as reading them.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    bytes.chunks(256).all(|part| part.iter().fold(0, |all, byte| all | byte) == 0)
}
