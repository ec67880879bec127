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
        self.pass_unless(&AtomicBool::new(false), || ())
    }

    /// The same for a worker that may be sent home: false then, too. Whoever does that calls [`nudge`](Self::nudge).
    /// Before it stands still it does what `settle` says.
    pub(crate) fn pass_unless(&self, sent_home: &AtomicBool, settle: impl FnOnce()) -> bool {
        let sent_home = || sent_home.load(Ordering::Acquire);
        if self.is_open() {
            return !sent_home();
        }
        // Not at the machine's end, which leaves everything as it is.
        if self.lock().order == Order::Hold {
            settle();
        }
        let mut state = self.lock();
        state.held += 1;
        self.changed.notify_all();
        while state.order == Order::Hold && !sent_home() {
            state = self.wait(state);
        }
        state.held -= 1;
        state.order == Order::Run && !sent_home()
    }

    /// Has those who wait at the gate look whether they are sent home.
    pub(crate) fn nudge(&self) {
        drop(self.lock());
        self.changed.notify_all();
    }

    /// Counts one more worker of a machine that has workers, unless that ends.
    pub(crate) fn join_late(&self) -> bool {
        let mut state = self.lock();
        let goes_on = !matches!(state.order, Order::End(_));
        state.workers += usize::from(goes_on);
        goes_on
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::AtomicUsize;
    use std::thread::{self, JoinHandle};

    /// Workers that count while the gate is open, and who was the last to leave.
    struct Crew {
        gate: Arc<Gate>,
        counted: Arc<AtomicUsize>,
        workers: Vec<JoinHandle<Option<ExitCause>>>,
    }

    fn crew() -> Crew {
        let (gate, counted) = (Arc::new(Gate::new()), Arc::new(AtomicUsize::new(0)));
        let workers = (0..3)
            .map(|_| {
                gate.join();
                let (gate, counted) = (gate.clone(), counted.clone());
                thread::spawn(move || {
                    while gate.pass() {
                        counted.fetch_add(1, Ordering::SeqCst);
                    }
                    let last = gate.leave();
                    if last.is_some() {
                        gate.over();
                    }
                    last
                })
            })
            .collect();
        Crew { gate, counted, workers }
    }

    impl Crew {
        fn count(&self) -> usize {
            self.counted.load(Ordering::SeqCst)
        }

        fn wait_until_it_counts(&self) {
            let before = self.count();
            while self.count() == before {
                thread::yield_now();
            }
        }

        /// Why it ended, as told to the last worker alone.
        fn end(self) -> Vec<ExitCause> {
            self.workers.into_iter().filter_map(|w| w.join().unwrap()).collect()
        }
    }

    #[test]
    fn nobody_works_while_it_is_closed() {
        let crew = crew();
        crew.gate.wait_until_still();
        assert_eq!(crew.count(), 0);
        for _ in 0..100 {
            crew.gate.open();
            crew.wait_until_it_counts();
            crew.gate.close();
            crew.gate.wait_until_still();
            let still = crew.count();
            thread::yield_now();
            assert_eq!(crew.count(), still);
        }
        crew.gate.end(ExitCause::Killed);
        crew.gate.wait_until_over();
        assert_eq!(crew.end(), [ExitCause::Killed]);
    }

    #[test]
    fn the_first_cause_stays_and_nothing_follows_the_end() {
        let crew = crew();
        crew.gate.open();
        crew.wait_until_it_counts();
        crew.gate.close();
        crew.gate.end(ExitCause::PowerOff);
        crew.gate.end(ExitCause::Killed);
        crew.gate.open();
        crew.gate.close();
        // Not for ever, though nobody stands at the gate.
        crew.gate.wait_until_still();
        crew.gate.wait_until_over();
        assert_eq!(crew.end(), [ExitCause::PowerOff]);
    }
}
