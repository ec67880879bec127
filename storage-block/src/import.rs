//! How bytes become a snapshot: chunks into packs, ids into leaves, leaves into a root.

use std::sync::Arc;

use crate::format::{self, CHUNK, HOLE, Id, LEAF_IDS, MAX_SIZE};
use crate::keys::EncryptionKey;
use crate::session::{Session, Was};
use crate::store::{Inner, Store};
use crate::{Disk, Error, Result, Snapshot};

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
    /// Bytes that were not in the store yet and are now: chunks of 64 KiB and manifest leaves of 32 KiB, or what is
    /// left of them where they are compressed.
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
        self.import_with(disk, None, progress)
    }

    /// The same, encrypted: chunks are stored once for all that is stored under `key`, and never together
    /// with others. The disk may be a snapshot under another key, or under none.
    ///
    /// # Errors
    ///
    /// As [`import`](Self::import).
    pub fn import_encrypted(
        &self,
        disk: &Disk,
        key: &EncryptionKey,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<(Snapshot, SnapshotStats)> {
        self.import_with(disk, Some(key), progress)
    }

    pub(crate) fn import_with(
        &self,
        disk: &Disk,
        key: Option<&EncryptionKey>,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<(Snapshot, SnapshotStats)> {
        const STEP: u64 = 1 << 20;
        let total = disk.size();
        if total > MAX_SIZE {
            return Err(Error::invalid_size(total, "is more than 64 TiB"));
        }
        let mut builder = Builder::new(&self.0, total, None, key);
        let mut buf = vec![0; STEP as usize];
        let mut done = 0;
        while let Some(data) = disk.next_data(done)? {
            // Ranges may meet within a chunk: whole chunks are read, and none twice.
            let mut at = (data.start / CHUNK * CHUNK).max(done);
            let end = data.end.next_multiple_of(CHUNK).min(total);
            while at < end {
                let len = (end - at).min(STEP) as usize;
                disk.read_at(&mut buf[..len], at)?;
                builder.stats.changed_bytes += len as u64;
                let padded = len.next_multiple_of(CHUNK as usize);
                buf[len..padded].fill(0);
                for (chunk, number) in buf[..padded].chunks_exact(CHUNK as usize).zip(at / CHUNK..) {
                    builder.set(number, chunk, u16::MAX)?;
                }
                at += len as u64;
                progress(Progress { done: at, total });
            }
            done = end;
        }
        let made = builder.finish()?;
        progress(Progress { done: total, total });
        Ok(made)
    }
}

/// Makes a snapshot out of chunks that come in ascending order; the others are those of a base.
pub(crate) struct Builder<'s> {
    store: &'s Arc<Inner>,
    session: Session<'s>,
    base: Option<&'s Snapshot>,
    key: Option<&'s EncryptionKey>,
    leaves: Vec<Id>,
    /// The leaf that chunks are coming in for.
    current: Option<(usize, Vec<Id>)>,
    pub(crate) stats: SnapshotStats,
}

impl<'s> Builder<'s> {
    pub(crate) fn new(
        store: &'s Arc<Inner>,
        size: u64,
        base: Option<&'s Snapshot>,
        key: Option<&'s EncryptionKey>,
    ) -> Self {
        let mut leaves = base.map_or_else(Vec::new, |base| base.root.leaves.clone());
        leaves.resize(format::leaf_count(size) as usize, HOLE);
        let session = Session::begin(store);
        Self {
            store,
            session,
            base,
            key,
            leaves,
            current: None,
            stats: SnapshotStats { size, ..Default::default() },
        }
    }

    /// Sets a whole chunk, of which the blocks in `changed` may differ from the base's.
    pub(crate) fn set(&mut self, number: u64, bytes: &[u8], changed: u16) -> Result<()> {
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
            let was = Was { id: ids[within], changed };
            ids[within] =
                if is_zero(bytes) { HOLE } else { self.session.put_chunk(bytes, self.key, Some(was))? };
        }
        Ok(())
    }

    fn finish_leaf(&mut self) -> Result<()> {
        if let Some((leaf, ids)) = self.current.take() {
            let hole = ids.iter().all(|id| *id == HOLE);
            self.leaves[leaf] = if hole { HOLE } else { self.session.put_leaf(&ids)? };
        }
        Ok(())
    }

    pub(crate) fn finish(mut self) -> Result<(Snapshot, SnapshotStats)> {
        self.finish_leaf()?;
        self.stats.stored_bytes = self.session.appended();
        let wrapped = self.key.map(EncryptionKey::wrapped);
        let bytes = format::encode_root(self.stats.size, &self.leaves, wrapped);
        let root = self.session.commit(&bytes, self.key)?;
        Ok((Snapshot::new(Arc::clone(self.store), root), self.stats))
    }
}

/// Whether all bytes are zero; in words, so that it is as fast as reading them.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    bytes.chunks(256).all(|part| part.iter().fold(0, |all, byte| all | byte) == 0)
}
