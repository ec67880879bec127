//! How bytes become a snapshot: chunks into packs, ids into leaves, leaves into a root.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use ami_core::Digest;

use crate::format::{self, CHUNK, HOLE, Id, LEAF_IDS, MAX_SIZE};
use crate::fs;
use crate::keys::{EncryptionKey, KeyContext};
use crate::progress::Reporter;
use crate::session::{Prepared, Session, Unpublished, prepare};
use crate::store::{Inner, lock, sync_dir};
use crate::{Disk, Error, Progress, Result, Snapshot, Store, pipeline};

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
    /// 4 KiB blocks that have changed since the last one, or, where there was none in this store since the volume was
    /// opened, since the snapshot the volume began as.
    pub changed_bytes: u64,
    /// Bytes that were not in the store yet and are now: chunks of 64 KiB and manifest leaves of 32 KiB, or what is
    /// left of them where they are compressed, are nearly zero or differ little from what was there before.
    pub stored_bytes: u64,
    /// Of a volume's snapshot, how long its writers stood still; those of all volumes that were frozen with it stood
    /// still as long.
    pub paused: Duration,
}

impl Store {
    /// Makes a snapshot of a disk, which should not change meanwhile.
    ///
    /// Chunks of zeroes are not stored and holes not read, so a large sparse image takes no longer than
    /// its data. Chunks that any snapshot has are not stored again. `progress` is called on this thread, at the
    /// beginning, about once for every megabyte and at the end; it may read, open and make snapshots, and must not
    /// [sweep](Self::sweep), which would wait for this import. When this returns, the snapshot is durable; when it fails,
    /// nothing of it is left. What is stored is written past the system's page cache where the file system lets it, so what
    /// is read first comes from the disk.
    ///
    /// # Errors
    ///
    /// [`InvalidSize`](crate::ErrorKind::InvalidSize) above 64 TiB, [`NoSpace`](crate::ErrorKind::NoSpace),
    /// [`Cancelled`](crate::ErrorKind::Cancelled), [`InUse`](crate::ErrorKind::InUse) if this thread holds a
    /// [sweep](crate::Sweep) of the store, what the disk says to being read.
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

    fn import_with(
        &self,
        disk: &Disk,
        key: Option<&EncryptionKey>,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<(Snapshot, SnapshotStats)> {
        let size = disk.size();
        if size > MAX_SIZE {
            return Err(Error::invalid_size(size, "is more than 64 TiB"));
        }
        self.0.turns.check_not_here()?;
        let mut report = Reporter::begin(size, progress)?;
        let mut session = Session::begin(&self.0);
        let store = session.store();
        let mut manifest = Manifest::new(size, None, key);
        let mut stats = SnapshotStats { size, ..Default::default() };
        let read = |step: Range<u64>, buf: &mut Vec<u8>| {
            let len = (step.end - step.start) as usize;
            buf.resize(len.next_multiple_of(CHUNK as usize), 0);
            disk.read_at(&mut buf[..len], step.start)?;
            buf[len..].fill(0);
            let chunks = buf.chunks_exact(CHUNK as usize);
            let prepared: Vec<Prepared> = chunks.map(|chunk| prepare(store, chunk, key, None)).collect();
            Ok((step, prepared))
        };
        pipeline::in_order(Steps { disk, size, done: 0, data: 0..0 }, read, |(step, prepared), bytes| {
            stats.changed_bytes += step.end - step.start;
            let chunks = bytes.chunks_exact(CHUNK as usize);
            for ((prepared, chunk), number) in prepared.iter().zip(chunks).zip(step.start / CHUNK..) {
                session.put(prepared, chunk)?;
                manifest.set(&mut session, number, prepared.id)?;
            }
            report.reach(step.end)
        })?;
        let root = manifest.finish(&mut session)?;
        stats.stored_bytes = session.appended();
        report.check()?;
        let snapshot = publish(self, session, &[root])?.swap_remove(0);
        report.finish();
        Ok((snapshot, stats))
    }
}

/// The parts of a disk that may hold data, in pieces of whole chunks.
struct Steps<'d> {
    disk: &'d Disk,
    /// How much of the disk there is to be read.
    size: u64,
    /// All before is done or no data.
    done: u64,
    /// What is left of the range of data that was found last.
    data: Range<u64>,
}

impl Iterator for Steps<'_> {
    type Item = Result<Range<u64>>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.data.is_empty() {
            let data = match self.disk.next_data(self.done) {
                Ok(data) => data.filter(|data| data.start < self.size)?,
                Err(error) => return Some(Err(error)),
            };
            // Ranges may meet within a chunk: whole chunks are read, and none twice.
            let end = data.end.next_multiple_of(CHUNK).min(self.size);
            self.data = (data.start / CHUNK * CHUNK).max(self.done)..end;
            self.done = end;
        }
        let step = self.data.start..self.data.end.min(self.data.start + Reporter::STEP);
        self.data.start = step.end;
        Some(Ok(step))
    }
}

