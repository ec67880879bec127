//! Snapshots of volumes that go on being written.

use std::fmt;
use std::sync::{Arc, RwLockWriteGuard, Weak};
use std::time::{Duration, Instant};

use ami_core::Digest;

use super::{Changes, Gate, Inner, Volume};
use crate::format::{BLOCK, CHUNK, Closing};
use crate::freeze::{Chunks, Frozen, Span, Wanted};
use crate::keys::EncryptionKey;
use crate::store::{self, lock, read, write};
use crate::turns::Storing;
use crate::{Error, ErrorKind, Progress, Result, Snapshot, SnapshotStats, Store};

impl Volume {
    /// Makes a snapshot of the volume as it is at one instant, written but not yet flushed bytes with it.
    ///
    /// Only chunks with changed blocks are read, hashed and, if the store has no such chunk, stored; all
    /// other parts of the manifest are those of the last snapshot that was made of the volume, if it
    /// is in this store still, else those of the snapshot the volume began as. Which was the last is known for as long as
    /// the volume is open, and when it is opened again if it was closed with everything flushed. In a store that is not the
    /// one of the volume's snapshot, or under another key than the snapshot's, the first stores everything.
    ///
    /// The volume goes on meanwhile. Writers stand still for the instant itself, which takes as long for a large volume
    /// as for a small one; [`SnapshotStats::paused`] says how long. Who then writes to a chunk that is still to be
    /// read sets its 64 KiB aside first, and waits only when 16 MiB are set aside that are not stored yet.
    ///
    /// # Errors
    ///
    /// As [`Store::import`], and [`Io`](crate::ErrorKind::Io) if a flush of the volume has failed since it was opened.
    pub fn snapshot(&self, store: &Store) -> Result<(Snapshot, SnapshotStats)> {
        self.snapshot_with(store, &mut |_| ())
    }

