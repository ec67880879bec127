//! Where the threads of a machine wait, run and end together.
//!
//! Each worker (a vCPU, a disk) [passes](Gate::pass) the gate before every stretch of work and
//! stands still there while the gate is closed. Whoever closes it wakes the workers from whatever
//! they wait for and knows, when [`Gate::wait_until_still`] returns, that none is at work.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use instance_core::machine::ExitCause;

#[derive(Debug, PartialEq, Eq)]
enum Order {
    Hold,
    Run,
    End(ExitCause),
}

#[derive(Debug)]
struct State {
    order: Order,
    /// Workers that have not left.
    workers: usize,
    /// Those of them that stand at the gate.
    held: usize,
    /// The last worker has left and has said so to everyone.
    over: bool,
}

/// See the [module](self).
#[derive(Debug)]
pub(crate) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
    /// Whether the order is `Run`, to look at without the lock.
    open: AtomicBool,
}

impl Gate {
    /// A closed gate without workers.
    pub(crate) fn new() -> Self {
        let state = State { order: Order::Hold, workers: 0, held: 0, over: false };
        Self { state: Mutex::new(state), changed: Condvar::new(), open: AtomicBool::new(false) }
    }

    /// Counts one more worker. Called before its thread is made.
    pub(crate) fn join(&self) {
        self.lock().workers += 1;
    }

    /// Waits while the gate is closed. False when the machine ends.
    pub(crate) fn pass(&self) -> bool {
        if self.is_open() {
            return true;
        }
        let mut state = self.lock();
        state.held += 1;
        self.changed.notify_all();
        while state.order == Order::Hold {
            state = self.wait(state);
        }
        state.held -= 1;
        state.order == Order::Run
    }

    /// Whether workers may go on; one that may not goes to [`pass`](Self::pass).
    pub(crate) fn is_open(&self) -> bool {
        self.open.load(Ordering::Acquire)
    }

    /// Counts one worker less. The last one is told why the machine ended, publishes it, and then
    /// says that it is [`over`](Self::over).
    pub(crate) fn leave(&self) -> Option<ExitCause> {
        let mut state = self.lock();
        state.workers -= 1;
        self.changed.notify_all();
        match &state.order {
            Order::End(cause) if state.workers == 0 => Some(cause.clone()),
            _ => None,
        }
    }

    /// Says that the machine's end has been published.
    pub(crate) fn over(&self) {
        self.lock().over = true;
        self.changed.notify_all();
    }

    /// Lets the workers go on, unless the machine ends.
    pub(crate) fn open(&self) {
        self.order(Order::Run);
    }

    /// Has the workers come to the gate, unless the machine ends. They must then be woken.
    pub(crate) fn close(&self) {
        self.order(Order::Hold);
    }

    /// Ends the machine; the first cause stays. The workers must then be woken.
    pub(crate) fn end(&self, cause: ExitCause) {
        self.order(Order::End(cause));
    }

    fn order(&self, order: Order) {
        let mut state = self.lock();
        if !matches!(state.order, Order::End(_)) {
            self.open.store(order == Order::Run, Ordering::Release);
            state.order = order;
            self.changed.notify_all();
        }
    }

    /// Waits until every worker stands at the gate or has left.
    pub(crate) fn wait_until_still(&self) {
        let mut state = self.lock();
        while state.held < state.workers && !state.over {
            state = self.wait(state);
        }
    }

    /// Waits until [`over`](Self::over).
    pub(crate) fn wait_until_over(&self) {
        let mut state = self.lock();
        while !state.over {
            state = self.wait(state);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }
}