/// A manifest in the making. The ids of chunks come in ascending order; the others are those of a base.
pub(crate) struct Manifest<'b> {
    size: u64,
    base: Option<&'b Snapshot>,
    key: Option<&'b EncryptionKey>,
    leaves: Vec<Id>,
    /// The leaf that ids are coming in for.
    current: Option<(usize, Vec<Id>)>,
}

impl<'b> Manifest<'b> {
    /// A manifest of chunks that are encrypted with this key, and the base's with them.
    pub(crate) fn new(size: u64, base: Option<&'b Snapshot>, key: Option<&'b EncryptionKey>) -> Self {
        let mut leaves = base.map_or_else(Vec::new, |base| base.root.leaves.clone());
        leaves.resize(format::leaf_count(size) as usize, HOLE);
        Self { size, base, key, leaves, current: None }
    }

    pub(crate) fn set(&mut self, session: &mut Session<'_>, number: u64, id: Id) -> Result<()> {
        let (leaf, within) = ((number / LEAF_IDS as u64) as usize, (number % LEAF_IDS as u64) as usize);
        if self.current.as_ref().is_none_or(|(current, _)| *current != leaf) {
            self.finish_leaf(session)?;
            let ids = match self.base {
                Some(base) => base.leaf_ids(leaf)?,
                None => vec![HOLE; LEAF_IDS],
            };
            self.current = Some((leaf, ids));
        }
        if let Some((_, ids)) = &mut self.current {
            ids[within] = id;
        }
        Ok(())
    }

    fn finish_leaf(&mut self, session: &mut Session<'_>) -> Result<()> {
        if let Some((leaf, ids)) = self.current.take() {
            let hole = ids.iter().all(|id| *id == HOLE);
            self.leaves[leaf] = if hole { HOLE } else { session.put_leaf(&ids)? };
        }
        Ok(())
    }

    pub(crate) fn finish(mut self, session: &mut Session<'_>) -> Result<NewRoot> {
        self.finish_leaf(session)?;
        let mut bytes = format::encode_root(self.size, &self.leaves, None);
        if let Some(key) = self.key {
            let wrapped = key.wrap(&KeyContext::snapshot(&bytes))?;
            bytes = format::encode_root(self.size, &self.leaves, Some(&wrapped));
        }
        Ok(NewRoot { bytes, key: self.key.cloned() })
    }
}

/// A root that is still to be published.
pub(crate) struct NewRoot {
    bytes: Vec<u8>,
    key: Option<EncryptionKey>,
}

/// Makes durable what a session has stored, and then the snapshots with these roots: all of them or none.
pub(crate) fn publish(store: &Store, mut session: Session<'_>, roots: &[NewRoot]) -> Result<Vec<Snapshot>> {
    session.finish(|inner| {
        let mut new = Vec::new();
        let publish = |NewRoot { bytes, key }: &NewRoot| {
            let digest = Digest::of(bytes);
            if !inner.has_root(&digest, bytes) {
                new.push(digest);
            }
            let root = inner.publish_root(bytes, key.as_ref())?;
            Ok(Snapshot::new(Arc::clone(&store.0), root))
        };
        let published: Result<Vec<Snapshot>> = roots.iter().map(publish).collect();
        published.map_err(|error| {
            let left = unpublish(inner, &new).unwrap_or_else(|error| {
                tracing::warn!(%error, "cannot undo a failed snapshot");
                true
            });
            Unpublished { error, left }
        })
    })
}

/// Removes roots whose objects are to be removed next: a crash must not bring them back. Returns whether one is left, as
/// somebody has found and opened it meanwhile.
fn unpublish(inner: &Inner, new: &[Digest]) -> Result<bool> {
    if new.is_empty() {
        return Ok(false);
    }
    // Nobody opens one from here until it is gone.
    let roots = lock(&inner.roots);
    let is_open = |digest: &Digest| roots.get(digest).is_some_and(|root| root.strong_count() > 0);
    let (open, gone): (Vec<&Digest>, Vec<&Digest>) = new.iter().partition(|digest| is_open(digest));
    for path in gone.into_iter().map(|digest| inner.root_path(digest)).filter(|path| path.exists()) {
        fs::remove_file(&path).map_err(|e| Error::io(e, format!("cannot remove {}", path.display())))?;
    }
    drop(roots);
    sync_dir(&inner.snapshots_dir())?;
    Ok(!open.is_empty())
}

/// Whether all bytes are zero; in words, so that it is as fast as reading them.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    bytes.chunks(256).all(|part| part.iter().fold(0, |all, byte| all | byte) == 0)
}
