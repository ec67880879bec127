//! States that somebody has asked to watch, of things that are looked up when they are asked for.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::watch::{Publisher, Watch};

/// The states of those things of a kind that somebody watches, by their ids.
#[derive(Debug)]
pub(crate) struct Watched<Id, S>(Mutex<BTreeMap<Id, Arc<Publisher<S>>>>);

impl<Id, S> Default for Watched<Id, S> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<Id: Copy + Ord, S: Clone + PartialEq + Send> Watched<Id, S> {
    // Nothing that is done under the lock panics half way.
    fn lock(&self) -> MutexGuard<'_, BTreeMap<Id, Arc<Publisher<S>>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Watches one, which is in this state. Whoever may have missed a change between the look at it and this
    /// [tells](Self::tell) of it.
    pub(crate) fn watch(&self, id: Id, now: S) -> Watch<S> {
        self.lock().entry(id).or_insert_with(|| Arc::new(Publisher::new(now))).watch()
    }

    /// Tells those who watch one, if anybody does, of the state that it has come to, which `look` finds. Nobody watches
    /// it any more when that is the last. Nothing is held that they could want.
    pub(crate) fn tell(&self, id: Id, look: impl FnOnce(&S) -> S, is_last: impl FnOnce(&S) -> bool) {
        let Some(publisher) = self.lock().get(&id).cloned() else { return };
        // Looked at there, so that of two who tell the later one tells the later state.
        publisher.update(|told| {
            let now = look(told);
            now != std::mem::replace(told, now.clone())
        });
        if is_last(&publisher.get()) {
            self.lock().remove(&id);
        }
    }
}
