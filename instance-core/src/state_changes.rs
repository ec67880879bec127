//! Changes of instances' states, and those who listen to them.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, RecvError, RecvTimeoutError, Sender, TryRecvError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, SystemTime};

use ami_core::{AccountId, InstanceId};
use event_listener::Event;

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
/// next, by blocking or as a [future](Self::recv_async). [`Region::state_changes`](crate::Region::state_changes) gives them.
///
/// They end with the region. Of those that nobody reads [`MOST_WAITING`](Self::MOST_WAITING) wait; with the next they end, once
/// these are read. Who still has the region then has missed some: it listens anew, and after that
/// [looks](crate::Region::describe_instances) how all are.
#[derive(Debug)]
pub struct StateChanges {
    changes: Receiver<StateChange>,
    inbox: Arc<Inbox>,
}

/// What the one who listens shares with who tells it.
#[derive(Debug, Default)]
struct Inbox {
    /// How many changes wait to be read.
    waiting: AtomicUsize,
    /// One has come, or no more will.
    changed: Event,
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

    /// Waits for the next without blocking the thread, whatever the runtime. What is dropped before it is ready has taken none.
    ///
    /// ```
    /// # use ami_core::{Ami, X86_64};
    /// # use instance_core::testing::{FakeHypervisor, tiny_elf};
    /// # use instance_core::{DirectBoot, ImageSource, InstanceState, LaunchSpec, Region};
    /// # let dir = tempfile::tempdir()?;
    /// # let region = Region::open(dir.path(), FakeHypervisor::new())?;
    /// # let disk = storage_block::MemoryDisk::new(1 << 20)?.into_disk();
    /// # let source = ImageSource::new(&disk).boot(DirectBoot::new(tiny_elf(), None, ""));
    /// # let ami = region.register_image(Ami::<X86_64>::builder("web"), source)?;
    /// use std::pin::pin;
    /// use std::task::{Context, Poll, Waker};
    ///
    /// let mut changes = region.state_changes();
    /// let mut next = pin!(changes.recv_async());
    /// let mut context = Context::from_waker(Waker::noop()); // a runtime gives its own
    /// assert!(next.as_mut().poll(&mut context).is_pending());
    /// region.launch(&ami, LaunchSpec::new("t2.nano".parse()?))?;
    /// let Poll::Ready(Ok(change)) = next.as_mut().poll(&mut context) else { panic!("nothing was told") };
    /// assert_eq!(change.state, InstanceState::Pending);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// They have ended.
    pub async fn recv_async(&mut self) -> Result<StateChange, RecvError> {
        loop {
            let changed = self.inbox.changed.listen();
            match self.changes.try_recv() {
                Ok(change) => {
                    self.was_read();
                    return Ok(change);
                }
                Err(TryRecvError::Disconnected) => return Err(RecvError),
                Err(TryRecvError::Empty) => changed.await,
            }
        }
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
        self.inbox.waiting.fetch_sub(1, Ordering::Relaxed);
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
    /// Dropped after it: who is woken finds that no more will come.
    inbox: Woken,
}

/// The inbox of one who listens, gone with that one. Dropping it wakes it.
#[derive(Debug)]
struct Woken(Weak<Inbox>);

impl Drop for Woken {
    fn drop(&mut self) {
        if let Some(inbox) = self.0.upgrade() {
            inbox.changed.notify(usize::MAX);
        }
    }
}

impl Listener {
    /// Tells it, and gives who is to be woken; none if it is to be told of no more.
    fn tell(&self, change: &StateChange) -> Option<Arc<Inbox>> {
        let inbox = self.inbox.0.upgrade()?;
        // Before it can be read.
        let before = inbox.waiting.fetch_add(1, Ordering::Relaxed);
        let told = before < StateChanges::MOST_WAITING && self.changes.send(change.clone()).is_ok();
        told.then_some(inbox)
    }
}

impl Listeners {
    // Nothing that is done under the lock panics half way.
    fn lock(&self) -> MutexGuard<'_, BTreeMap<Whose, Vec<Listener>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn add(&self, whose: Whose) -> StateChanges {
        let ((sender, changes), inbox) = (mpsc::channel(), Arc::default());
        let mut all = self.lock();
        // Who listens to an account in which nothing happens is not found to be gone by being told of something.
        all.values_mut().for_each(|some| some.retain(|listener| listener.inbox.0.strong_count() > 0));
        all.retain(|_, some| !some.is_empty());
        all.entry(whose)
            .or_default()
            .push(Listener { changes: sender, inbox: Woken(Arc::downgrade(&inbox)) });
        StateChanges { changes, inbox }
    }

