//! The end of somebody's requests, for whom no limit keeps one waiting then.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use super::Limiter;
use crate::store::lock;

/// Whether somebody's requests are to end, and where they wait.
#[derive(Debug, Default)]
pub(crate) struct Stop {
    stopped: AtomicBool,
    /// The limiters at which requests wait, each as often as there are some.
    pub(super) waited_for: Mutex<Vec<Limiter>>,
}

/// A request waits at a limiter, until it is dropped.
pub(super) struct Waiting<'s> {
    stop: &'s Stop,
    limiter: &'s Limiter,
}

impl Stop {
    pub(crate) fn is_set(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }

    /// Requests end that wait for their limits, and none waits from here on.
    pub(crate) fn set(&self) {
        self.stopped.store(true, Ordering::Release);
        // Whoever is not among them yet sees the flag before it waits.
        let waited_for = lock(&self.waited_for).clone();
        waited_for.iter().for_each(Limiter::wake);
    }

    pub(super) fn wait_at<'s>(&'s self, limiter: &'s Limiter) -> Waiting<'s> {
        lock(&self.waited_for).push(limiter.clone());
        Waiting { stop: self, limiter }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut waited_for = lock(&self.stop.waited_for);
        if let Some(at) = waited_for.iter().position(|limiter| limiter.is(self.limiter)) {
            waited_for.swap_remove(at);
        }
    }
}
