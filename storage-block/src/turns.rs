//! Who stores and who sweeps: many store at once, and nobody does while somebody sweeps.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};

use crate::store::lock;
use crate::{Error, ErrorKind, Result};

/// Whose turn it is.
#[derive(Debug, Default)]
pub(crate) struct Turns {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// The threads on which somebody has begun to store.
    storing: Vec<ThreadId>,
    /// Sweeps that wait for those who store.
    waiting: usize,
    /// The thread that sweeps, as far as is known: who holds a sweep may hand it on.
    sweeping: Option<ThreadId>,
}

/// Somebody stores, until it is dropped.
#[derive(Debug)]
pub(crate) struct Storing {
    turns: Arc<Turns>,
    began_on: ThreadId,
}

/// Somebody sweeps, until it is dropped.
#[derive(Debug)]
pub(crate) struct Sweeping(Arc<Turns>);

impl Turns {
    /// Waits for a sweep under way, and for those that wait, so that these have their turn some time. What is stored
    /// while this thread stores already, as who is told of its progress may do, waits for none of them: they wait for
    /// it.
    pub(crate) fn store(self: &Arc<Self>) -> Storing {
        let this = thread::current().id();
        self.store_unless(|state| {
            state.sweeping.is_some() || (state.waiting > 0 && !state.storing.contains(&this))
        })
    }

    /// The same ahead of sweeps that wait, for who cannot wait until all others have stored what they store.
    pub(crate) fn store_soon(self: &Arc<Self>) -> Storing {
        self.store_unless(|state| state.sweeping.is_some())
    }

    fn store_unless(self: &Arc<Self>, not_now: impl Fn(&State) -> bool) -> Storing {
        let mut state = lock(&self.state);
        while not_now(&state) {
            state = self.wait(state);
        }
        let began_on = thread::current().id();
        state.storing.push(began_on);
        drop(state);
        Storing { turns: Arc::clone(self), began_on }
    }

    /// Waits until nobody stores.
    pub(crate) fn sweep(self: &Arc<Self>) -> Sweeping {
        let mut state = lock(&self.state);
        state.waiting += 1;
        while state.sweeping.is_some() || !state.storing.is_empty() {
            state = self.wait(state);
        }
        state.waiting -= 1;
        state.sweeping = Some(thread::current().id());
        drop(state);
        Sweeping(Arc::clone(self))
    }

    /// An error on the thread that sweeps: it would wait for itself.
    pub(crate) fn check_not_here(&self) -> Result<()> {
        if lock(&self.state).sweeping == Some(thread::current().id()) {
            return Err(Error::new(ErrorKind::InUse, "this thread holds a sweep of the store"));
        }
        Ok(())
    }

    /// Whether a sweep waits for those who store.
    #[cfg(test)]
    pub(crate) fn sweep_waits(&self) -> bool {
        lock(&self.state).waiting > 0
    }

    fn wait<'s>(&self, state: MutexGuard<'s, State>) -> MutexGuard<'s, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }
}

impl Storing {
    /// Who goes on is this thread, from now on.
    pub(crate) fn move_here(&mut self) {
        let this = thread::current().id();
        let mut state = lock(&self.turns.state);
        if let Some(thread) = state.storing.iter_mut().find(|thread| **thread == self.began_on) {
            *thread = this;
        }
        self.began_on = this;
    }
}

impl Drop for Storing {
    fn drop(&mut self) {
        let storing = &mut lock(&self.turns.state).storing;
        if let Some(at) = storing.iter().position(|thread| *thread == self.began_on) {
            storing.swap_remove(at);
        }
        self.turns.changed.notify_all();
    }
}

impl Sweeping {
    /// Who goes on is this thread, from now on.
    pub(crate) fn move_here(&self) {
        lock(&self.0.state).sweeping = Some(thread::current().id());
    }
}

impl Drop for Sweeping {
    fn drop(&mut self) {
        lock(&self.0.state).sweeping = None;
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_goes_on_with_a_sweep_is_who_must_not_store() {
        let turns = Arc::<Turns>::default();
        let sweep = turns.sweep();
        let check = || turns.check_not_here().map_err(|error| error.kind());
        assert_eq!(check(), Err(ErrorKind::InUse));
        let elsewhere = thread::scope(|scope| {
            let go_on = || {
                sweep.move_here();
                check()
            };
            scope.spawn(go_on).join().unwrap()
        });
        assert_eq!((check(), elsewhere), (Ok(()), Err(ErrorKind::InUse)));
        drop(sweep);
        drop(turns.store());
    }
}
