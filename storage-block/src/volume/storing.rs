//! How what is frozen of volumes is stored.

use std::collections::{HashMap, VecDeque};

use super::Inner;
use super::snapshot::{FrozenVolume, FrozenVolumes};
use crate::format::{BLOCK, CHUNK, HOLE, Id, LEAF_IDS, leaf_count};
use crate::freeze::{Chunks, Frozen, Kept, Wanted};
use crate::import::{Manifest, publish};
use crate::progress::Reporter;
use crate::session::{Prepared, Session, Was, prepare};
use crate::{Progress, Result, Snapshot, SnapshotStats, pipeline, store};

impl FrozenVolumes {
    /// Makes the snapshots, one volume after the other and all durable together: all are there or none is,
    /// whatever fails, short of a crash in the last moment. In the order in which the volumes were named.
    ///
    /// # Errors
    ///
    /// As [`Volume::snapshot_with`](crate::Volume::snapshot_with).
    pub fn store(mut self, progress: &mut dyn FnMut(Progress)) -> Result<Vec<(Snapshot, SnapshotStats)>> {
        self.turn.move_here();
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
            pipeline::in_order(Batches::of(source), take, |taken, _| {
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
        let stats = SnapshotStats { size: frozen.span.size, paused: self.paused(), ..Default::default() };
        Work { source: Source { volume, frozen, base }, early: HashMap::new(), stats }
    }
}

/// Chunks that are taken together: enough that handing them on costs little, and few enough for every processor to
/// have some.
const BATCH: usize = 8;

/// Batches that are fetched before they are taken, so that nobody waits for a disk that does one thing after the other.
const AHEAD: usize = 8;

/// The chunks that may have to be stored, in batches.
struct Batches<'f> {
    source: Source<'f>,
    candidates: Box<dyn Iterator<Item = u64> + Send + 'f>,
    fetched: VecDeque<Vec<u64>>,
}

impl<'f> Batches<'f> {
    fn of(source: Source<'f>) -> Self {
        Self { source, candidates: source.candidates(), fetched: VecDeque::new() }
    }
}

impl Iterator for Batches<'_> {
    type Item = Result<Vec<u64>>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.fetched.len() <= AHEAD {
            let batch: Vec<u64> = self.candidates.by_ref().take(BATCH).collect();
            if batch.is_empty() {
                break;
            }
            batch.iter().for_each(|chunk| self.source.fetch(*chunk));
            self.fetched.push_back(batch);
        }
        self.fetched.pop_front().map(Ok)
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

    /// Has what a chunk is read from besides the overlay on its way from the disk.
    fn fetch(self, chunk: u64) {
        let changed = self.volume.map.changed_blocks(chunk);
        if let (Some(base), true) = (&self.volume.base, changed != u16::MAX) {
            base.fetch(chunk);
        }
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
