//! Changes of instances' states, and those who listen to them.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, RecvError, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, SystemTime};

use ami_core::{AccountId, InstanceId};

use crate::InstanceState;
use crate::description::{InstanceDescription, StateReason};

/// A change of an instance's state ("EC2 Instance State-change Notification"), from
/// [`Region::state_changes`](crate::Region::state_changes), which shows it in use.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct StateChange {
    /// Whose.
    pub instance_id: InstanceId,
    /// The account that the instance is of.
    pub owner: AccountId,
    /// The state that it has now.
    pub state: InstanceState,
    /// Why, where there is something to say.
    pub reason: Option<StateReason>,
    /// When.
    pub at: SystemTime,
}

impl StateChange {
    pub(crate) fn of(description: &InstanceDescription) -> Self {
        Self {
            instance_id: description.id,
            owner: description.owner,
            state: description.state,
            reason: description.state_reason.clone(),
            at: SystemTime::now(),
        }
    }
}

/// The changes of instances' states from a moment on, in the order in which they are told: an iterator that waits for the
/// next. [`Region::state_changes`](crate::Region::state_changes) gives them.
///
/// They end with the region. Of those that nobody reads [`MOST_WAITING`](Self::MOST_WAITING) wait; with the next they end, once
/// these are read. Who still has the region then has missed some: it listens anew, and after that
/// [looks](crate::Region::describe_instances) how all are.
#[derive(Debug)]
pub struct StateChanges {
    changes: Receiver<StateChange>,
    waiting: Arc<AtomicUsize>,
}

impl StateChanges {
    /// How many changes wait to be read.
    pub const MOST_WAITING: usize = 100_000;

    /// Waits for the next.
    ///
    /// # Errors
    ///
    /// They have ended.
    pub fn recv(&self) -> Result<StateChange, RecvError> {
        self.changes.recv().inspect(|_| self.was_read())
    }

    /// Waits so long for the next.
    ///
    /// # Errors
    ///
    /// There was none, or they have ended.
    pub fn recv_timeout(&self, timeout: Duration) -> Result<StateChange, RecvTimeoutError> {
        self.changes.recv_timeout(timeout).inspect(|_| self.was_read())
    }

    /// Those that wait, without waiting for more.
    pub fn try_iter(&self) -> impl Iterator<Item = StateChange> + '_ {
        self.changes.try_iter().inspect(|_| self.was_read())
    }

    fn was_read(&self) {
        self.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Iterator for StateChanges {
    type Item = StateChange;

    fn next(&mut self) -> Option<StateChange> {
        self.recv().ok()
    }
}

/// Those who listen to the changes of a region's instances.
#[derive(Debug, Default)]
pub(crate) struct Listeners(Mutex<BTreeMap<Whose, Vec<Listener>>>);

/// Whose instances they listen to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Whose {
    All,
    Account(AccountId),
}

#[derive(Debug)]
struct Listener {
    changes: Sender<StateChange>,
    /// Gone with the one who listens.
    waiting: Weak<AtomicUsize>,
}

impl Listener {
    /// Tells it, and says whether it is to be told of more.
    fn tell(&self, change: &StateChange) -> bool {
        let Some(waiting) = self.waiting.upgrade() else { return false };
        // Before it can be read.
        let before = waiting.fetch_add(1, Ordering::Relaxed);
        before < StateChanges::MOST_WAITING && self.changes.send(change.clone()).is_ok()
    }
}

impl Listeners {
    // Nothing that is done under the lock panics half way.
    fn lock(&self) -> MutexGuard<'_, BTreeMap<Whose, Vec<Listener>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn add(&self, whose: Whose) -> StateChanges {
        let ((sender, changes), waiting) = (mpsc::channel(), Arc::default());
        let mut all = self.lock();
        // Who listens to an account in which nothing happens is not found to be gone by being told of something.
        all.values_mut().for_each(|some| some.retain(|listener| listener.waiting.strong_count() > 0));
        all.retain(|_, some| !some.is_empty());
        all.entry(whose).or_default().push(Listener { changes: sender, waiting: Arc::downgrade(&waiting) });
        StateChanges { changes, waiting }
    }

    /// Tells those who listen to the instances of its account, or to all.
    pub(crate) fn tell(&self, change: &StateChange) {
        let mut all = self.lock();
        for whose in [Whose::All, Whose::Account(change.owner)] {
            if let Some(listeners) = all.get_mut(&whose) {
                listeners.retain(|listener| listener.tell(change));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(owner: &str, number: u64) -> StateChange {
        StateChange {
            instance_id: "i-0123456789abcdef0".parse().unwrap(),
            owner: owner.parse().unwrap(),
            state: InstanceState::Running,
            reason: None,
            at: SystemTime::UNIX_EPOCH + Duration::from_secs(number),
        }
    }

    const OWN: &str = "111111111111";
    const OTHER: &str = "222222222222";

    fn own() -> Whose {
        Whose::Account(OWN.parse().unwrap())
    }

    #[test]
    fn an_account_is_told_of_its_own_alone() {
        let listeners = Listeners::default();
        let (all, own) = (listeners.add(Whose::All), listeners.add(own()));
        let told = [change(OWN, 1), change(OTHER, 2), change(OWN, 3)];
        told.iter().for_each(|change| listeners.tell(change));
        assert_eq!(all.try_iter().collect::<Vec<_>>(), told);
        assert_eq!(own.try_iter().collect::<Vec<_>>(), [told[0].clone(), told[2].clone()]);
    }

    #[test]
    fn who_does_not_read_is_told_so_much_and_no_more() {
        let listeners = Listeners::default();
        let (idle, mut busy) = (listeners.add(own()), listeners.add(own()));
        let most = StateChanges::MOST_WAITING as u64;
        for number in 0..most + 2 {
            listeners.tell(&change(OWN, number));
            assert_eq!(busy.next(), Some(change(OWN, number)));
        }
        assert_eq!(idle.try_iter().count() as u64, most);
        assert_eq!(
            idle.recv_timeout(Duration::ZERO),
            Err(RecvTimeoutError::Disconnected),
            "and then they end"
        );
        assert_eq!(busy.recv_timeout(Duration::ZERO), Err(RecvTimeoutError::Timeout));
        listeners.tell(&change(OWN, 0));
        assert_eq!(busy.try_iter().count(), 1);
        assert_eq!(busy.recv_timeout(Duration::ZERO), Err(RecvTimeoutError::Timeout), "it goes on");
    }

    #[test]
    fn nothing_stays_of_who_listens_no_more() {
        let listeners = Listeners::default();
        (0..10).for_each(|_| drop(listeners.add(own())));
        let all = listeners.add(Whose::All);
        assert_eq!(listeners.lock().values().map(Vec::len).sum::<usize>(), 1);
        drop(all);
        listeners.tell(&change(OWN, 1));
        assert!(listeners.lock()[&Whose::All].is_empty());
    }
}
