//! Snapshots of volumes that go on being written.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, RwLockWriteGuard, Weak};
use std::time::{Duration, Instant};

use ami_core::Digest;

use super::{Changes, Gate, Inner, Volume};
use crate::format::{BLOCK, CHUNK, HOLE, Id, LEAF_IDS, leaf_count};
use crate::freeze::{Chunks, Frozen, Kept, Span, Wanted};
use crate::import::{Manifest, publish};
use crate::keys::EncryptionKey;
use crate::progress::Reporter;
use crate::session::{Prepared, Session, Was, prepare};
use crate::store::{self, lock, write};
use crate::turns::Storing;
use crate::{Error, ErrorKind, Progress, Result, Snapshot, SnapshotStats, Store, pipeline};

impl Volume {
    /// Makes a snapshot of the volume as it is at one instant, written but not yet flushed bytes with it.
    ///
    /// Only chunks with changed blocks are read, hashed and, if the store has no such chunk, stored; all
    /// other parts of the manifest are those of the last snapshot that was made of the volume since it was opened, if it
    /// is in this store still, else those of the snapshot the volume began as. In a store that is not the one of
    /// the volume's snapshot, or under another key than the snapshot's, the first stores everything.
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
        Ok(Self::freeze([self], store).store(progress)?.swap_remove(0))
    }

    /// Holds on to what several volumes are at one instant, for snapshots of them all in `store`.
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
/// also on the thread that holds it, and so do sweeps of the store, and imports that come after such a sweep.
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
    store: Store,
    volumes: Vec<FrozenVolume>,
    /// The place in `volumes` of each that was named.
    order: Vec<usize>,
    paused: Duration,
    turn: Storing,
}

struct FrozenVolume {
    volume: Arc<Inner>,
    frozen: Arc<Frozen>,
    /// The snapshot that has what is not stored anew.
    base: Option<Snapshot>,
    /// What was written before the freeze, since the last snapshot.
    before: Option<Arc<Changes>>,
    /// There is a new last snapshot.
    stored: bool,
}

impl FrozenVolume {
    /// Notes what the next snapshot has to be told apart from.
    fn is_stored(&mut self, snapshot: &Snapshot) {
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

    /// Makes the snapshots, one volume after the other and all durable together: all are there or none is,
    /// whatever fails, short of a crash in the last moment. In the order in which the volumes were named.
    ///
    /// # Errors
    ///
    /// As [`Volume::snapshot_with`].
    pub fn store(mut self, progress: &mut dyn FnMut(Progress)) -> Result<Vec<(Snapshot, SnapshotStats)>> {
        self.check_durable()?;
        let mut session = Session::begin_in(&self.store.0, &self.turn);
        let mut works: Vec<Work<'_>> = self.volumes.iter().map(|frozen| self.work(frozen)).collect();
        let chunks: usize = works.iter().map(|work| work.source.candidates().count()).sum();
        let mut report = Reporter::begin(chunks as u64 * CHUNK, progress)?;
        let (mut roots, mut done) = (Vec::new(), 0);
        for at in 0..works.len() {
            let (source, store) = (works[at].source, session.store());
            let mut manifest =
                Manifest::new(source.frozen.span.size, source.base, source.volume.key.as_ref());
            let take = |chunks: Vec<u64>, _: &mut Vec<u8>| {
                let taken = chunks.into_iter().map(|chunk| Ok((chunk, source.take(chunk, store)?)));
                taken.collect::<Result<Vec<_>>>()
            };
            pipeline::in_order(Batches(source.candidates()), take, |taken, _| {
                for (chunk, taken) in taken {
                    // Chunks that were changed first after the freeze come on top of those counted.
                    report.step(done)?;
                    done += CHUNK;
                    for work in &mut works {
                        work.relieve(&mut session)?;
                    }
                    if let Some(id) = works[at].put_taken(chunk, taken, &mut session)? {
                        let set = |session: &mut Session<'_>| manifest.set(session, chunk, id);
                        counted(&mut session, &mut works[at].stats, set)?;
                    }
                }
                Ok(())
            })?;
            roots.push(counted(&mut session, &mut works[at].stats, |session| manifest.finish(session))?);
        }
        report.check()?;
        // A flush may have failed since, and the kernel let go of what is read here.
        self.check_durable()?;
        let snapshots = publish(&self.store, session, &roots)?;
        report.finish();
        let stats: Vec<SnapshotStats> = works.iter().map(|work| work.stats).collect();
        for (frozen, snapshot) in self.volumes.iter_mut().zip(&snapshots) {
            frozen.is_stored(snapshot);
        }
        Ok(self.order.iter().map(|at| (snapshots[*at].clone(), stats[*at])).collect())
    }

    /// An error if a flush of one of them has failed: what is read of it may be older than what was written.
    fn check_durable(&self) -> Result<()> {
        self.volumes.iter().try_for_each(|frozen| frozen.volume.check_durable())
    }

    fn work<'f>(&self, frozen: &'f FrozenVolume) -> Work<'f> {
        let FrozenVolume { volume, frozen, base, .. } = frozen;
        let base = base.as_ref();
        let stats = SnapshotStats { size: frozen.span.size, paused: self.paused, ..Default::default() };
        Work { source: Source { volume, frozen, base }, early: HashMap::new(), stats }
    }
}

