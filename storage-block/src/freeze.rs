//! How a volume stands still for a snapshot while it goes on being written.
//!
//! A freeze begins in the same short time for every volume: it makes an empty list of marks, one for each chunk, and
//! nothing is looked at. From then on whoever is about to change a chunk first sees to it that the chunk is
//! marked as done: at once if the snapshot has no need of it, else by setting its bytes aside. The snapshot goes
//! through the chunks and marks those that it has read itself. A chunk that is not marked is therefore what
//! it was when the freeze began, and so is what the volume's map says of it.

use std::collections::HashMap;
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};

use crate::Result;
use crate::format::LEAF_IDS;
use crate::sparse::Sparse;
use crate::store::{lock, read, write};
use crate::volume::Changes;

/// Chunks set aside for the snapshot; a writer that would make it more waits, which in tests it often does.
const KEPT: usize = if cfg!(test) { 4 } else { 256 };

/// The freeze of a volume, if there is one.
#[derive(Debug, Default)]
pub(crate) struct Freeze {
    /// Whether there is; what a writer looks at when there is none.
    active: AtomicBool,
    current: RwLock<Option<Arc<Frozen>>>,
    /// Somebody makes a snapshot, or is about to.
    taken: Mutex<bool>,
    free: Condvar,
}

/// What a freeze needs to know of its volume.
pub(crate) trait Chunks {
    /// Which blocks of a chunk the snapshot has to look at, by what the volume is now, a bit for each.
    fn changed(&self, chunk: u64, span: &Span) -> u16;

    /// The bytes of a chunk as they are now, filled up with zeroes.
    fn read(&self, chunk: u64, span: &Span) -> Result<Vec<u8>>;
}

/// What is frozen of a volume.
#[derive(Debug)]
pub(crate) struct Span {
    /// The size of the volume at that instant.
    pub(crate) size: u64,
    pub(crate) wanted: Wanted,
}

/// Which chunks the snapshot has to look at.
#[derive(Debug)]
pub(crate) enum Wanted {
    /// All that hold anything.
    Whole,
    /// Those that are not what they are in the snapshot that the volume began as.
    Changed,
    /// Those that were written since the last snapshot, to which nobody adds any more.
    Since(Arc<Changes>),
}

/// A chunk as it was when the freeze began.
#[derive(Debug)]
pub(crate) struct Kept {
    pub(crate) bytes: Vec<u8>,
    /// As [`Chunks::changed`] had it.
    pub(crate) changed: u16,
}

/// One freeze.
#[derive(Debug)]
pub(crate) struct Frozen {
    pub(crate) span: Span,
    marks: Sparse<Box<[AtomicU8]>>,
    state: Mutex<State>,
    /// A chunk is done, there is room again, or the freeze has ended.
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    kept: HashMap<u64, Result<Kept>>,
    /// Writers that are reading a chunk to set it aside.
    reading: usize,
    ended: bool,
}

/// As it was when the freeze began, as far as anybody knows.
const UNREAD: u8 = 0;
/// Somebody reads it; nobody may change it.
const BUSY: u8 = 1;
/// It may change: the snapshot has it, or needs nothing of it.
const DONE: u8 = 2;

impl Freeze {
    /// Waits for a snapshot under way, and holds off every other until [`end`](Self::end).
    pub(crate) fn take_turn(&self) {
        let mut taken = lock(&self.taken);
        while *taken {
            taken = self.free.wait(taken).unwrap_or_else(PoisonError::into_inner);
        }
        *taken = true;
    }