    /// Tells those who listen to the instances of its account, or to all.
    pub(crate) fn tell(&self, change: &StateChange) {
        // They are woken when the lock is free: what is woken is a listener's own.
        let (mut told, mut gone) = (Vec::new(), Vec::new());
        let mut all = self.lock();
        for whose in [Whose::All, Whose::Account(change.owner)] {
            let Some(listeners) = all.get_mut(&whose) else { continue };
            for listener in std::mem::take(listeners) {
                match listener.tell(change) {
                    Some(inbox) => {
                        told.push(inbox);
                        listeners.push(listener);
                    }
                    None => gone.push(listener),
                }
            }
        }
        drop(all);
        for inbox in told {
            inbox.changed.notify(usize::MAX);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::task::{Context, Poll, Wake};
    use std::thread::{self, Thread};

    use super::*;

    /// How often it was woken.
    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

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

    /// Waits in this thread, as a runtime does in some of its own.
    fn block_on<T>(future: impl Future<Output = T> + Send) -> T {
        struct Unpark(Thread);
        impl Wake for Unpark {
            fn wake(self: Arc<Self>) {
                self.0.unpark();
            }
        }
        let waker = Arc::new(Unpark(thread::current())).into();
        let (mut future, mut context) = (pin!(future), Context::from_waker(&waker));
        loop {
            match future.as_mut().poll(&mut context) {
                Poll::Ready(done) => return done,
                Poll::Pending => thread::park(),
            }
        }
    }

    #[test]
    fn a_future_is_woken_by_each_change_and_by_the_end() {
        let listeners = Arc::new(Listeners::default());
        let mut changes = listeners.add(own());
        let reader = thread::spawn(move || {
            let mut told = Vec::new();
            while let Ok(change) = block_on(changes.recv_async()) {
                told.push(change);
            }
            assert_eq!(changes.inbox.waiting.load(Ordering::Relaxed), 0);
            told
        });
        let told: Vec<_> = (0..1000).map(|number| change(OWN, number)).collect();
        told.iter().for_each(|change| listeners.tell(change));
        drop(listeners);
        assert_eq!(reader.join().unwrap(), told);
    }

    #[test]
    fn a_future_that_waits_is_woken_once_there_is_something_to_it() {
        let count = Arc::new(Count::default());
        let (waker, listeners) = (count.clone().into(), Listeners::default());
        let mut context = Context::from_waker(&waker);
        let mut changes = listeners.add(own());
        let woken = || count.0.load(Ordering::Relaxed);
        {
            let mut next = pin!(changes.recv_async());
            assert_eq!((next.as_mut().poll(&mut context), woken()), (Poll::Pending, 0));
            listeners.tell(&change(OTHER, 1));
            assert_eq!(woken(), 0, "it is none of its business");
            listeners.tell(&change(OWN, 2));
            assert_eq!(woken(), 1);
        }
        // It was dropped, and what it was woken for is the next's.
        assert_eq!(pin!(changes.recv_async()).poll(&mut context), Poll::Ready(Ok(change(OWN, 2))));
        let mut next = pin!(changes.recv_async());
        assert_eq!(next.as_mut().poll(&mut context), Poll::Pending);
        drop(listeners);
        assert_eq!((woken(), next.poll(&mut context)), (2, Poll::Ready(Err(RecvError))));
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