/// Chunks that are taken together: enough that handing them on costs little, and few enough for every processor to
/// have some.
const BATCH: usize = 8;

struct Batches<I>(I);

impl<I: Iterator<Item = u64>> Iterator for Batches<I> {
    type Item = Result<Vec<u64>>;

    fn next(&mut self) -> Option<Self::Item> {
        let batch: Vec<u64> = self.0.by_ref().take(BATCH).collect();
        (!batch.is_empty()).then_some(Ok(batch))
    }
}

/// What a frozen volume's chunks are taken from, by several threads at once.
#[derive(Clone, Copy)]
struct Source<'f> {
    volume: &'f Inner,
    frozen: &'f Frozen,
    base: Option<&'f Snapshot>,
}

/// A chunk that is ready to be stored.
struct Ready {
    kept: Kept,
    prepared: Prepared,
}

impl<'f> Source<'f> {
    /// The chunks that may have to be stored, in order: those that have to be by what the volume is now, of
    /// which those that were changed since turn out to be none.
    fn candidates(self) -> Box<dyn Iterator<Item = u64> + Send + 'f> {
        let (volume, span) = (self.volume, &self.frozen.span);
        match &span.wanted {
            Wanted::Changed => return Box::new(volume.map.changed_chunks()),
            Wanted::Since(changes) => return Box::new(changes.chunks()),
            Wanted::Whole => {}
        }
        let base = volume.base.as_ref().map_or(&[][..], |base| &base.root.leaves);
        let in_base = |leaf: &u64| base.get(*leaf as usize).is_some_and(|id| *id != HOLE);
        let leaves =
            (0..leaf_count(span.size)).filter(move |leaf| volume.map.has_leaf(*leaf) || in_base(leaf));
        let chunks = leaves.flat_map(|leaf| leaf * LEAF_IDS as u64..(leaf + 1) * LEAF_IDS as u64);
        Box::new(chunks.filter(move |chunk| volume.changed(*chunk, span) != 0))
    }

    /// A chunk as it was, once; `None` if it is as it is in the base, or was stored before its turn.
    fn take(self, chunk: u64, store: &store::Inner) -> Result<Option<Ready>> {
        let kept = self.frozen.take(chunk, self.volume)?;
        kept.map(|kept| self.prepare(chunk, kept, store)).transpose()
    }

    fn prepare(self, chunk: u64, kept: Kept, store: &store::Inner) -> Result<Ready> {
        let was = match self.base {
            Some(base) => Some(Was { id: base.chunk_id(chunk)?, changed: kept.changed }),
            None => None,
        };
        let prepared = prepare(store, &kept.bytes, self.volume.key.as_ref(), was);
        Ok(Ready { kept, prepared })
    }
}

/// A frozen volume that is being stored.
struct Work<'f> {
    source: Source<'f>,
    /// Chunks that were set aside and stored before their turn.
    early: HashMap<u64, Id>,
    stats: SnapshotStats,
}

impl Work<'_> {
    /// Stores what is set aside, where writers are about to wait for room; the volume's turn may be far off.
    fn relieve(&mut self, session: &mut Session<'_>) -> Result<()> {
        for (chunk, kept) in self.source.frozen.take_kept() {
            let ready = self.source.prepare(chunk, kept?, session.store())?;
            let id = self.put(&ready, session)?;
            self.early.insert(chunk, id);
        }
        Ok(())
    }

    /// The id of a chunk, stored; `None` if it is as it is in the base.
    fn put_taken(
        &mut self,
        chunk: u64,
        taken: Option<Ready>,
        session: &mut Session<'_>,
    ) -> Result<Option<Id>> {
        match self.early.remove(&chunk) {
            None => taken.map(|ready| self.put(&ready, session)).transpose(),
            early => Ok(early),
        }
    }

    fn put(&mut self, ready: &Ready, session: &mut Session<'_>) -> Result<Id> {
        let Ready { kept, prepared } = ready;
        self.stats.changed_bytes += u64::from(kept.changed.count_ones()) * BLOCK;
        counted(session, &mut self.stats, |session| session.put(prepared, &kept.bytes))?;
        Ok(prepared.id)
    }
}

/// Does something with the session, and counts what it stores.
fn counted<'s, T>(
    session: &mut Session<'s>,
    stats: &mut SnapshotStats,
    act: impl FnOnce(&mut Session<'s>) -> Result<T>,
) -> Result<T> {
    let before = session.appended();
    let done = act(session);
    stats.stored_bytes += session.appended() - before;
    done
}

impl Inner {
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