    /// The same, with somebody who is told how far it is and may cancel it.
    ///
    /// ```
    /// use storage_block::{ErrorKind, Store, Volume};
    ///
    /// # let dir = tempfile::tempdir()?;
    /// let store = Store::open(dir.path().join("store"))?;
    /// let volume = Volume::create(&dir.path().join("vol"), None, 1 << 30)?;
    /// volume.disk().write_at(&[7; 8 << 20], 0)?;
    /// let mut seen = 0;
    /// volume.snapshot_with(&store, &mut |progress| seen = progress.done)?;
    /// assert_eq!(seen, 8 << 20);
    ///
    /// volume.disk().write_at(&[8; 8 << 20], 0)?;
    /// let ended = volume.snapshot_with(&store, &mut |progress| progress.cancel());
    /// assert_eq!(ended.err().map(|error| error.kind()), Some(ErrorKind::Cancelled));
    /// assert_eq!(store.snapshots()?.len(), 1);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`snapshot`](Self::snapshot), and [`Cancelled`](crate::ErrorKind::Cancelled).
    pub fn snapshot_with(
        &self,
        store: &Store,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<(Snapshot, SnapshotStats)> {
        store.0.turns.check_not_here()?;
        Ok(Self::freeze([self], store).store(progress)?.swap_remove(0))
    }

    /// Holds on to what several volumes are at one instant, for snapshots of them all in `store`.
    ///
    /// A thread that holds a [sweep](crate::Sweep) of the store must not: it would wait for itself, and for ever.
    ///
    /// No write is in one of the snapshots that began after a write that is missing in another had returned. It waits
    /// for other snapshots of these volumes; if one of them is named twice there is one snapshot of it, and it is
    /// returned twice.
    ///
    /// ```
    /// use storage_block::{Store, Volume};
    ///
    /// # let dir = tempfile::tempdir()?;
    /// let store = Store::open(dir.path().join("store"))?;
    /// let make = |name| Volume::create(&dir.path().join(name), None, 1 << 30);
    /// let (data, journal) = (make("data")?, make("journal")?);
    /// data.disk().write_at(b"old", 0)?;
    ///
    /// let frozen = Volume::freeze([&data, &journal], &store);
    /// data.disk().write_at(b"new", 0)?; // it goes on
    /// println!("writers stood still for {:?}", frozen.paused());
    /// let snapshots = frozen.store(&mut |_| ())?;
    /// let mut found = [0; 3];
    /// snapshots[0].0.disk().read_at(&mut found, 0)?;
    /// assert_eq!((&found, snapshots.len()), (b"old", 2));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn freeze<'v>(volumes: impl IntoIterator<Item = &'v Self>, store: &Store) -> FrozenVolumes {
        let named: Vec<&Arc<Inner>> = volumes.into_iter().map(|volume| &volume.0).collect();
        let mut once = named.clone();
        // In an order of their own, so that two who freeze the same volumes never wait for each other.
        once.sort_by_key(|inner| Arc::as_ptr(inner));
        once.dedup_by_key(|inner| Arc::as_ptr(inner));
        once.iter().for_each(|inner| inner.freeze.take_turn());
        // Storing waits for a sweep under way, and nobody should have to set chunks aside for so long.
        let turn = store.0.turns.store_soon();

        let lasts: Vec<Option<Snapshot>> = once.iter().map(|inner| inner.last_in(store)).collect();
        let fresh: Vec<_> = once.iter().map(|_| Arc::<Changes>::default()).collect();

        let begun = Instant::now();
        let mut gates: Vec<_> = once.iter().map(|inner| write(&inner.gate)).collect();
        let begin = |(((inner, gate), last), fresh): (((&&Arc<Inner>, &mut GateGuard<'_>), Option<_>), _)| {
            let before = gate.changes.replace(fresh);
            let (wanted, base) = inner.wanted(store, last, before.as_ref());
            let frozen = inner.freeze.begin(Span { size: inner.size(), wanted });
            (frozen, base, before)
        };
        let frozen: Vec<_> = once.iter().zip(&mut gates).zip(lasts).zip(fresh).map(begin).collect();
        drop(gates);
        let paused = begun.elapsed();

        let order = named.iter().map(|inner| once.iter().position(|other| Arc::ptr_eq(inner, other)));
        let order = order.flatten().collect();
        let volumes = once.into_iter().zip(frozen).map(|(inner, (frozen, base, before))| {
            let volume = Arc::clone(inner);
            FrozenVolume { volume, frozen, base, before, stored: false }
        });
        let volumes = volumes.collect();
        FrozenVolumes { store: store.clone(), volumes, order, paused, turn }
    }
}

/// Volumes at one instant, by [`Volume::freeze`].
///
/// While it lives, writers set aside what they are about to change, and wait when that is 16 MiB in a volume: it should
/// be stored soon, or dropped, which lets go of the instant. Another snapshot of the same volumes waits for its end,
/// also on the thread that holds it, and so do sweeps of the store, and imports that come after such a sweep, but for
/// those on the thread that froze them, or by then stores them.
///
/// ```
/// use storage_block::{FrozenVolumes, Result, Snapshot};
///
/// fn total(frozen: FrozenVolumes) -> Result<(Vec<Snapshot>, u64)> {
///     let made = frozen.store(&mut |progress| println!("{} of {}", progress.done, progress.total))?;
///     let stored = made.iter().map(|(_, stats)| stats.stored_bytes).sum();
///     Ok((made.into_iter().map(|(snapshot, _)| snapshot).collect(), stored))
/// }
/// ```
pub struct FrozenVolumes {
    pub(super) store: Store,
    pub(super) volumes: Vec<FrozenVolume>,
    /// The place in `volumes` of each that was named.
    pub(super) order: Vec<usize>,
    paused: Duration,
    pub(super) turn: Storing,
}

pub(super) struct FrozenVolume {
    pub(super) volume: Arc<Inner>,
    pub(super) frozen: Arc<Frozen>,
    /// The snapshot that has what is not stored anew.
    pub(super) base: Option<Snapshot>,
    /// What was written before the freeze, since the last snapshot.
    before: Option<Arc<Changes>>,
    /// There is a new last snapshot.
    stored: bool,
}

impl FrozenVolume {
    /// Notes what the next snapshot has to be told apart from.
    pub(super) fn is_stored(&mut self, snapshot: &Snapshot) {
        let last = Last { store: Arc::downgrade(&snapshot.store), digest: snapshot.digest() };
        *lock(&self.volume.last) = Some(last);
        self.stored = true;
    }
}

impl Drop for FrozenVolume {
    fn drop(&mut self) {
        if !self.stored {
            // As if there had been no freeze: what was written before and since differs from the last snapshot.
            let mut gate = write(&self.volume.gate);
            match (&self.before, &gate.changes) {
                (Some(before), Some(changes)) => changes.merge(before),
                _ => gate.changes = None,
            }
        }
        self.volume.freeze.end();
    }
}

type GateGuard<'g> = RwLockWriteGuard<'g, Gate>;

/// The last snapshot that was made of a volume. It is not held open, so that it goes when nobody wants it any more.
#[derive(Debug)]
pub(super) struct Last {
    store: Weak<store::Inner>,
    digest: Digest,
}

impl fmt::Debug for FrozenVolumes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dirs = self.volumes.iter().map(|frozen| &frozen.volume.dir);
        f.debug_struct("FrozenVolumes").field("volumes", &dirs.collect::<Vec<_>>()).finish_non_exhaustive()
    }
}

