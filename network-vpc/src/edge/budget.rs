//! How many sockets of the host's the guests of a network have open together: each conversation with the world outside
//! takes one, and a process has only so many descriptors.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::process::{Resource, getrlimit};

/// The most that is counted of what the host allows, and what is assumed where it has no limit.
const MOST: u64 = 65_536;

/// The sockets of a network.
#[derive(Debug)]
pub(crate) struct Budget {
    most: usize,
    open: AtomicUsize,
}

impl Budget {
    pub(crate) fn new(most: usize) -> Arc<Self> {
        Arc::new(Self { most, open: AtomicUsize::new(0) })
    }

    /// Half of the descriptors that the process may have, as far as they are counted.
    pub(crate) fn of_process() -> usize {
        let descriptors = getrlimit(Resource::Nofile).current.unwrap_or(MOST).min(MOST);
        descriptors as usize / 2
    }

    pub(crate) fn open(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }

    /// The share of an interface, which has none open.
    pub(crate) fn share(self: &Arc<Self>) -> Share {
        Share { budget: self.clone(), own: Arc::default(), clients: Arc::default() }
    }
}

/// What an interface has of a [`Budget`].
#[derive(Debug, Clone)]
pub(crate) struct Share {
    budget: Arc<Budget>,
    own: Arc<AtomicUsize>,
    /// Those of them that clients opened.
    clients: Arc<AtomicUsize>,
}

/// For whose sake a socket is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Opener {
    Guest,
    /// Somebody outside. They have three quarters of the interface's share at most, so that the guest is not cut off.
    Client,
}

impl Share {
    /// A socket, for as long as the permit is kept. An interface gets one while it has fewer than are left for all: one
    /// that takes what it can leaves half of them, and two leave a third.
    pub(crate) fn take(&self, opener: Opener) -> Option<Permit> {
        // Only the interface's own thread takes.
        let own = self.own.load(Ordering::Relaxed);
        if !self.may_have(opener) {
            return None;
        }
        let take = |open| (own < self.budget.most.saturating_sub(open)).then_some(open + 1);
        self.budget.open.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).ok()?;
        self.own.fetch_add(1, Ordering::Relaxed);
        if opener == Opener::Client {
            self.clients.fetch_add(1, Ordering::Relaxed);
        }
        Some(Permit(self.clone(), opener))
    }

    /// Whether one more would be within what an opener may have of the share, if the interface took all of that.
    pub(crate) fn may_have(&self, opener: Opener) -> bool {
        let left = self.budget.most.saturating_sub(self.budget.open());
        let share = (self.own.load(Ordering::Relaxed) + left) / 2;
        opener == Opener::Guest || self.clients.load(Ordering::Relaxed) < share - share / 4
    }
}

/// That a socket is open.
#[derive(Debug)]
pub(crate) struct Permit(Share, Opener);

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.own.fetch_sub(1, Ordering::Relaxed);
        if self.1 == Opener::Client {
            self.0.clients.fetch_sub(1, Ordering::Relaxed);
        }
        self.0.budget.open.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_takes_what_there_is_leaves_some_for_others() {
        let budget = Budget::new(12);
        let (greedy, other) = (budget.share(), budget.share());
        let all = |share: &Share| std::iter::from_fn(|| share.take(Opener::Guest)).collect::<Vec<_>>();
        let (first, second) = (all(&greedy), all(&other));
        assert_eq!((first.len(), second.len(), budget.open()), (6, 3, 9));
        drop(second);
        assert_eq!(budget.open(), 6);
        drop(first);
        assert_eq!(all(&other).len(), 6);
        assert_eq!(budget.open(), 0);
        assert!(Budget::new(0).share().take(Opener::Guest).is_none());
    }

    #[test]
    fn clients_leave_a_quarter_of_a_share_to_its_guest() {
        let all = |share: &Share, opener| std::iter::from_fn(|| share.take(opener)).collect::<Vec<_>>();
        for (most, clients, guest) in [(16, 6, 2), (12, 5, 1), (8, 3, 1), (2, 1, 0), (0, 0, 0)] {
            let budget = Budget::new(most);
            let share = budget.share();
            let of_clients = all(&share, Opener::Client);
            assert_eq!(of_clients.len(), clients, "of {most}");
            assert_eq!(all(&share, Opener::Guest).len(), guest, "of {most}");
            drop(of_clients);
            // Whoever went makes room again; and what the guest has is no client's.
            let of_guest = all(&share, Opener::Guest);
            assert_eq!((of_guest.len(), all(&share, Opener::Client).len()), (most / 2, 0), "of {most}");
        }
    }
}