    /// Begins a freeze. It is this caller's turn, and nobody writes at this moment.
    pub(crate) fn begin(&self, span: Span) -> Arc<Frozen> {
        let frozen = Arc::new(Frozen {
            span,
            marks: Sparse::default(),
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        *write(&self.current) = Some(Arc::clone(&frozen));
        self.active.store(true, Ordering::Release);
        frozen
    }

    /// Ends the turn, and the freeze if one has begun.
    pub(crate) fn end(&self) {
        self.active.store(false, Ordering::Release);
        let frozen = write(&self.current).take();
        if let Some(frozen) = frozen {
            frozen.end();
        }
        *lock(&self.taken) = false;
        self.free.notify_one();
    }

    /// Makes chunks ready to be changed, which may take a read or a wait. A freeze that begins later
    /// does not know of it: who changes them asks [`lets`](Self::lets) when no freeze can begin.
    pub(crate) fn keep(&self, chunks: RangeInclusive<u64>, source: &impl Chunks) {
        if let Some(frozen) = self.current() {
            chunks.for_each(|chunk| frozen.keep(chunk, source));
        }
    }

    /// Whether these chunks may change now.
    pub(crate) fn lets(&self, mut chunks: RangeInclusive<u64>) -> bool {
        self.current().is_none_or(|frozen| chunks.all(|chunk| frozen.is_done(chunk)))
    }

    fn current(&self) -> Option<Arc<Frozen>> {
        if self.active.load(Ordering::Acquire) { read(&self.current).clone() } else { None }
    }
}

impl Frozen {
    fn is_done(&self, chunk: u64) -> bool {
        let (leaf, within) = place(chunk);
        self.marks.get(leaf).is_some_and(|marks| marks[within].load(Ordering::Acquire) == DONE)
    }

    fn mark(&self, chunk: u64) -> &AtomicU8 {
        let (leaf, within) = place(chunk);
        &self.marks.get_or_init(leaf, || (0..LEAF_IDS).map(|_| AtomicU8::new(UNREAD)).collect())[within]
    }

    fn claim(&self, chunk: u64, to: u8) -> bool {
        self.mark(chunk).compare_exchange(UNREAD, to, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// Sees to it that a chunk is done, or that the freeze has ended.
    fn keep(&self, chunk: u64, source: &impl Chunks) {
        if self.is_done(chunk) {
            return;
        }
        let changed = source.changed(chunk, &self.span);
        // Nobody changes it before it is done, and what has changed once stays so: it was no different when the
        // freeze began.
        if changed == 0 && self.claim(chunk, DONE) {
            return;
        }
        let mut state = lock(&self.state);
        loop {
            if state.ended || self.is_done(chunk) {
                return;
            }
            // Room first: who has claimed a chunk keeps the snapshot waiting.
            if state.kept.len() + state.reading < KEPT && self.claim(chunk, BUSY) {
                break;
            }
            state = self.wait(state);
        }
        state.reading += 1;
        drop(state);
        // A chunk that cannot be read is the snapshot's trouble, and not the writer's.
        let kept = source.read(chunk, &self.span).map(|bytes| Kept { bytes, changed });
        let mut state = lock(&self.state);
        state.reading -= 1;
        if !state.ended {
            state.kept.insert(chunk, kept);
        }
        self.done(chunk);
    }

    /// What a chunk held when the freeze began, once; `None` if there is nothing in it for the snapshot.
    pub(crate) fn take(&self, chunk: u64, source: &impl Chunks) -> Result<Option<Kept>> {
        let mut state = lock(&self.state);
        while !self.claim(chunk, BUSY) {
            if self.is_done(chunk) {
                let kept = state.kept.remove(&chunk);
                self.changed.notify_all();
                return kept.transpose();
            }
            state = self.wait(state);
        }
        drop(state);
        // It is this chunk that nobody can write to meanwhile, and no other.
        let changed = source.changed(chunk, &self.span);
        let kept = match changed {
            0 => Ok(None),
            changed => source.read(chunk, &self.span).map(|bytes| Some(Kept { bytes, changed })),
        };
        let _state = lock(&self.state);
        self.done(chunk);
        kept
    }

    /// All that is set aside, if it is so much that writers will have to wait.
    pub(crate) fn take_kept(&self) -> Vec<(u64, Result<Kept>)> {
        let mut state = lock(&self.state);
        if state.kept.len() < KEPT / 2 {
            return Vec::new();
        }
        let kept = state.kept.drain().collect();
        self.changed.notify_all();
        kept
    }

    /// With the state locked, so that who is about to wait for it does not miss it.
    fn done(&self, chunk: u64) {
        self.mark(chunk).store(DONE, Ordering::Release);
        self.changed.notify_all();
    }

    fn end(&self) {
        let mut state = lock(&self.state);
        state.ended = true;
        let kept = std::mem::take(&mut state.kept);
        self.changed.notify_all();
        drop(state);
        drop(kept);
    }

    fn wait<'s>(&self, state: MutexGuard<'s, State>) -> MutexGuard<'s, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }
}

fn place(chunk: u64) -> (usize, usize) {
    ((chunk / LEAF_IDS as u64) as usize, (chunk % LEAF_IDS as u64) as usize)
}