impl FrozenVolumes {
    /// How long writers stood still for the instant.
    pub fn paused(&self) -> Duration {
        self.paused
    }
}

impl Inner {
    /// Goes on where the volume was closed.
    pub(super) fn resume(&self, closing: Closing, store: &Store) {
        let changes = Changes::default();
        for (chunk, blocks) in closing.changed {
            changes.mark_chunk(chunk, blocks);
        }
        *lock(&self.last) = Some(Last { store: Arc::downgrade(&store.0), digest: closing.last });
        write(&self.gate).changes = Some(Arc::new(changes));
    }

    /// Leaves word of what was written since the last snapshot, so that the next need not look for it.
    pub(super) fn close(&self) {
        let Some(files) = self.files.get() else { return };
        let (gate, last) = (read(&self.gate), lock(&self.last));
        let (Some(changes), Some(last)) = (&gate.changes, &*last) else { return };
        let changed = changes.chunks().map(|chunk| (chunk, changes.of_chunk(chunk))).collect();
        if let Err(error) = lock(&files.log).close(&Closing { last: last.digest, changed }) {
            tracing::debug!(volume = %self.dir.display(), %error, "the next snapshot will compare more");
        }
    }

    /// The last snapshot, if there was one in this store and still is.
    fn last_in(&self, store: &Store) -> Option<Snapshot> {
        let digest = {
            let last = lock(&self.last);
            let last = last.as_ref()?;
            Weak::ptr_eq(&last.store, &Arc::downgrade(&store.0)).then_some(last.digest)?
        };
        // Where it is gone, or damaged, all that has changed since the volume began is stored.
        let root = store.0.open_root(&digest).ok()?;
        root.unlock(|_, _| self.key.clone().ok_or_else(|| Error::new(ErrorKind::KeyUnavailable, "no key")))
            .ok()?;
        Some(Snapshot::new(Arc::clone(&store.0), root))
    }

    /// What a snapshot of the volume in `store` wants of it, and which has the rest. Nobody writes.
    fn wanted(
        &self,
        store: &Store,
        last: Option<Snapshot>,
        changes: Option<&Arc<Changes>>,
    ) -> (Wanted, Option<Snapshot>) {
        if let (Some(last), Some(changes)) = (last, changes) {
            return (Wanted::Since(Arc::clone(changes)), Some(last));
        }
        // What the snapshot has stored is of no use in another store, nor under another key.
        let fit = |base: &Snapshot| {
            Arc::ptr_eq(&base.store, &store.0) && EncryptionKey::are_same(base.root.key(), self.key.as_ref())
        };
        match &self.base {
            Some(base) if !fit(base) => (Wanted::Whole, None),
            base => (Wanted::Changed, base.clone()),
        }
    }
}

impl Chunks for Inner {
    fn changed(&self, chunk: u64, span: &Span) -> u16 {
        let at = chunk * CHUNK;
        // There was nothing yet where the volume has grown since.
        if at >= span.size {
            return 0;
        }
        let changed = match &span.wanted {
            Wanted::Since(changes) => return changes.of_chunk(chunk),
            Wanted::Changed => return self.map.changed_blocks(chunk),
            Wanted::Whole => self.map.changed_blocks(chunk),
        };
        let in_base = |base: &Snapshot| match base.next_stored(at) {
            Ok(found) => found.is_some_and(|found| found.start < at + CHUNK),
            // Reading it will say what is wrong.
            Err(_) => true,
        };
        let any = changed != 0 || self.base.as_ref().is_some_and(in_base);
        let blocks = (span.size - at).min(CHUNK) / BLOCK;
        if any { u16::MAX >> (CHUNK / BLOCK - blocks) } else { 0 }
    }

    fn read(&self, chunk: u64, span: &Span) -> Result<Vec<u8>> {
        let mut bytes = vec![0; CHUNK as usize];
        let at = chunk * CHUNK;
        let len = (span.size - at).min(CHUNK) as usize;
        Self::read(self, &mut bytes[..len], at)?;
        Ok(bytes)
    }
}
