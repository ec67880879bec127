//! How a volume stands still for a snapshot while it goes on being written.

use std::collections::{BTreeSet, HashMap};
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};

use crate::Result;
use crate::store::lock;

/// Chunks kept for the snapshot; a writer that would make it more waits.
const KEPT: usize = 256;

/// The chunks that a snapshot under way has not read yet. Whoever writes to one of them keeps its bytes
/// first, and the snapshot takes those.
#[derive(Debug, Default)]
pub(crate) struct Freeze {
    active: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    unread: BTreeSet<u64>,
    kept: HashMap<u64, Vec<u8>>,
}

/// Ends a freeze, however the snapshot ends.
pub(crate) struct Frozen<'f>(&'f Freeze);

impl Freeze {
    /// Begins a freeze of these chunks. There is no other, and nobody writes at this moment.
    pub(crate) fn begin(&self, chunks: impl Iterator<Item = u64>) -> Frozen<'_> {
        lock(&self.state).unread.extend(chunks);
        self.active.store(true, Ordering::Release);
        Frozen(self)
    }

    /// Called before chunks change, with what reads one; it costs a load when there is no freeze.
    pub(crate) fn keep(
        &self,
        chunks: RangeInclusive<u64>,
        read: impl Fn(u64) -> Result<Vec<u8>>,
    ) -> Result<()> {
        if !self.active.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut state = lock(&self.state);
        while let Some(chunk) = state.unread.range(chunks.clone()).next().copied() {
            if state.kept.len() >= KEPT {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let bytes = read(chunk)?;
            state.unread.remove(&chunk);
            state.kept.insert(chunk, bytes);
        }
        Ok(())
    }
}

impl Frozen<'_> {
    /// What a chunk held when the freeze began; each is taken once.
    pub(crate) fn take(&self, chunk: u64, read: impl Fn(u64) -> Result<Vec<u8>>) -> Result<Vec<u8>> {
        let mut state = lock(&self.0.state);
        if let Some(bytes) = state.kept.remove(&chunk) {
            self.0.changed.notify_all();
            return Ok(bytes);
        }
        // With the lock held, so that nobody writes to it until it is read.
        let bytes = read(chunk)?;
        state.unread.remove(&chunk);
        Ok(bytes)
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        self.0.active.store(false, Ordering::Release);
        *lock(&self.0.state) = State::default();
        self.0.changed.notify_all();
    }
}
